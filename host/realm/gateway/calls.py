"""One call in progress, and how a run's results become its replies.

Frames of a stream are put together from bytes encoded before: the part that repeats is made once a
call, and only the text of a piece is encoded for it.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from realm.errors import RealmError
from realm.gateway.protocol import encode, error_data
from realm.gateway.run import Run, usage_data
from realm.guests.abi import ErrorCode
from realm.run_messages import ErrorInfo, RunFinished


class Port(Protocol):
    """What a call needs of its connection."""

    @property
    def behind(self) -> bool:
        """More is waiting to be sent than the client takes."""

    def send(self, payload: bytes) -> None:
        """Send a text frame; dropped when the connection is closing."""

    def call_finished(self, call: Call) -> None:
        """The call has had its last reply."""


class Call:
    """One call: streams replies, then exactly one last reply."""

    __slots__ = ("_port", "_prefix", "_seq", "done", "id", "run", "task")

    def __init__(self, call_id: int | str, port: Port) -> None:
        self.id = call_id
        self.run: Run | None = None
        self.task: asyncio.Task[dict[str, Any] | None] | None = None
        self.done = False
        self._port = port
        self._prefix = b'{"id":' + encode(call_id) + b',"status":"streaming","seq":'
        self._seq = 0

    @property
    def behind(self) -> bool:
        return self._port.behind

    def stream(self, data: bytes) -> None:
        """Send a streaming reply; ``data`` is JSON."""
        self._port.send(b'%b%d,"data":%b}' % (self._prefix, self._seq, data))
        self._seq += 1

    def complete(self, data: Any) -> None:
        self._last({"id": self.id, "status": "complete", "data": data})

    def cancelled(self, data: Any) -> None:
        self._last({"id": self.id, "status": "cancelled", "data": data})

    def fail(self, error: RealmError | ErrorInfo) -> None:
        self._last({"id": self.id, "status": "error", "error": error_data(error)})

    def _last(self, message: dict[str, Any]) -> None:
        if self.done:
            return
        self.done = True
        self.run = None
        self._port.send(encode(message))
        self._port.call_finished(self)


class RunSink:
    """Replies of ``run``."""

    __slots__ = ("_call", "_streamed", "_text")

    def __init__(self, call: Call, *, streamed: bool) -> None:
        self._call = call
        self._streamed = streamed
        # Pieces are kept as one buffer: a list of them would take many times their size.
        self._text = bytearray()

    @property
    def behind(self) -> bool:
        return self._streamed and self._call.behind

    @property
    def collects(self) -> bool:
        return not self._streamed

    def waiting(self, run: Run) -> None:
        self._call.run = run
        if self._streamed:
            self._call.stream(b'{"kind":"waiting","run":"r%d"}' % run.number)

    def started(self, run: Run) -> None:
        self._call.run = run
        if self._streamed:
            self._call.stream(b'{"kind":"started","run":"r%d"}' % run.number)

    def output(self, run: Run, text: str) -> None:
        if self._streamed:
            self._call.stream(b'{"kind":"output","text":%b}' % encode(text))
        else:
            self._text += text.encode()

    def log(self, run: Run, level: str, text: str) -> None:
        if self._streamed:
            self._call.stream(encode({"kind": "log", "level": level, "text": text}))

    def finished(self, run: Run, outcome: RunFinished) -> None:
        data: dict[str, Any] = {"run": run.id, "code": outcome.code}
        if not self._streamed:
            data["text"] = self._text.decode()
        data["usage"] = usage_data(outcome.usage)
        _finish(self._call, run, outcome, data)


class GenerateSink:
    """Replies of ``generate``. The guest returns 0 when it stopped by itself, 1 at ``max_tokens``."""

    __slots__ = ("_call", "_index", "_streamed", "_text")

    def __init__(self, call: Call, *, streamed: bool) -> None:
        self._call = call
        self._streamed = streamed
        # Pieces are kept as one buffer: a list of them would take many times their size.
        self._text = bytearray()
        self._index = 0

    @property
    def behind(self) -> bool:
        return self._streamed and self._call.behind

    @property
    def collects(self) -> bool:
        return True

    def waiting(self, run: Run) -> None:
        self._call.run = run

    def started(self, run: Run) -> None:
        self._call.run = run

    def output(self, run: Run, text: str) -> None:
        self._text += text.encode()
        if self._streamed:
            self._piece(text, b"false")

    def log(self, run: Run, level: str, text: str) -> None:
        """The guest is the host's own: its log is for ``logs`` only."""

    def finished(self, run: Run, outcome: RunFinished) -> None:
        error = outcome.error
        if error is not None and error.code == "guest_error" and error.details.get("code") == ErrorCode.CONTEXT_FULL:
            message = error.details.get("last_error") or "the prompt and max_tokens do not fit the model's context"
            outcome.error = ErrorInfo("context_length_exceeded", str(message))
        elif outcome.outcome == "complete" and outcome.code not in (0, 1):
            outcome.outcome = "error"
            outcome.error = ErrorInfo("internal", f"the generate guest returned {outcome.code}")
        if self._streamed and outcome.outcome == "complete":
            self._piece("", b"true")
        usage = outcome.usage
        data = {
            "text": self._text.decode(),
            "tokens_generated": usage.new_tokens,
            "prompt_tokens": usage.prompt_tokens,
            "finish_reason": "length" if outcome.code == 1 else "stop",
            "run": run.id,
            "usage": usage_data(usage),
        }
        _finish(self._call, run, outcome, data)

    def _piece(self, text: str, final: bytes) -> None:
        encoded = encode(text)
        self._call.stream(b'{"text":%b,"token":%b,"index":%d,"is_final":%b}' % (encoded, encoded, self._index, final))
        self._index += 1


def _finish(call: Call, run: Run, outcome: RunFinished, data: dict[str, Any]) -> None:
    if outcome.outcome == "complete":
        call.complete(data)
    elif outcome.outcome == "cancelled":
        data.pop("finish_reason", None)
        call.cancelled({**data, "reason": run.cancelled or "the guest's worker cancelled it"})
    else:
        error = outcome.error or ErrorInfo("internal", "the run ended with an error that has no description")
        details = {**error.details, "run": run.id, "usage": usage_data(outcome.usage)}
        call.fail(ErrorInfo(error.code, error.message, details, error.retry_after))
