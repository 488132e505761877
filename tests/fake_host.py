"""A real gateway and registry on loopback, with a worker and an engine that only speak the messages.

The fake worker does what its ``script`` says to each :class:`StartRun`; the fake engine answers
hellos and counters. Both sit behind real Unix sockets in the test's own event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from websockets.asyncio.client import ClientConnection, connect

from realm.channel import listen
from realm.errors import RealmError
from realm.gateway.gateway import Gateway
from realm.gateway.links import EngineClient, Link
from realm.gateway.server import ClientServer
from realm.messages import (
    AdapterFile,
    AdapterGone,
    AdaptersRequest,
    AdapterState,
    AdapterStates,
    EngineReady,
    EngineStats,
    GatewayHello,
    StatsRequest,
    TenantQuota,
    TenantStats,
    ToEngine,
    WorkerHello,
    WorkerLost,
)
from realm.registry.database import Database
from realm.registry.thread import Registry
from realm.run_messages import (
    CancelRun,
    ClientMessage,
    Credit,
    ErrorInfo,
    GatewayToWorker,
    Log,
    Output,
    Ping,
    RunFinished,
    Shutdown,
    StartRun,
    StoreReply,
    TenantShare,
    Usage,
    WorkerEvent,
    WorkerEvents,
)
from realm.serve import bind
from realm.settings import GatewayLimits, ServeSettings
from tests.gateway_adapters import SHAPE

T = TypeVar("T")
WASM = b"\0asm\x01\0\0\0"


def async_test(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a coroutine test in a fresh loop, with a limit well under the suite's."""

    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(9):
                await test(*args, **kwargs)

        asyncio.run(limited())

    return wrapper


async def eventually(condition: Callable[[], object]) -> None:
    """Wait for a state that nothing announces; the test's own limit ends a vain wait."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


@dataclass(frozen=True)
class FakeCompiled:
    artifact: Path
    artifact_sha256: str
    sha256: str
    imports: tuple[str, ...] = ("realm.forward", "realm.emit")


class FakeCompiler:
    """Copies instead of compiling, and counts. Modules that do not begin like WASM are refused."""

    def __init__(self) -> None:
        self.calls = 0
        self.broken = False
        self.done: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, wasm: Path, cache: Path) -> FakeCompiled:
        self.calls += 1
        await self.gate.wait()
        if self.broken:
            raise RealmError("compile_limit", "no time")
        data = await asyncio.to_thread(wasm.read_bytes)
        if not data.startswith(WASM):
            raise RealmError("module_invalid", "not a WebAssembly module", details={"offset": 0})
        sha256 = hashlib.sha256(data).hexdigest()
        artifact = cache / sha256
        artifact.write_bytes(data)
        self.done.append(data)
        return FakeCompiled(artifact, sha256, sha256)


Script = Callable[["FakeWorker", StartRun], None]


def echo(worker: FakeWorker, start: StartRun) -> None:
    """Emit the input, a piece a word, and return 0. ``generate`` gets its prompt back."""
    data = start.input
    if start.module == "generate":
        given = json.loads(data)
        data = (given.get("prompt") or given["messages"][-1]["content"]).encode()
    words = data.split(b" ")
    pieces = [word + b" " for word in words[:-1]] + [words[-1]]
    events: list[WorkerEvent] = [Output(start.run, piece, n + 1) for n, piece in enumerate(pieces) if piece]
    usage = Usage(prompt_tokens=5, new_tokens=len(pieces), output_bytes=len(data), wall_seconds=0.1)
    worker.say(*events, RunFinished(start.run, "complete", 0, None, usage))


def hang(worker: FakeWorker, start: StartRun) -> None:
    """Only begin."""


class FakeWorker:
    """One guest worker."""

    def __init__(self, number: int, script: Script = echo) -> None:
        self.number = number
        self.script = script
        self.starts: list[StartRun] = []
        self.cancels: list[CancelRun] = []
        self.messages: list[ClientMessage] = []
        self.credits: list[Credit] = []
        self.store_replies: list[StoreReply] = []
        self.shares: list[TenantShare] = []
        self.shut_down = asyncio.Event()
        self.closed = asyncio.Event()
        self.changed = asyncio.Event()
        self.finish_cancelled = True
        self._link: Link[Any] | None = None
        self._transport: asyncio.Transport | None = None

    async def connect(self, path: Path) -> None:
        loop = asyncio.get_running_loop()
        transport, self._link = await loop.create_unix_connection(
            lambda: Link[Any](GatewayToWorker, on_message=self._received, on_closed=lambda link: self.closed.set()),
            str(path),
        )
        self._transport = transport
        self.hello(self.number)

    def hello(self, number: int) -> None:
        assert self._link is not None
        self._link.send(WorkerHello(number, os.getpid()))

    def say(self, *events: WorkerEvent) -> None:
        """One message with these events."""
        assert self._link is not None
        self._link.send(WorkerEvents(list(events)))

    def finish(self, run: int, code: int = 0, *, outcome: str = "complete", error: ErrorInfo | None = None) -> None:
        self.say(RunFinished(run, outcome, code, error, Usage(new_tokens=1)))

    def write_raw(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def read(self, wanted: bool) -> None:
        """Read what the gateway sends, or leave it in the socket."""
        assert self._transport is not None
        (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    def die(self) -> None:
        """As if killed: the socket just ends."""
        assert self._transport is not None
        self._transport.abort()

    def _received(self, link: Link[Any], message: Any) -> None:
        match message:
            case StartRun():
                self.starts.append(message)
                self.script(self, message)
            case CancelRun():
                self.cancels.append(message)
                if self.finish_cancelled:
                    self.finish(message.run, outcome="cancelled")
            case ClientMessage():
                self.messages.append(message)
            case Credit():
                self.credits.append(message)
            case StoreReply():
                self.store_replies.append(message)
            case TenantShare():
                self.shares.append(message)
            case Ping():
                self.say()
            case Shutdown():
                self.shut_down.set()
        self.changed.set()

    async def until(self, condition: Callable[[FakeWorker], bool]) -> None:
        """Wait for messages until the condition holds."""
        while not condition(self):
            self.changed.clear()
            await self.changed.wait()


class FakeEngine:
    """Answers the gateway's messages.

    ``adapters`` are the messages that tell of adapters, in order, and ``asked`` the tenants whose states were
    asked for. ``states`` are the answers, which wait for ``gate``.
    """

    def __init__(self) -> None:
        self.lost_workers: list[int] = []
        self.quotas: dict[str, TenantQuota] = {}
        self.adapters: list[AdapterFile | AdapterGone] = []
        self.asked: list[str] = []
        self.states: dict[str, list[AdapterState]] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._links: list[Link[Any]] = []

    async def listen(self, path: Path) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: Link[Any](
                ToEngine, on_message=self._received, on_closed=self._links.remove, on_open=self._links.append
            ),
            sock=listen(str(path)),
        )

    def _received(self, link: Link[Any], message: Any) -> None:
        match message:
            case GatewayHello():
                link.send(EngineReady("tiny", 100, 16, 2048, 0.1))
            case StatsRequest():
                tenants = {"alice": TenantStats(1, 2, 3, 4, 5, 6, 7), "bob": TenantStats(6, 7, 8, 9, 10)}
                link.send(EngineStats(message.call, "tiny", 10, 20, 4, 3, 100, 50, 0, 0, 1.5, 100, 90, 10, 0, tenants))
            case TenantQuota():
                self.quotas[message.tenant] = message
            case AdapterFile() | AdapterGone():
                self.adapters.append(message)
            case AdaptersRequest():
                self.asked.append(message.tenant)
                task = asyncio.get_running_loop().create_task(self._answer(link, message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case WorkerLost():
                self.lost_workers.append(message.worker)

    async def _answer(self, link: Link[Any], request: AdaptersRequest) -> None:
        await self.gate.wait()
        link.send(AdapterStates(request.call, self.states.get(request.tenant, [])))

    def die(self) -> None:
        assert self._server is not None
        self._server.close()
        for link in list(self._links):
            link.close()


class FakeClient:
    """A raw client of the protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self._next = 1

    async def send(self, message: Any) -> None:
        await self.socket.send(message if isinstance(message, str | bytes) else json.dumps(message))

    async def receive(self) -> dict[str, Any]:
        message = json.loads(await self.socket.recv())
        assert isinstance(message, dict)
        return message

    async def start(self, function: str, **params: Any) -> int:
        """Send a call; gives its id."""
        call, self._next = self._next, self._next + 1
        await self.send({"id": call, "function": function, "params": params})
        return call

    async def call(self, function: str, **params: Any) -> dict[str, Any]:
        """A call that is alone on the connection: its last reply."""
        call = await self.start(function, **params)
        return (await self.replies(call))[-1]

    async def replies(self, call: int | str | None) -> list[dict[str, Any]]:
        """All replies of the only call in progress, the last one included."""
        replies: list[dict[str, Any]] = []
        while not replies or replies[-1]["status"] == "streaming":
            message = await self.receive()
            assert message["id"] == call, message
            replies.append(message)
        return replies

    async def error(self, function: str, **params: Any) -> dict[str, Any]:
        reply = await self.call(function, **params)
        assert reply["status"] == "error", reply
        error = reply["error"]
        assert isinstance(error, dict)
        return error

    async def data(self, function: str, **params: Any) -> dict[str, Any]:
        reply = await self.call(function, **params)
        assert reply["status"] == "complete", reply
        data = reply["data"]
        assert isinstance(data, dict)
        return data

    async def begin(self, name: str, content: bytes, **changes: Any) -> dict[str, Any]:
        sha256 = hashlib.sha256(content).hexdigest()
        return await self.data("modules.begin", **{"name": name, "size": len(content), "sha256": sha256, **changes})

    async def chunk(self, upload: int, offset: int, data: bytes) -> dict[str, Any]:
        await self.send(upload.to_bytes(8, "little") + offset.to_bytes(8, "little") + data)
        return await self.receive()

    async def push(self, name: str, content: bytes = WASM) -> dict[str, Any]:
        begun = await self.begin(name, content)
        if not begun["exists"]:
            ack = await self.chunk(begun["upload"], 0, content)
            assert ack == {"type": "upload_ack", "upload": begun["upload"], "received": len(content)}
        return await self.data("modules.commit", upload=begun["upload"])


@dataclass
class FakeHost:
    """Everything, started. ``keys`` are of the tenants admin, alice and bob."""

    home: Path
    sockets: Path
    gateway: Gateway
    registry: Registry
    server: ClientServer
    engine: FakeEngine
    compiler: FakeCompiler
    keys: dict[str, str]
    key_ids: dict[str, str]
    workers: list[FakeWorker] = field(default_factory=list)

    @property
    def worker(self) -> FakeWorker:
        return self.workers[0]

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.server.port}"

    async def add_worker(self, number: int, script: Script = echo) -> FakeWorker:
        worker = FakeWorker(number, script)
        self.workers.append(worker)
        await worker.connect(self.sockets / "gateway")
        while number not in self.gateway.runs.workers:
            self.gateway.worker_joined.clear()
            await self.gateway.worker_joined.wait()
        return worker

    async def restart_engine(self, gate: asyncio.Event | None = None) -> None:
        """A new engine in place of one that has gone, as the supervisor does it; see :class:`FakeEngine`."""
        self.engine = FakeEngine()
        self.engine.gate = gate or self.engine.gate
        path = self.sockets / f"engine{secrets.token_hex(4)}"
        await self.engine.listen(path)
        client = EngineClient()
        await client.connect(str(path), os.getpid())
        await client.ready
        self.gateway.engine_ready(client)

    async def lose_engine(self) -> None:
        """The engine goes, and the gateway knows it."""
        engine = self.gateway.engine
        assert engine is not None
        self.engine.die()
        await engine.lost.wait()
        self.gateway.engine_lost()

    @contextlib.asynccontextmanager
    async def raw(self, **options: Any) -> AsyncIterator[FakeClient]:
        """A client that has not said who it is, unless ``additional_headers`` do."""
        async with connect(self.url, **{"compression": None, "max_size": None, **options}) as socket:
            yield FakeClient(socket)

    @contextlib.asynccontextmanager
    async def client(self, tenant: str = "alice", **options: Any) -> AsyncIterator[FakeClient]:
        """A client that has authenticated."""
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        async with self.raw(additional_headers=headers, **options) as client:
            assert (await client.receive())["type"] == "auth_success"
            assert (await client.receive())["status"] == "connected"
            yield client


@contextlib.asynccontextmanager
async def fake_host(
    home: Path,
    *,
    script: Script = echo,
    limits: GatewayLimits | None = None,
    workers: int = 1,
    defaults: Mapping[str, int] | None = None,
    model: str = "tiny",
    keys: Mapping[str, str] | None = None,
) -> AsyncIterator[FakeHost]:
    """A host on a free port of loopback, with ``defaults`` for all tenants' limits.

    ``home`` may hold an earlier one's registry; then ``keys`` are what that one gave.
    """
    # Unix socket paths are short: pytest's folders may be too deep for them.
    sockets = Path(tempfile.mkdtemp(prefix="realm-test-"))
    registry = await Registry.open(home)
    compiler = FakeCompiler()
    builtin = home / "builtin"
    builtin.mkdir(exist_ok=True)
    (builtin / "generate.wasm").write_bytes(WASM + b"generate")
    settings = ServeSettings(model="tiny", home=home, port=0, limits=limits or GatewayLimits(), defaults=defaults or {})
    gateway = Gateway(
        settings,
        registry,
        model=model,
        shape=SHAPE,
        compiler=compiler,
        builtin=builtin,
        models=lambda: [{"name": "tiny", "served": True, "context_length": 2048, "parameters": 1000}],
    )
    await gateway.open(sockets / "gateway")
    engine = FakeEngine()
    await engine.listen(sockets / "engine")
    client = EngineClient()
    await client.connect(str(sockets / "engine"), os.getpid())
    await client.ready
    gateway.engine_ready(client)
    server = ClientServer(gateway)
    await server.open(bind("127.0.0.1", 0))
    first = await registry.run(Database.ensure_admin)
    known = dict(keys or {})
    key_ids: dict[str, str] = {}
    if first is not None:
        known["admin"], key_ids["admin"] = first.key, first.id
        for tenant in ("alice", "bob"):
            await registry.run(functools.partial(Database.add_tenant, name=tenant))
            made = await registry.run(functools.partial(Database.add_key, tenant=tenant))
            known[tenant], key_ids[tenant] = made.key, made.id
    host = FakeHost(home, sockets, gateway, registry, server, engine, compiler, known, key_ids)
    try:
        for number in range(1, workers + 1):
            await host.add_worker(number, script)
        yield host
    finally:
        await server.close(grace=0.2)
        await gateway.close()
        assert gateway.engine is not None
        gateway.engine.close()
        for worker in host.workers:
            await worker.closed.wait()
        host.engine.die()
        await registry.close()
        await asyncio.sleep(0)
        shutil.rmtree(sockets)


def log_line(run: int, text: str, level: str = "info") -> Log:
    return Log(run, level, text)
