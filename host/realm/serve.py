"""``realm serve``: the supervisor of engine and guest workers, in one process with the gateway.

Children get no environment but what they need, no descriptors but their own, and talk to the host
only over sockets in a folder of mode 0700. They end by themselves when the host's end of those
closes, so none outlives it, however it ends. Dead ones are replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import realm.guests
from realm.engine.environment import THREADS
from realm.errors import RealmError
from realm.gateway.artifacts import Compiled
from realm.gateway.functions import GENERATE
from realm.gateway.gateway import Gateway
from realm.gateway.links import EngineClient
from realm.gateway.server import ClientServer
from realm.models.store import choose_model, list_models
from realm.registry.thread import Registry
from realm.settings import ServeSettings

log = logging.getLogger("realm.serve")

ENVIRONMENT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
"""What children inherit: nothing in it is secret."""
ENGINE_MODULE = "realm.engine.server"
WORKER_MODULE = "realm.guests.worker"
_END_SECONDS = 5.0
_DRAIN_SECONDS = 2.0
_RESTART_FIRST, _RESTART_MOST = 0.1, 10.0
_HEALTHY_SECONDS = 30.0
"""An engine that lived this long is restarted at once; others after a wait that doubles."""
_EARLY_SECONDS = 2.0
_EARLY_DEATHS = 3
"""A start fails when this many workers ended within as many seconds: the next would do the same."""


@dataclass(frozen=True, slots=True)
class ServeInfo:
    """What ``realm serve`` tells when clients may come. ``admin_key`` is there at the first start only."""

    url: str
    home: Path
    model: str
    admin_key: str | None


@contextlib.contextmanager
def locked_home(home: Path) -> Iterator[None]:
    """Hold the home for this process alone.

    Raises:
        RealmError: ``already_running``.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(home / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RealmError("already_running", f"another realm serve uses {home}") from None
        yield
    finally:
        os.close(descriptor)


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket that has the address and does not listen yet.

    Raises:
        RealmError: ``address_in_use``.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise RealmError("address_in_use", f"cannot listen on {host}:{port}: {error}") from error
    return sock


class Child:
    """One child process whose output goes to stderr, line by line, with its name in front."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.began = time.monotonic()
        self._process = process
        self._output = asyncio.create_task(self._forward(), name=f"output of {name}")

    @classmethod
    async def spawn(cls, name: str, module: str, *arguments: str, environment: dict[str, str] | None = None) -> Child:
        """Start ``python -m module arguments``, with defaults for environment variables."""
        defaults = environment or {}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=defaults | {name: os.environ[name] for name in (*ENVIRONMENT, *defaults) if name in os.environ},
            # A Ctrl-C in the terminal is for the supervisor, which ends the children in order.
            start_new_session=True,
        )
        log.info("%s is process %d", name, process.pid)
        return cls(name, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The exit status, after all output has been passed on."""
        status = await self._process.wait()
        # A waiter that is cancelled must not take the output with it.
        await asyncio.shield(self._output)
        return status

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    async def end(self, seconds: float) -> None:
        """Wait for its end, and kill it after ``seconds``."""
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            log.warning("%s does not end; killing it", self.name)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await asyncio.wait([self._output], timeout=1.0)

    async def _forward(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                # A line longer than the reader's limit; what came of it is dropped with it.
                line = b"(a very long line was left out)\n"
            if not line:
                return
            sys.stderr.write(f"{self.name}: {line.decode(errors='replace').rstrip()}\n")
            sys.stderr.flush()


class Supervisor:
    """Keeps one engine and ``settings.workers`` workers alive for a gateway."""

    def __init__(self, settings: ServeSettings, gateway: Gateway, model: Path, sockets: Path) -> None:
        self._settings = settings
        self._gateway = gateway
        self._model = model
        self._sockets = sockets
        self._engine: Child | None = None
        self._workers: dict[int, Child] = {}
        self._client: EngineClient | None = None
        self._next_worker = 1
        self._early_deaths = 0
        self._generation = 0
        self._ready = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.worker_socket = sockets / "gateway"

    async def start(self) -> None:
        """Start everything; returns when runs can start.

        Raises:
            RealmError: ``engine_start`` if the engine or the workers do not come up.
        """
        client = await self._start_engine()
        self._tasks.append(asyncio.create_task(self._keep_engine(client), name="keep the engine"))
        await self._wait_for_workers()

    async def stop(self) -> None:
        """End all children within five seconds."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._gateway.close()
        if self._gateway.engine is not None:
            self._gateway.engine.close()
        children = [*self._workers.values(), *([self._engine] if self._engine else [])]
        if self._engine is not None and not self._ready.is_set():
            # It is loading its model and reads no sockets.
            self._engine.terminate()
        await asyncio.gather(*(child.end(_END_SECONDS) for child in children))

    # --- engine ---------------------------------------------------------------------------------

    async def _start_engine(self) -> EngineClient:
        settings = self._settings
        self._generation += 1
        self._ready.clear()
        path = self._sockets / f"engine{self._generation}"
        self._engine = child = await Child.spawn(
            "engine",
            ENGINE_MODULE,
            *("--socket", str(path), "--model", str(self._model), "--dtype", settings.dtype),
            *("--kv-pages", str(settings.kv_pages), "--token-budget", str(settings.token_budget)),
            *("--max-sequences", str(settings.max_sequences), "--threads", str(settings.threads)),
            environment=THREADS,
        )
        self._client = client = EngineClient()
        exited = asyncio.create_task(child.wait(), name="the engine's exit")
        try:
            async with asyncio.timeout(settings.ready_seconds):
                while not exited.done():
                    try:
                        await client.connect(str(path), os.getpid())
                        break
                    except (FileNotFoundError, ConnectionRefusedError):
                        await asyncio.sleep(0.02)
                for _ in range(settings.workers - len(self._workers)):
                    await self._start_worker(path)
                waiting: set[asyncio.Future[Any]] = {exited, client.ready}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            child.terminate()
            raise RealmError(
                "engine_start", f"the engine was not ready in {settings.ready_seconds:g} seconds"
            ) from None
        finally:
            if not exited.done():
                exited.cancel()
        if not client.ready.done() or client.ready.cancelled():
            raise RealmError("engine_start", "the engine ended while it started: its output above says why")
        ready = client.ready.result()
        log.info("the engine serves %s, %d KV pages of %d", ready.model, ready.pages, ready.page_size)
        self._gateway.engine_ready(client)
        self._ready.set()
        return client

    async def _keep_engine(self, client: EngineClient) -> None:
        """Replace the engine, and with it the workers, whenever it is lost."""
        wait = _RESTART_FIRST
        while True:
            await client.lost.wait()
            self._gateway.engine_lost()
            lived = time.monotonic() - self._engine.began if self._engine else 0.0
            log.error("the engine is lost after %.1f seconds; restarting it", lived)
            self._ready.clear()
            client.close()
            await self._end_generation()
            wait = _RESTART_FIRST if lived > _HEALTHY_SECONDS else min(wait * 2, _RESTART_MOST)
            while True:
                await asyncio.sleep(wait)
                try:
                    client = await self._start_engine()
                    break
                except RealmError as error:
                    log.error("%s", error)
                    await self._end_generation()
                    wait = min(wait * 2, _RESTART_MOST)

    async def _end_generation(self) -> None:
        """Workers end with their engine's socket; make sure of them, and of an engine that hangs."""
        children = [*self._workers.values(), *([self._engine] if self._engine else [])]
        self._workers.clear()
        self._engine = None
        for child in children:
            child.terminate()
        await asyncio.gather(*(child.end(_END_SECONDS) for child in children))

    # --- workers --------------------------------------------------------------------------------

    async def _start_worker(self, engine: Path) -> None:
        number = self._next_worker
        self._next_worker += 1
        child = await Child.spawn(
            f"worker {number}",
            WORKER_MODULE,
            *("--engine", str(engine), "--gateway", str(self.worker_socket)),
            *("--model", str(self._model), "--worker", str(number)),
        )
        self._workers[number] = child
        task = asyncio.create_task(self._keep_worker(number, child, engine), name=f"keep worker {number}")
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def _keep_worker(self, number: int, child: Child, engine: Path) -> None:
        """Replace one worker when it ends, unless its whole generation does."""
        status = await child.wait()
        lived = time.monotonic() - child.began
        # Long enough for the news of a lost engine to come first.
        await asyncio.sleep(_RESTART_FIRST if lived > _EARLY_SECONDS else _RESTART_FIRST * 5)
        if self._workers.get(number) is not child or self._client is None or self._client.lost.is_set():
            return
        del self._workers[number]
        log.error("worker %d ended with status %d after %.1f seconds; starting another", number, status, lived)
        if lived < _EARLY_SECONDS:
            self._early_deaths += 1
            self._gateway.worker_joined.set()
        await self._start_worker(engine)

    async def _wait_for_workers(self) -> None:
        deadline = time.monotonic() + 60.0
        while len(self._gateway.runs.workers) < self._settings.workers:
            if time.monotonic() > deadline or self._early_deaths >= _EARLY_DEATHS:
                raise RealmError("engine_start", "the guest workers did not come up: their output above says why")
            self._gateway.worker_joined.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gateway.worker_joined.wait(), 1.0)


async def _compile(wasm: Path, cache: Path) -> Compiled:
    # Only compiling needs wasmtime; the gateway starts without it.
    from realm.guests.compiler import compile_module

    return await compile_module(wasm, cache)


@contextlib.asynccontextmanager
async def running(settings: ServeSettings) -> AsyncIterator[ServeInfo]:
    """A whole host while the context lasts; the end is graceful and takes some five seconds at most.

    Raises:
        RealmError: ``model_not_found``, ``already_running``, ``address_in_use`` or ``engine_start``.
    """
    model = choose_model(settings.home, settings.model)
    sockets = Path(tempfile.mkdtemp(prefix="realm-"))
    try:
        with locked_home(settings.home):
            # Taken first, so that a port in use is known before a model is loaded for nothing.
            address = bind(settings.host, settings.port)
            registry = await Registry.open(settings.home)
            try:
                async with _hosting(settings, registry, model, sockets, address) as info:
                    yield info
            finally:
                address.close()
                await registry.close()
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


@contextlib.asynccontextmanager
async def _hosting(
    settings: ServeSettings, registry: Registry, model: Path, sockets: Path, address: socket.socket
) -> AsyncIterator[ServeInfo]:
    def models() -> list[dict[str, Any]]:
        return [
            {
                "name": entry.name,
                "served": entry.name == model.name,
                "context_length": entry.context_length,
                "parameters": entry.parameters,
            }
            for entry in list_models(settings.home)
        ]

    builtin = Path(str(realm.guests.__file__)).parent / "builtin"
    gateway = Gateway(settings, registry, model=model.name, compiler=_compile, builtin=builtin, models=models)
    supervisor = Supervisor(settings, gateway, model, sockets)
    server = ClientServer(gateway)
    await gateway.open(supervisor.worker_socket)
    try:
        # Also shows at once whether the compiler works.
        await gateway.prepare_module("", GENERATE)
        await supervisor.start()
        await server.open(address)
        key = await registry.run(lambda database: database.ensure_admin())
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        yield ServeInfo(f"ws://{host}:{server.port}", settings.home, model.name, key.key if key else None)
        gateway.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(gateway.no_runs.wait(), _DRAIN_SECONDS)
    finally:
        await server.close()
        await supervisor.stop()


async def serve(settings: ServeSettings, *, on_ready: Callable[[ServeInfo], None]) -> None:
    """Run a host until SIGTERM or SIGINT.

    Raises:
        RealmError: see :func:`running`.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    ready = False
    # SQLite gives the GIL up at every statement; with the default of 5 ms a busy loop would let the
    # registry's thread do 200 statements a second.
    sys.setswitchinterval(0.0005)

    async def host() -> None:
        async with running(settings) as info:
            nonlocal ready
            ready = True
            on_ready(info)
            await stop.wait()

    def end() -> None:
        stop.set()
        if not ready:
            # Still starting: there is nobody to drain.
            hosting.cancel()

    hosting = asyncio.create_task(host(), name="serve")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    try:
        await hosting
    except asyncio.CancelledError:
        if not stop.is_set():
            hosting.cancel()
            raise
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
