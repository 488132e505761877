"""Upload frames in any order, over a real connection: what is stored is what was announced, or nothing is."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from websockets.asyncio.client import ClientConnection, connect

from tests.fake_host import WASM
from tests.hostile.fuzz.gateway_host import GOOD, Loop
from tests.hostile.fuzz.problems import Problem, no_host_errors

MODULE_CODES = frozenset({"module_invalid", "upload_hash_mismatch"})


@dataclass
class Sent:
    """One upload as its client sees it: what was announced and what was taken."""

    name: str
    content: bytes
    announced: str
    received: bytearray = field(default_factory=bytearray)
    over: bool = False


@dataclass
class Uploader:
    """One connection. ``known`` are its uploads by number."""

    socket: ClientConnection
    known: dict[int, Sent] = field(default_factory=dict)
    calls: int = 0


class UploadMachine(RuleBasedStateMachine):
    """Two connections of one tenant; ``shared`` is set by whoever runs it."""

    shared: Loop

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[Uploader] = []
        self.stored: dict[str, bytes] = {}
        self.watch = contextlib.ExitStack()
        self.watch.enter_context(no_host_errors())

    @initialize()
    def begin_all(self) -> None:
        for _ in range(2):
            self._join()

    @precondition(lambda self: len(self.clients) < 2)
    @rule()
    def join(self) -> None:
        self._join()

    def _join(self) -> None:
        async def join() -> None:
            host = self.shared.host
            headers = {"Authorization": f"Bearer {host.keys['alice']}"}
            socket = await connect(
                host.url, additional_headers=headers, compression=None, max_size=None, local_addr=(GOOD, 0)
            )
            assert json.loads(await socket.recv())["type"] == "auth_success"
            assert json.loads(await socket.recv())["status"] == "connected"
            self.clients.append(Uploader(socket))

        self.shared.run(join())

    async def _ask(self, client: Uploader, function: str, **params: Any) -> dict[str, Any]:
        client.calls += 1
        await client.socket.send(json.dumps({"id": client.calls, "function": function, "params": params}))
        answer = json.loads(await client.socket.recv())
        if answer["id"] != client.calls:
            raise Problem(f"{function} was answered with {answer}")
        self.shared.frames += 1
        return dict(answer)

    def _client(self, number: int) -> Uploader | None:
        return self.clients[number % len(self.clients)] if self.clients else None

    @rule(
        which=st.integers(0, 1),
        name=st.sampled_from(["one", "two", "three"]),
        body=st.binary(max_size=60),
        valid=st.booleans(),
        lie=st.sampled_from([None, None, None, "size+", "size-", "hash"]),
    )
    def begin(self, which: int, name: str, body: bytes, valid: bool, lie: str | None) -> None:
        client = self._client(which)
        if client is None:
            return
        content = WASM + body if valid else body
        announced = hashlib.sha256(content + (b"x" if lie == "hash" else b"")).hexdigest()
        size = max(0, len(content) + {"size+": 1, "size-": -1}.get(lie or "", 0))
        answer = self.shared.run(self._ask(client, "modules.begin", name=name, size=size, sha256=announced))
        if answer["status"] == "error":
            if answer["error"]["code"] not in ("busy", "rate_limited", "limit_exceeded", "upload_size"):
                raise Problem(f"begin: {answer}")
            return
        data = answer["data"]
        sent = Sent(name, content[:size] if lie == "size-" else content, announced)
        if data["exists"]:
            sent.received += content
        if data["upload"] in client.known:
            raise Problem(f"upload number {data['upload']} was given twice")
        client.known[data["upload"]] = sent

    @rule(
        which=st.integers(0, 1),
        number=st.integers(0, 8),
        at=st.integers(0, 5),
        size=st.integers(0, 80),
        noise=st.booleans(),
    )
    def chunk(self, which: int, number: int, at: int, size: int, noise: bool) -> None:
        """Mostly the next piece of the content; sometimes another place, other bytes, another's number."""
        client = self._client(which)
        if client is None:
            return
        numbers = sorted(client.known)
        upload = numbers[number % len(numbers)] if numbers and number < 8 else number
        sent = client.known.get(upload, Sent("", b"", ""))
        offset = max(0, len(sent.received) + {4: 1, 5: -1}.get(at, 0))
        data = b"?" * size if noise and at > 2 else sent.content[offset : offset + size]
        frame = upload.to_bytes(8, "little") + offset.to_bytes(8, "little") + data

        async def send() -> dict[str, Any]:
            await client.socket.send(frame)
            return dict(json.loads(await client.socket.recv()))

        answer = self.shared.run(send())
        self.shared.frames += 1
        if answer.get("upload") != upload:
            raise Problem(f"chunk of {upload}: {answer}")
        if answer["type"] == "upload_ack":
            if upload not in client.known or sent.over or offset != len(sent.received):
                raise Problem(f"a chunk was taken that must not be: {answer}, offset {offset}")
            sent.received += data
            if answer["received"] != len(sent.received):
                raise Problem(f"{answer}: {len(sent.received)} have been sent")

    @rule(which=st.integers(0, 1), number=st.integers(0, 8))
    def finish(self, which: int, number: int) -> None:
        """Send what is missing."""
        client = self._client(which)
        if client is None or not client.known:
            return
        upload = sorted(client.known)[number % len(client.known)]
        sent = client.known[upload]
        if not sent.over and len(sent.received) < len(sent.content):
            self.chunk(self.clients.index(client), sorted(client.known).index(upload), 0, 1000, False)

    @rule(which=st.integers(0, 1), number=st.integers(0, 9))
    def commit(self, which: int, number: int) -> None:
        client = self._client(which)
        if client is None:
            return
        numbers = sorted(client.known)
        upload = numbers[number % len(numbers)] if numbers and number < 9 else number
        answer = self.shared.run(self._ask(client, "modules.commit", upload=upload))
        sent = client.known.get(upload)
        if answer["status"] == "complete":
            data = answer["data"]
            if sent is None or sent.over:
                raise Problem(f"committed twice, or never begun: {answer}")
            right = hashlib.sha256(sent.received).hexdigest() == sent.announced == data["sha256"]
            if not right or data["size"] != len(sent.received):
                raise Problem(f"stored what was not announced: {data}, {bytes(sent.received)!r}")
            self.stored[sent.name] = bytes(sent.received)
            sent.over = True
        elif sent is not None and answer["error"]["code"] in MODULE_CODES:
            if hashlib.sha256(sent.received).hexdigest() == sent.announced and sent.received.startswith(WASM):
                raise Problem(f"a good module is refused: {answer}")
            sent.over = True
        elif answer["error"]["code"] not in ("upload_size", "upload_not_found", "upload_out_of_order"):
            raise Problem(f"commit: {answer}")
        self._check_stored()

    @rule(which=st.integers(0, 1), number=st.integers(0, 9))
    def abort(self, which: int, number: int) -> None:
        client = self._client(which)
        if client is None:
            return
        numbers = sorted(client.known)
        upload = numbers[number % len(numbers)] if numbers and number < 9 else number
        answer = self.shared.run(self._ask(client, "modules.abort", upload=upload))
        sent = client.known.get(upload)
        alive = sent is not None and not sent.over
        if (answer["status"] == "complete") != alive:
            raise Problem(f"abort: {answer}")
        if sent is not None:
            sent.over = True

    @rule(which=st.integers(0, 1))
    def leave(self, which: int) -> None:
        client = self._client(which)
        if client is not None:
            self.clients.remove(client)
            client.socket.transport.abort()

    def _check_stored(self) -> None:
        """What the registry has under each name is what was last stored there."""

        async def look() -> dict[str, bytes]:
            registry = self.shared.host.registry
            found = {}
            for record in await registry.run(lambda database: database.list_modules("alice")):
                path = registry.blobs.path(record.sha256)
                found[record.name] = await asyncio.to_thread(path.read_bytes)
            return found

        found = self.shared.run(look())
        if {name: found.get(name) for name in self.stored} != self.stored:
            raise Problem(f"stored: {found}; committed: {self.stored}")
        if extra := found.keys() - self.stored.keys() - {"echo"}:
            raise Problem(f"never committed: {extra}")

    def teardown(self) -> None:
        with self.watch:
            for client in self.clients:
                client.socket.transport.abort()
            self.shared.run(self._clean())

    async def _clean(self) -> None:
        host = self.shared.host
        folder = host.home / "incoming"
        async with asyncio.timeout(10):
            while host.gateway.connections or any(folder.iterdir()):  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        async with host.client("alice", local_addr=(GOOD, 0)) as client:
            for name in self.stored:
                await client.data("modules.remove", name=name)
