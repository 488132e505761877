"""``realm serve``: the gateway, and the supervisor of engine and guest workers, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import realm.guests
from realm.errors import RealmError
from realm.gateway.artifacts import Compiled
from realm.gateway.functions import GENERATE
from realm.gateway.gateway import Gateway
from realm.gateway.server import ClientServer
from realm.models.config import ModelConfig
from realm.models.store import choose_model, list_models
from realm.registry.thread import Registry
from realm.settings import ServeSettings
from realm.supervisor import Supervisor
from realm.tls import check_exposure, server_context

log = logging.getLogger("realm.serve")

_DRAIN_SECONDS = 2.0


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


async def _compile(wasm: Path, cache: Path) -> Compiled:
    # Only compiling needs wasmtime; the gateway starts without it.
    from realm.guests.compiler import compile_module

    return await compile_module(wasm, cache)


@contextlib.asynccontextmanager
async def running(settings: ServeSettings) -> AsyncIterator[ServeInfo]:
    """A whole host while the context lasts; the end is graceful and takes some five seconds at most.

    Raises:
        RealmError: ``model_not_found``, ``model_invalid``, ``already_running``, ``tls_invalid``, ``address_in_use``,
            ``insecure_bind`` or ``engine_start``.
    """
    tls = server_context(settings.tls_cert, settings.tls_key)
    model = choose_model(settings.home, settings.model)
    sockets = Path(tempfile.mkdtemp(prefix="realm-"))
    try:
        with locked_home(settings.home):
            # Taken first, so that a port in use is known before a model is loaded for nothing.
            address = bind(settings.host, settings.port)
            try:
                check_exposure(address.getsockname()[0], tls=tls is not None, allow_plaintext=settings.allow_plaintext)
            except RealmError:
                address.close()
                raise
            registry = await Registry.open(settings.home)
            try:
                async with _hosting(settings, registry, model, sockets, address, tls) as info:
                    yield info
            finally:
                address.close()
                await registry.close()
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


@contextlib.asynccontextmanager
async def _hosting(
    settings: ServeSettings,
    registry: Registry,
    model: Path,
    sockets: Path,
    address: socket.socket,
    tls: ssl.SSLContext | None,
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
    shape = ModelConfig.load(model)
    gateway = Gateway(
        settings, registry, model=model.name, shape=shape, compiler=_compile, builtin=builtin, models=models
    )
    supervisor = Supervisor(settings, gateway, model, sockets)
    server = ClientServer(gateway)
    await gateway.open(supervisor.worker_socket)
    try:
        # Also shows at once whether the compiler works.
        await gateway.prepare_module("", GENERATE)
        await supervisor.start()
        await gateway.takes_runs.wait()
        await server.open(address, tls)
        key = await registry.run(lambda database: database.ensure_admin())
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"{'wss' if tls else 'ws'}://{host}:{server.port}"
        yield ServeInfo(url, settings.home, model.name, key.key if key else None)
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
