"""The asynchronous client: one WebSocket, one task that reads it, any number of calls at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from ssl import SSLContext
from types import TracebackType
from typing import Any, TypeVar

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from realm_sdk.adapters import Adapters
from realm_sdk.calls import MAX_BUFFERED, Call
from realm_sdk.errors import ConnectionLost, ProtocolError, RealmError
from realm_sdk.events import (
    Generation,
    Health,
    Key,
    LogLine,
    Metadata,
    Model,
    Module,
    NewKey,
    Processes,
    RunLog,
    Tenant,
    TenantLimits,
)
from realm_sdk.protocol import Ack, Done, Failed, Item, NeedAuth, Opened, Protocol, ServerEvent, UploadFailed
from realm_sdk.reasons import closed, not_connected
from realm_sdk.runs import Run, TextStream
from realm_sdk.upload import Progress, Source, UploadState, open_source, store

MAX_FRAME = 64 << 20
"""Largest frame taken, in bytes: a run's whole output (16 MiB by default), escaped as JSON."""

T = TypeVar("T")


class _Connect(connect):
    """A connection that follows no redirect: the key goes to the server that the caller named, and to no other."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class _Modules(msgspec.Struct):
    modules: list[Module]


class _Models(msgspec.Struct):
    models: list[Model]


class _Tenants(msgspec.Struct):
    tenants: list[Tenant]


class _Keys(msgspec.Struct):
    keys: list[Key]


class _Cancelled(msgspec.Struct):
    cancelled: bool


class _Nothing(msgspec.Struct):
    pass


class Client:
    """A connection to a Realm server.

    ::

        async with Client("ws://127.0.0.1:8765", api_key) as client:
            async for piece in client.stream("Tell me about otters"):
                print(piece.text, end="")

    Calls run concurrently; any coroutine of the same event loop may use the client. When the connection is
    lost, every call in progress raises :class:`ConnectionLost`; the client does not reconnect by itself.

    Args:
        url: ``ws://host:port`` or ``wss://host:port``.
        api_key: decides the tenant.
        open_timeout: seconds for connecting and authentication together.
        wait_timeout: seconds that one answer may take, of calls that only look up or change something. Runs and
            generations wait as long as they take, unless their own ``wait_timeout`` says how long one message may take.
        ssl: for ``wss://``: whom to trust. The system's trust store when None (``SSL_CERT_FILE`` names another).
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
        self.url = url
        self._ssl = ssl
        self._protocol = Protocol(api_key)
        self._open_timeout = open_timeout
        self._wait = wait_timeout
        self._socket: ClientConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._lost: RealmError | None = None
        self._calls: dict[int, Call] = {}
        self._uploads: dict[int, UploadState] = {}
        self._posts: set[asyncio.Task[None]] = set()
        self._tenant = ""
        self._version = ""
        self._adapters = Adapters(self, wait_timeout)

    @property
    def adapters(self) -> Adapters:
        """The tenant's LoRA adapters, and those shared with it."""
        return self._adapters

    @property
    def tenant(self) -> str:
        """The tenant the key belongs to."""
        return self._tenant

    @property
    def server_version(self) -> str:
        """The server's version."""
        return self._version

    # --- opening and closing ---------------------------------------------------------------------

    async def __aenter__(self) -> Client:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect and authenticate.

        Raises:
            AuthenticationError: the key was refused; ``retry_after`` where too many keys were wrong.
            RateLimited: the key is good, but its tenant has too many connections.
            Unavailable: the server has no place for anybody.
            ConnectionLost: nobody answers at the URL, or not as a Realm server does.
        """
        if self._socket is not None:
            raise RuntimeError("this client was opened before: make a new one for a new connection")
        try:
            async with asyncio.timeout(self._open_timeout):
                # A context that is None must be left out: then the URL decides.
                tls: Any = {} if self._ssl is None else {"ssl": self._ssl}
                # Compression would cost more than it saves on small JSON frames; a proxy is taken only if named.
                self._socket = await _Connect(
                    self.url,
                    additional_headers=self._protocol.headers(),
                    compression=None,
                    proxy=None,
                    max_size=MAX_FRAME,
                    open_timeout=None,
                    close_timeout=5,
                    **tls,
                )
                await self._authenticate(self._socket)
        except TimeoutError:
            await self._drop()
            raise ConnectionLost("connect_failed", f"{self.url} did not answer in {self._open_timeout:g} s") from None
        except (OSError, InvalidHandshake, InvalidURI, ValueError) as error:
            raise not_connected(self.url, error) from error
        except BaseException:
            await self._drop()
            raise
        self._reader = asyncio.create_task(self._read(self._socket), name="realm-sdk reader")

    async def _authenticate(self, socket: ClientConnection) -> None:
        try:
            while True:
                event = self._protocol.receive(await socket.recv())
                if isinstance(event, NeedAuth):
                    await socket.send(event.frame)
                elif isinstance(event, Opened):
                    self._tenant, self._version = event.tenant, event.version
                    return
        except ConnectionClosed as error:
            raise closed(error) from error

    async def _drop(self) -> None:
        if self._socket is not None:
            await self._socket.close()

    async def close(self) -> None:
        """End the connection; the server cancels what still runs. Safe to call again."""
        for task in self._posts:
            task.cancel()
        self._lose(ConnectionLost("connection_lost", "this client was closed"))
        await self._drop()
        if self._reader is not None:
            await self._reader

    # --- the reader ------------------------------------------------------------------------------

    async def _read(self, socket: ClientConnection) -> None:
        try:
            while True:
                frame = await socket.recv()
                # Once the connection counts as lost, nobody waits for what is still on its way.
                if self._lost is not None:
                    continue
                event = self._protocol.receive(frame)
                if event is not None:
                    self._dispatch(event)
        except ConnectionClosed as error:
            self._lose(closed(error))
        except RealmError as error:
            self._lose(error)
            await socket.close(1002, error.code)
        except Exception as error:
            # Whatever it was, callers must hear of it rather than wait for ever.
            self._lose(ConnectionLost("connection_lost", f"the connection's reader failed: {error!r}"))
            await socket.close(1011)
            raise

    def _dispatch(self, event: ServerEvent) -> None:
        match event:
            case Item(ident, data):
                call = self._calls[ident]
                if not call.add(data):
                    message = f"{call.function}: {MAX_BUFFERED} bytes of messages wait to be read; it was cancelled"
                    self.abandon(call, RealmError("slow_consumer", message))
            case Done(ident):
                self._calls.pop(ident).finish(event)
            case Failed(ident, error):
                self._calls.pop(ident).finish(error)
            case Ack(upload, received):
                # An acknowledgement may still be under way when its upload was given up.
                if upload in self._uploads:
                    self._uploads[upload].ack(received)
            case UploadFailed(upload, error):
                if upload in self._uploads:
                    self._uploads[upload].fail(error)
            case _:
                raise ProtocolError("protocol_error", f"unexpected {type(event).__name__} after the opening")

    def _lose(self, error: RealmError) -> None:
        """The connection is over: everything that waits hears why."""
        if self._lost is None:
            self._lost = error
        for call in self._calls.values():
            call.finish(self._lost)
        for upload in self._uploads.values():
            upload.fail(self._lost)
        self._calls.clear()

    # --- calls: the parts that runs and uploads are made of ---------------------------------------

    def _need_open(self) -> ClientConnection:
        if self._lost is not None:
            raise self._lost
        if self._reader is None or self._socket is None:
            raise RuntimeError("the client is not open: use it with 'async with'")
        return self._socket

    async def send_frame(self, frame: str | bytes) -> None:
        """Send one frame; waits while the server does not read."""
        try:
            await self._need_open().send(frame)
        except ConnectionClosed as error:
            self._lose(closed(error))
            assert self._lost is not None
            raise self._lost from error

    def open_call(self, function: str) -> Call:
        """A call that is not sent yet."""
        self._need_open()
        return Call(-1, function)

    async def send_call(self, call: Call, params: dict[str, Any]) -> None:
        """Give ``call`` its id and send it."""
        call.ident, frame = self._protocol.call(call.function, params)
        self._calls[call.ident] = call
        await self.send_frame(frame)

    async def call(self, function: str, params: dict[str, Any], result: type[T]) -> T:
        """Any function of the protocol that streams nothing; its data as ``result``."""
        return await self.call_within(self._wait, function, params, result)

    async def call_within(self, wait: float | None, function: str, params: dict[str, Any], result: type[T]) -> T:
        """Like :meth:`call`, with its own time-out in seconds; None waits for ever."""
        call = self.open_call(function)
        await self.send_call(call, params)
        return _whole(await call.next(wait), function, result)

    def post(self, function: str, params: dict[str, Any]) -> None:
        """A call whose answer nobody waits for. Never blocks; nothing happens when the connection is lost."""
        if self._lost is not None or self._reader is None:
            return
        task = asyncio.create_task(self._post(function, params))
        self._posts.add(task)
        task.add_done_callback(self._posts.discard)

    async def _post(self, function: str, params: dict[str, Any]) -> None:
        # With the connection lost, the server ends what this would have ended.
        with contextlib.suppress(ConnectionLost):
            await self.send_call(self.open_call(function), params)

    def abandon(self, call: Call, error: RealmError | None = None) -> None:
        """Cancel a call whose messages nobody will read."""
        call.finish(error or RealmError("cancelled", f"{call.function} was cancelled by its caller"))
        # A call that was never sent, or has been answered, is none of the server's business.
        if call.ident in self._calls:
            self.post("cancel", {"id": call.ident})

    async def cancel_call(self, ident: int) -> bool:
        """Cancel a call of this connection that is still read."""
        return (await self.call("cancel", {"id": ident}, _Cancelled)).cancelled

    @contextlib.contextmanager
    def uploading(self, upload: int, state: UploadState) -> Iterator[None]:
        """Acknowledgements of ``upload`` go to ``state``."""
        self._uploads[upload] = state
        try:
            yield
        finally:
            del self._uploads[upload]

    # --- generation and runs ---------------------------------------------------------------------

    def run(
        self,
        module: str,
        input: Any = "",
        *,
        stream: bool = True,
        seed: int | None = None,
        wait_timeout: float | None = None,
    ) -> Run:
        """Run one of the tenant's own guests.

        Args:
            input: text, or anything that can be JSON (the guest gets its JSON text).
            stream: give output as it comes; without, all of it comes with :class:`Finished`.
            seed: makes the run repeatable.
            wait_timeout: seconds to wait for one message of the run (not for all of it); None waits for ever.
        """
        params = {"module": module, "input": input, "stream": stream}
        if seed is not None:
            params["seed"] = seed
        return Run(self, params, wait_timeout)

    async def generate(
        self, prompt: str | list[dict[str, str]], *, wait_timeout: float | None = None, **params: Any
    ) -> Generation:
        """Text from the model. Cancelling the waiting task cancels the generation.

        Args:
            prompt: a text (a user's message, where the model has a chat template), or messages
                (``[{"role": …, "content": …}]``).
            wait_timeout: seconds to wait; None waits as long as it takes.
            params: ``model``, ``adapter`` (the name of one; None is the model alone), ``max_tokens``,
                ``temperature``, ``top_p``, ``top_k``, ``min_p``, ``repetition_penalty``, ``seed``, ``stop``.
        """
        call = self.open_call("generate")
        try:
            await self.send_call(call, _generate_params(prompt, params, stream=False))
            message = await call.next(wait_timeout)
        finally:
            if not call.ended:
                self.abandon(call)
        return _whole(message, "generate", Generation)

    def stream(
        self, prompt: str | list[dict[str, str]], *, wait_timeout: float | None = None, **params: Any
    ) -> TextStream:
        """Like :meth:`generate`, piece by piece. ``wait_timeout`` is for one piece, not for all."""
        return TextStream(self, _generate_params(prompt, params, stream=True), wait_timeout)

    async def send(self, run: str, data: Any) -> None:
        """Give a run's guest a message."""
        await self.call("send", {"run": run, "data": data}, _Nothing)

    async def cancel(self, run: str) -> bool:
        """Cancel a run of this tenant by its id. True if it was still running."""
        return (await self.call("cancel", {"run": run}, _Cancelled)).cancelled

    async def ps(self, *, all: bool = False, limit: int = 50) -> Processes:
        """The tenant's runs; finished ones too with ``all``."""
        return await self.call("ps", {"all": all, "limit": limit}, Processes)

    async def logs(self, run: str) -> list[LogLine]:
        """What a run has logged."""
        return (await self.run_log(run)).lines

    async def run_log(self, run: str) -> RunLog:
        """What a run has logged, and the error that it ended with."""
        return await self.call("logs", {"run": run}, RunLog)

    # --- modules, models, the server --------------------------------------------------------------

    async def push(self, name: str, source: Source, progress: Progress | None = None) -> Module:
        """Store a module (a path, or its bytes) under ``name``.

        The server checks the hash, checks and compiles the module, and only then replaces the name. Content that
        this tenant has stored before is not sent again. ``progress(done, total)`` is called as bytes arrive.
        """
        with await asyncio.to_thread(open_source, source) as file:
            return await store(self, "modules", file, {"name": name}, Module, progress, self._wait)

    async def modules(self) -> list[Module]:
        """The tenant's modules."""
        return (await self.call("modules.list", {}, _Modules)).modules

    async def remove(self, name: str) -> None:
        """Remove a module."""
        await self.call("modules.remove", {"name": name}, _Nothing)

    async def models(self) -> list[Model]:
        """The server's models."""
        return (await self.call("models.list", {}, _Models)).models

    async def health(self) -> Health:
        """How the server is."""
        return await self.call("health", {}, Health)

    async def metadata(self) -> Metadata:
        """Every function of the server, with its parameters."""
        return await self.call("metadata", {}, Metadata)

    # --- administration ---------------------------------------------------------------------------

    async def add_tenant(self, name: str) -> str:
        """Make a tenant (admin key); its name."""
        return (await self.call("tenants.add", {"name": name}, Tenant)).name

    async def tenants(self) -> list[Tenant]:
        """All tenants (admin key)."""
        return (await self.call("tenants.list", {}, _Tenants)).tenants

    async def show_tenant(self, name: str | None = None) -> TenantLimits:
        """All limits of a tenant, with what it uses: one's own, or with an admin key anybody's.

        Without a name (admin key): what counts for tenants without values of their own.
        """
        return await self.call("tenants.show", {} if name is None else {"name": name}, TenantLimits)

    async def set_limits(self, name: str | None, limits: Mapping[str, int | None]) -> TenantLimits:
        """Set limits of a tenant, or (None) the default of all (admin key); None returns one to the default.

        They count at once. Gives all limits as :meth:`show_tenant` does.
        """
        params: dict[str, Any] = {"limits": dict(limits)}
        if name is not None:
            params["name"] = name
        return await self.call("tenants.set", params, TenantLimits)

    async def add_key(self, tenant: str) -> NewKey:
        """Make a key for a tenant (admin key). The key is shown this once."""
        return await self.call("keys.add", {"tenant": tenant}, NewKey)

    async def keys(self, tenant: str | None = None) -> list[Key]:
        """Keys of one or all tenants (admin key), without the keys themselves."""
        return (await self.call("keys.list", {} if tenant is None else {"tenant": tenant}, _Keys)).keys

    async def revoke_key(self, ident: str) -> None:
        """Revoke a key by its id (admin key)."""
        await self.call("keys.revoke", {"id": ident}, _Nothing)


def _generate_params(prompt: str | list[dict[str, str]], params: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    return {"prompt" if isinstance(prompt, str) else "messages": prompt, "stream": stream, **params}


def _whole(message: msgspec.Raw | Done, function: str, result: type[T]) -> T:
    """The data of a call that streams nothing."""
    if not isinstance(message, Done):
        raise ProtocolError("protocol_error", f"{function}: the server streamed what should come whole")
    if message.cancelled:
        raise RealmError("cancelled", f"{function} was cancelled")
    try:
        return msgspec.json.decode(message.data, type=result)
    except msgspec.MsgspecError as error:
        raise ProtocolError("protocol_error", f"{function}: the server's data cannot be read: {error}") from error
