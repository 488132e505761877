"""The same client without ``async``: an event loop in a thread of its own behind blocking methods."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from ssl import SSLContext
from types import TracebackType
from typing import Any, TypeVar

from realm_sdk.adapters import Adapters, Folder
from realm_sdk.client import Client
from realm_sdk.events import (
    Adapter,
    Event,
    Generation,
    Health,
    Key,
    LogLine,
    Metadata,
    Model,
    Module,
    NewKey,
    Piece,
    Processes,
    RunLog,
    Tenant,
    TenantLimits,
)
from realm_sdk.runs import Run, TextStream
from realm_sdk.upload import Progress, Source

T = TypeVar("T")


class _Loop:
    """An event loop that runs in a daemon thread until it is closed."""

    def __init__(self) -> None:
        self.closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="realm-sdk", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``. An interrupt (Ctrl-C) while waiting cancels it."""
        if self.closed:
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        self.closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


async def _next(iterator: AsyncIterator[T]) -> T | None:
    return await anext(iterator, None)


async def _close(iterator: AsyncIterator[Any]) -> None:
    aclose = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()


def _iterate(loop: _Loop, iterator: AsyncIterator[T]) -> Iterator[T]:
    try:
        while (item := loop.wait(_next(iterator))) is not None:
            yield item
    finally:
        # A client that was closed has taken its runs with it.
        if not loop.closed:
            loop.wait(_close(iterator))


class SyncRun:
    """A run, iterated by blocking. Leaving the loop cancels it. See :class:`realm_sdk.Run`."""

    def __init__(self, loop: _Loop, run: Run) -> None:
        self._loop = loop
        self._run = run

    @property
    def id(self) -> str | None:
        """The run's id, once it has started."""
        return self._run.id

    def __iter__(self) -> Iterator[Event]:
        return _iterate(self._loop, aiter(self._run))

    def __enter__(self) -> SyncRun:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.wait(self._run.__aexit__(kind, error, traceback))

    def start(self) -> SyncRun:
        """Wait until the run has started."""
        self._loop.wait(self._run.__aenter__())
        return self

    def text(self) -> str:
        """All text the guest emits, once it has ended."""
        return self._loop.wait(self._run.text())

    def send(self, data: Any) -> None:
        """Give the guest a message."""
        self._loop.wait(self._run.send(data))

    def cancel(self) -> bool:
        """Stop the run. True if it was still running."""
        return self._loop.wait(self._run.cancel())


class SyncTextStream:
    """Generated text, iterated by blocking. Leaving the loop cancels it."""

    def __init__(self, loop: _Loop, stream: TextStream) -> None:
        self._loop = loop
        self._stream = stream

    @property
    def result(self) -> Generation | None:
        """Counts and usage, once the stream has ended."""
        return self._stream.result

    def __iter__(self) -> Iterator[Piece]:
        return _iterate(self._loop, aiter(self._stream))

    def text(self) -> str:
        """All of the text, once it is complete."""
        return self._loop.wait(self._stream.text())

    def cancel(self) -> bool:
        """Stop the generation. True if it was still running."""
        return self._loop.wait(self._stream.cancel())


class SyncAdapters:
    """:class:`realm_sdk.Adapters` for code without ``async``."""

    def __init__(self, loop: _Loop, adapters: Adapters) -> None:
        self._loop = loop
        self._adapters = adapters

    def add(self, name: str, source: Folder, *, model: str | None = None, progress: Progress | None = None) -> Adapter:
        """See :meth:`realm_sdk.Adapters.add`. ``progress`` is called in the client's own thread."""
        return self._loop.wait(self._adapters.add(name, source, model=model, progress=progress))

    def list(self) -> list[Adapter]:
        """The tenant's adapters, and those shared with it."""
        return self._loop.wait(self._adapters.list())

    def show(self, name: str) -> Adapter:
        """One adapter."""
        return self._loop.wait(self._adapters.show(name))

    def pin(self, name: str) -> Adapter:
        """See :meth:`realm_sdk.Adapters.pin`."""
        return self._loop.wait(self._adapters.pin(name))

    def unpin(self, name: str) -> Adapter:
        """Let the engine unload it again when others need the room."""
        return self._loop.wait(self._adapters.unpin(name))

    def share(self, name: str) -> Adapter:
        """See :meth:`realm_sdk.Adapters.share`."""
        return self._loop.wait(self._adapters.share(name))

    def unshare(self, name: str) -> Adapter:
        """See :meth:`realm_sdk.Adapters.unshare`."""
        return self._loop.wait(self._adapters.unshare(name))

    def remove(self, name: str) -> None:
        """Remove one of the tenant's adapters."""
        self._loop.wait(self._adapters.remove(name))


class SyncClient:
    """:class:`realm_sdk.Client` for code without ``async``; methods block. Threads may share it.

    ::

        with SyncClient("ws://127.0.0.1:8765", api_key) as client:
            for piece in client.stream("Tell me about otters"):
                print(piece.text, end="")
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        *,
        open_timeout: float = 10.0,
        wait_timeout: float | None = 30.0,
        ssl: SSLContext | None = None,
    ) -> None:
        self._client = Client(url, api_key, open_timeout=open_timeout, wait_timeout=wait_timeout, ssl=ssl)
        self._thread: _Loop | None = None

    def __enter__(self) -> SyncClient:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connect and authenticate."""
        self._thread = _Loop()
        try:
            self._thread.wait(self._client.open())
        except BaseException:
            self._thread.close()
            self._thread = None
            raise

    def close(self) -> None:
        """End the connection; the server cancels what still runs. Safe to call again."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            try:
                thread.wait(self._client.close())
            finally:
                thread.close()

    @property
    def _loop(self) -> _Loop:
        if self._thread is None:
            raise RuntimeError("the client is not open: use it with 'with'")
        return self._thread

    @property
    def tenant(self) -> str:
        """The tenant the key belongs to."""
        return self._client.tenant

    @property
    def server_version(self) -> str:
        """The server's version."""
        return self._client.server_version

    @property
    def adapters(self) -> SyncAdapters:
        """The tenant's LoRA adapters, and those shared with it."""
        return SyncAdapters(self._loop, self._client.adapters)

    def run(
        self,
        module: str,
        input: Any = "",
        *,
        stream: bool = True,
        seed: int | None = None,
        wait_timeout: float | None = None,
    ) -> SyncRun:
        """See :meth:`realm_sdk.Client.run`."""
        return SyncRun(self._loop, self._client.run(module, input, stream=stream, seed=seed, wait_timeout=wait_timeout))

    def generate(
        self, prompt: str | list[dict[str, str]], *, wait_timeout: float | None = None, **params: Any
    ) -> Generation:
        """See :meth:`realm_sdk.Client.generate`."""
        return self._loop.wait(self._client.generate(prompt, wait_timeout=wait_timeout, **params))

    def stream(
        self, prompt: str | list[dict[str, str]], *, wait_timeout: float | None = None, **params: Any
    ) -> SyncTextStream:
        """See :meth:`realm_sdk.Client.stream`."""
        return SyncTextStream(self._loop, self._client.stream(prompt, wait_timeout=wait_timeout, **params))

    def send(self, run: str, data: Any) -> None:
        """Give a run's guest a message."""
        self._loop.wait(self._client.send(run, data))

    def cancel(self, run: str) -> bool:
        """Cancel a run of this tenant by its id. True if it was still running."""
        return self._loop.wait(self._client.cancel(run))

    def ps(self, *, all: bool = False, limit: int = 50) -> Processes:
        """The tenant's runs; finished ones too with ``all``."""
        return self._loop.wait(self._client.ps(all=all, limit=limit))

    def logs(self, run: str) -> list[LogLine]:
        """What a run has logged."""
        return self._loop.wait(self._client.logs(run))

    def run_log(self, run: str) -> RunLog:
        """What a run has logged, and the error that it ended with."""
        return self._loop.wait(self._client.run_log(run))

    def push(self, name: str, source: Source, progress: Progress | None = None) -> Module:
        """See :meth:`realm_sdk.Client.push`. ``progress`` is called in the client's own thread."""
        return self._loop.wait(self._client.push(name, source, progress))

    def modules(self) -> list[Module]:
        """The tenant's modules."""
        return self._loop.wait(self._client.modules())

    def remove(self, name: str) -> None:
        """Remove a module."""
        self._loop.wait(self._client.remove(name))

    def models(self) -> list[Model]:
        """The server's models."""
        return self._loop.wait(self._client.models())

    def health(self) -> Health:
        """How the server is."""
        return self._loop.wait(self._client.health())

    def metadata(self) -> Metadata:
        """Every function of the server, with its parameters."""
        return self._loop.wait(self._client.metadata())

    def add_tenant(self, name: str) -> str:
        """Make a tenant (admin key); its name."""
        return self._loop.wait(self._client.add_tenant(name))

    def tenants(self) -> list[Tenant]:
        """All tenants (admin key)."""
        return self._loop.wait(self._client.tenants())

    def show_tenant(self, name: str | None = None) -> TenantLimits:
        """See :meth:`realm_sdk.Client.show_tenant`."""
        return self._loop.wait(self._client.show_tenant(name))

    def set_limits(self, name: str | None, limits: Mapping[str, int | None]) -> TenantLimits:
        """See :meth:`realm_sdk.Client.set_limits`."""
        return self._loop.wait(self._client.set_limits(name, limits))

    def add_key(self, tenant: str) -> NewKey:
        """Make a key for a tenant (admin key). The key is shown this once."""
        return self._loop.wait(self._client.add_key(tenant))

    def keys(self, tenant: str | None = None) -> list[Key]:
        """Keys of one or all tenants (admin key), without the keys themselves."""
        return self._loop.wait(self._client.keys(tenant))

    def revoke_key(self, ident: str) -> None:
        """Revoke a key by its id (admin key)."""
        self._loop.wait(self._client.revoke_key(ident))
