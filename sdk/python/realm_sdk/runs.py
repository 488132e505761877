"""Runs and text streams as async iterators that cancel their call when they are left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from realm_sdk.calls import Call
from realm_sdk.errors import ProtocolError, RealmError
from realm_sdk.events import Event, Finished, Generation, Log, Output, Piece, Started, Waiting
from realm_sdk.protocol import Done

if TYPE_CHECKING:
    from realm_sdk.client import Client


class _StreamData(msgspec.Struct):
    """The data of every streamed message at once."""

    kind: str = ""
    run: str = ""
    text: str = ""
    level: str = "info"
    index: int = 0
    is_final: bool = False


_stream_data = msgspec.json.Decoder(_StreamData)
_finished = msgspec.json.Decoder(Finished)
_generation = msgspec.json.Decoder(Generation)


class _Streaming:
    """A call that is made when it is first needed and cancelled when its consumer leaves."""

    def __init__(self, client: Client, function: str, params: dict[str, Any], wait: float | None) -> None:
        self._client = client
        self._function = function
        self._params = params
        self._wait = wait
        self._call: Call | None = None
        self._iterated = False

    async def _started(self) -> Call:
        if self._call is None:
            self._call = self._client.open_call(self._function)
            await self._client.send_call(self._call, self._params)
        return self._call

    def _claim(self) -> None:
        if self._iterated:
            raise RuntimeError(f"this {self._function} was already iterated: its messages can be read once")
        self._iterated = True

    def _leave(self) -> None:
        """Cancel the call unless it has ended. Never waits: it runs where a task is being cancelled."""
        if self._call is not None and not self._call.ended:
            self._client.abandon(self._call)

    async def cancel(self) -> bool:
        """Stop it. True if it was still running; the iterator then ends with ``outcome="cancelled"``."""
        if self._call is None or self._call.ended:
            return False
        return await self._client.cancel_call(self._call.ident)


def _decode(decoder: msgspec.json.Decoder[Any], data: msgspec.Raw, function: str) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError("protocol_error", f"{function}: the server's data cannot be read: {error}") from error


class Run(_Streaming):
    """A guest's run: iterate it for its events, ``await`` it to know that the server has taken it.

    A run that has to wait for a place says so (:class:`Waiting`) before it starts; what is sent to it until
    then, its guest gets at its start.

    The run is asked for when it is first iterated, awaited or entered. Leaving the loop (``break``, an
    exception, a cancelled task) cancels the run. ``async with client.run(…) as run`` makes that certain on
    every Python implementation, because it does not wait for the iterator to be collected.
    """

    def __init__(self, client: Client, params: dict[str, Any], wait: float | None) -> None:
        super().__init__(client, "run", params, wait)
        self._id: str | None = None

    @property
    def id(self) -> str | None:
        """The run's id, once the server has taken it. Without ``stream`` it is known at the end."""
        return self._id

    def __await__(self) -> Generator[Any, None, Run]:
        return self._wait_started().__await__()

    async def __aenter__(self) -> Run:
        return await self._wait_started()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    async def __aiter__(self) -> AsyncIterator[Event]:
        self._claim()
        try:
            call = await self._started()
            while True:
                message = await call.next(self._wait)
                if isinstance(message, Done):
                    yield self._end(message)
                    return
                event = self._event(message)
                if event is not None:
                    yield event
        finally:
            self._leave()

    async def text(self) -> str:
        """All text the guest emits, once it has ended.

        Raises:
            RealmError: the run failed, or (``cancelled``) was cancelled.
        """
        parts: list[str] = []
        async for event in self:
            if isinstance(event, Output):
                parts.append(event.text)
            elif isinstance(event, Finished):
                if event.outcome == "cancelled":
                    raise RealmError("cancelled", "the run was cancelled", details={"run": event.run})
                parts.append(event.text)
        return "".join(parts)

    async def send(self, data: Any) -> None:
        """Give the guest a message: text, or anything that can be JSON. Its ``recv`` gets it."""
        await self._wait_started()
        if self._id is None:
            raise RealmError("run_not_found", "the run has ended, or was not started with stream=True")
        await self._client.send(self._id, data)

    async def _wait_started(self) -> Run:
        """Until the id is known. The message that brings it stays for the iterator."""
        call = await self._started()
        if self._id is None and self._params["stream"]:
            message = await call.peek(self._wait)
            if not isinstance(message, Done):
                self._event(message)
        return self

    def _event(self, data: msgspec.Raw) -> Event | None:
        item: _StreamData = _decode(_stream_data, data, "run")
        if item.kind == "output":
            return Output(item.text)
        if item.kind == "log":
            return Log(item.level, item.text)
        if item.kind == "started":
            self._id = item.run
            return Started(item.run)
        if item.kind == "waiting":
            self._id = item.run
            return Waiting(item.run)
        # A kind that a newer server has and this version does not know.
        return None

    def _end(self, done: Done) -> Finished:
        finished: Finished = _decode(_finished, done.data, "run")
        self._id = finished.run or self._id
        return msgspec.structs.replace(
            finished, run=self._id or "", outcome="cancelled" if done.cancelled else "complete"
        )


class TextStream(_Streaming):
    """Generated text, piece by piece. Leaving the loop cancels the generation."""

    def __init__(self, client: Client, params: dict[str, Any], wait: float | None) -> None:
        super().__init__(client, "generate", params, wait)
        self._result: Generation | None = None

    @property
    def result(self) -> Generation | None:
        """Counts and usage, once the stream has ended."""
        return self._result

    async def __aenter__(self) -> TextStream:
        await self._started()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        self._claim()
        try:
            call = await self._started()
            while True:
                message = await call.next(self._wait)
                if isinstance(message, Done):
                    self._result = _decode(_generation, message.data, "generate")
                    if message.cancelled:
                        raise RealmError("cancelled", "the generation was cancelled")
                    return
                item: _StreamData = _decode(_stream_data, message, "generate")
                yield Piece(item.text, item.index, item.is_final)
        finally:
            self._leave()

    async def text(self) -> str:
        """All of the text, once it is complete."""
        return "".join([piece.text async for piece in self])
