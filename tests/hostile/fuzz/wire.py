"""Clients that do anything, against a real gateway on loopback: a Hypothesis state machine.

Only the client's side is modelled, and only as far as the promises go: each frame that calls for an
answer gets exactly one last answer, streams count from 0, and a connection ends with a close code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.fake_host import FakeClient
from tests.hostile.fuzz.gateway_host import ATTACKER, CLOSE_CODES, GOOD, LIMITS, PATIENCE, Client, Loop, tasks
from tests.hostile.fuzz.problems import Problem, no_host_errors
from tests.hostile.fuzz.wire_messages import GARBAGE, RAW, calls

T = TypeVar("T")


class WireMachine(RuleBasedStateMachine):
    """See the module's docstring. ``shared`` is set by whoever runs it."""

    shared: Loop
    clients = Bundle("clients")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Client] = []
        self.watch = contextlib.ExitStack()
        self.watch.enter_context(no_host_errors())

    # --- connecting -------------------------------------------------------------------------------

    @initialize(target=clients)
    def begin(self) -> Any:
        return multiple(*(self._join(tenant, header=True) for tenant in ("alice", "bob")))

    @rule(target=clients, tenant=st.sampled_from(["alice", "alice", "bob", "admin"]), header=st.booleans())
    def connect(self, tenant: str, header: bool) -> Any:
        if sum(not client.ended for client in self.all) >= 6:
            return multiple()
        return self._join(tenant, header)

    def _join(self, tenant: str, header: bool) -> Any:
        client = self._run(self._connect(tenant, header))
        if client is None:
            return multiple()
        self.all.append(client)
        return client

    async def _connect(self, tenant: str, header: bool, key: str | None = None) -> Client | None:
        host = self.shared.host
        key = host.keys[tenant] if key is None else key
        try:
            socket = await connect(
                host.url,
                additional_headers={"Authorization": f"Bearer {key}"} if header else {},
                compression=None,
                max_size=None,
                local_addr=(ATTACKER, 0),
            )
        except (InvalidHandshake, OSError):
            # An address that has been at fault too often may be turned away for a while.
            return None
        client = Client(socket, tenant)
        if not header:
            await client.send(json.dumps({"type": "auth", "api_key": key}))
        return await self._greet(client)

    async def _greet(self, client: Client) -> Client:
        while not client.open and not client.ended:
            await client.read(0.01)
        return client

    @rule(
        first=RAW | st.sampled_from(['{"type":"auth","api_key":"wrong"}', '{"type":"auth"}']) | st.binary(max_size=40)
    )
    def connect_wrongly(self, first: str | bytes) -> None:
        """Whatever comes before a key ends in a close code."""

        async def attempt() -> None:
            try:
                socket = await connect(self.shared.host.url, compression=None, max_size=None, local_addr=(ATTACKER, 0))
            except (InvalidHandshake, OSError):
                return
            client = Client(socket, "")
            await client.send(first)
            await client.end()
            self._check_close(client)
            socket.transport.abort()

        self._run(attempt())

    # --- talking ----------------------------------------------------------------------------------

    @rule(client=clients, call=calls())
    def call(self, client: Client, call: dict[str, Any]) -> None:
        if call.get("function") == "send" and client.runs:
            call["params"] = {"run": client.runs[-1], "data": "hello"}
        self._text(client, json.dumps(call), call)

    @rule(client=clients, made=st.lists(calls(), min_size=2, max_size=20))
    def burst(self, client: Client, made: list[dict[str, Any]]) -> None:
        for call in made:
            self._text(client, json.dumps(call), call)

    @rule(client=clients, text=RAW)
    def raw(self, client: Client, text: str) -> None:
        self._text(client, text, None)

    @rule(client=clients, size=st.sampled_from([1, 3, 1000]))
    def fragments(self, client: Client, size: int) -> None:
        """One call in many frames."""
        text = json.dumps({"id": "pieces", "function": "health", "params": {"pad": "x" * size}})
        if not self._usable(client):
            return

        async def send() -> None:
            with contextlib.suppress(ConnectionClosed):
                await client.socket.send([text[at : at + 7] for at in range(0, len(text), 7)])

        client.sent[json.dumps("pieces")] += 1
        self._run(send())

    @rule(client=clients, number=st.integers(0, 4), offset=st.integers(0, 30), data=st.binary(max_size=24))
    def chunk(self, client: Client, number: int, offset: int, data: bytes) -> None:
        upload = client.uploads[-1] if client.uploads and number else number
        frame = upload.to_bytes(8, "little") + offset.to_bytes(8, "little") + data
        if self._usable(client):
            client.chunks += 1
            self._run(client.send(frame))

    @rule(client=clients, data=st.binary(max_size=15))
    def short_binary(self, client: Client, data: bytes) -> None:
        if self._usable(client):
            client.sent["null"] += 1
            self._run(client.send(data))

    @rule(client=consumes(clients), data=GARBAGE | st.none())
    def spoil(self, client: Client, data: bytes | None) -> None:
        """What is no WebSocket, or too much of it, ends in a close code."""
        if self._usable(client):
            client.spoilt = True
            if data is None:
                self._run(client.send("x" * (LIMITS.frame_bytes + 1)))
            else:
                client.socket.transport.write(data + bytes(64))
                self._run(asyncio.sleep(0))

    @rule(client=clients, most=st.integers(1, 20))
    def read(self, client: Client, most: int) -> None:
        async def some() -> None:
            for _ in range(most):
                if client.ended or not await client.read(0.001):
                    return

        self._run(some())

    # --- leaving ----------------------------------------------------------------------------------

    @rule(client=consumes(clients), how=st.sampled_from(["close", "abort", "half"]))
    def leave(self, client: Client, how: str) -> None:
        async def go() -> None:
            if how == "close":
                await client.socket.close()
            elif how == "abort":
                client.socket.transport.abort()
            elif client.socket.transport.can_write_eof() and not client.socket.transport.is_closing():
                client.socket.transport.write_eof()
            await asyncio.sleep(0)

        client.ended = True
        self.all.remove(client)
        self._run(go())
        client.socket.transport.abort()

    def _usable(self, client: Client) -> bool:
        return client.open and not client.ended and not client.spoilt

    def _text(self, client: Client, text: str, call: dict[str, Any] | None) -> None:
        if not self._usable(client):
            return
        client.sent[_key(call)] += 1
        self.shared.frames += 1
        self._run(client.send(text))

    def _run(self, work: Awaitable[T]) -> T:
        return self.shared.run(work)

    # --- the end ----------------------------------------------------------------------------------

    def teardown(self) -> None:
        with self.watch:
            try:
                self._run(self._settle())
            finally:
                for client in self.all:
                    client.socket.transport.abort()
            self._run(self._nothing_left())

    async def _settle(self) -> None:
        talking = []
        for client in self.all:
            if client.open and not client.spoilt:
                talking.append(client)
                continue
            await client.end()
            self._check_close(client)
        host = self.shared.host
        async with host.client("admin", local_addr=(GOOD, 0)) as admin:
            try:
                async with asyncio.timeout(PATIENCE / 2):
                    while not all(client.settled for client in talking):
                        await self._cancel_all(admin)
                        for client in talking:
                            while await client.read(0.003):
                                pass
            except TimeoutError:
                lines = [f"sent {client.sent}, got {client.got}" for client in talking if not client.settled]
                raise Problem(f"no answer: {lines}") from None
        for client in talking:
            await self._exactly_once(client)
            await client.socket.close()
        # Another client is served, whatever these have done.
        async with host.client("bob", local_addr=(GOOD, 0)) as good:
            data = await good.data("run", module="echo", input="a b c", stream=False)
            if data["text"] != "a b c":
                raise Problem(f"another client got {data}")

    async def _cancel_all(self, admin: FakeClient) -> None:
        """End guests that wait for ever, as an operator would."""
        for run in (await admin.data("ps"))["runs"]:
            await admin.data("cancel", run=run["run"])

    async def _exactly_once(self, client: Client) -> None:
        if client.ended:
            raise Problem(f"closed with {client.close_code} for nothing: sent {client.sent}, got {client.got}")
        # An answer too many would come before the answer to this.
        fence = json.dumps("fence")
        client.sent[fence] += 1
        await client.send('{"id":"fence","function":"models.list"}')
        while not client.got[fence] and await client.read(PATIENCE):
            pass
        if client.got.total() != client.sent.total() or client.acks != client.chunks:
            raise Problem(f"sent {client.sent}, got {client.got}; {client.acks} answers to {client.chunks} chunks")
        # Frames whose id cannot be known here ("?") may be answered under any.
        if wrong := {key: n for key, n in client.sent.items() if key != "?" and client.got[key] < n}:
            raise Problem(f"not answered under their ids: {wrong}: sent {client.sent}, got {client.got}")

    def _check_close(self, client: Client) -> None:
        code = client.close_code
        if code is None or not (code in CLOSE_CODES or 4400 <= code < 4500):
            raise Problem(f"the connection ended with {code}")

    async def _nothing_left(self) -> None:
        host = self.shared.host
        gateway = host.gateway

        def left() -> dict[str, int]:
            return {
                "connections": len(gateway.connections),
                "runs": len(gateway.runs.runs),
                "files": len(list((host.home / "incoming").iterdir())),
            }

        await _until(lambda: not any(left().values()), left)
        await _until_async(self._tasks_done)

    async def _tasks_done(self) -> bool:
        return len(await tasks()) <= self.shared.tasks


def _key(call: dict[str, Any] | None) -> str:
    """The id under which an answer must come, "?" where that is the gateway's choice."""
    if call is None or "id" not in call:
        return "?"
    given = call["id"]
    if isinstance(given, str) and len(given) <= 128:
        return json.dumps(given)
    if isinstance(given, int) and not isinstance(given, bool) and abs(given) <= 2**53:
        return json.dumps(given)
    return "?"


async def _until(condition: Callable[[], bool], state: Callable[[], Any]) -> None:
    try:
        async with asyncio.timeout(PATIENCE / 2):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise Problem(f"something is left: {state()}") from None


async def _until_async(condition: Callable[[], Awaitable[bool]]) -> None:
    try:
        async with asyncio.timeout(PATIENCE / 2):
            while not await condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise Problem(f"tasks are left: {[task.get_name() for task in await tasks()]}") from None
