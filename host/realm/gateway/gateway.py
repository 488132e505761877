"""The gateway: what connections share. It joins clients, registry, workers and the engine.

Sockets of clients are :mod:`realm.gateway.server`'s; processes are :mod:`realm.serve`'s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from realm.channel import listen
from realm.errors import RealmError
from realm.gateway.artifacts import Artifacts, Compiler
from realm.gateway.calls import GenerateSink, RunSink
from realm.gateway.functions import GENERATE, Functions
from realm.gateway.links import EngineClient, Link
from realm.gateway.runs import RETRY_SECONDS, Run, RunManager, Worker
from realm.guests.abi import ErrorCode
from realm.messages import Shutdown, StoreGet, StoreReply, StoreSet, WorkerEvents, WorkerHello, WorkerToGateway
from realm.registry.blobs import hash_and_sync
from realm.registry.database import Database
from realm.registry.records import LogLine, ModuleRecord, RunRecord
from realm.registry.thread import Registry
from realm.settings import ServeSettings

if TYPE_CHECKING:
    from realm.gateway.server import Connection

log = logging.getLogger("realm.gateway")

T = TypeVar("T")

_RUN_BLOCK = 4096
"""Run numbers reserved at a time: a start never waits for the disk."""
_PRUNE_EVERY = 1000
_ENGINE_GRACE = 0.02
"""Workers end when the engine does; this long (s) the blame for a lost worker waits for that news."""


class Gateway:
    """Create, then :meth:`open`; :meth:`close` ends runs and forgets everything but the registry."""

    def __init__(
        self,
        settings: ServeSettings,
        registry: Registry,
        *,
        model: str,
        compiler: Compiler,
        builtin: Path,
        models: Callable[[], list[dict[str, Any]]],
    ) -> None:
        """``builtin`` is the folder with ``generate.wasm``; ``models`` lists what ``models.list`` gives."""
        self.settings = settings
        self.limits = settings.limits
        self.registry = registry
        self.model = model
        self.list_models = models
        self.began = time.monotonic()
        self.engine: EngineClient | None = None
        self.artifacts = Artifacts(settings.home / "cache", compiler, settings.limits.compiles)
        self.connections: set[Connection] = set()
        self.on_worker_lost: Callable[[int], None] | None = None
        self.worker_joined = asyncio.Event()
        self.no_runs = asyncio.Event()
        self.no_connections = asyncio.Event()
        self.runs = RunManager(
            settings.limits, on_start=self._run_started, on_finish=self._run_finished, on_store=self._store
        )
        self.functions = Functions(self)
        self._builtin = builtin / f"{GENERATE}.wasm"
        self._builtin_sha256: str | None = None
        self._modules: dict[tuple[str, str], str] = {}
        self._epoch: dict[tuple[str, str], int] = {}
        self._next_run = 1
        self._last_run = 0
        self._reserving = False
        self._finished_runs = 0
        self._draining = False
        self._links: dict[Link[Any], Worker | None] = {}
        self._worker_server: asyncio.Server | None = None

    async def open(self, worker_socket: Path) -> None:
        """Settle what a crash left, and listen for workers on a Unix socket."""
        lost = await self.registry.run(lambda database: database.recover())
        if lost:
            log.warning("%d runs were in progress when the host last ended", lost)
        await self.registry.run(lambda database: database.prune_runs(self.limits.runs_kept))
        self._next_run = await self.registry.run(lambda database: database.reserve_runs(_RUN_BLOCK))
        self._last_run = self._next_run + _RUN_BLOCK - 1
        loop = asyncio.get_running_loop()
        self._worker_server = await loop.create_unix_server(
            lambda: Link[Any](WorkerToGateway, on_message=self._from_worker, on_closed=self._worker_closed),
            sock=listen(str(worker_socket)),
        )

    async def close(self) -> None:
        """Tell the workers to end, and forget them."""
        if self._worker_server is not None:
            self._worker_server.close()
        for link in list(self._links):
            link.send(Shutdown())
            link.close()
        await self.artifacts.close()
        # No start may follow the release of the numbers.
        self.runs.refuse(RealmError("shutting_down", "the host is shutting down", retry_after=5.0))
        next_run = self._next_run
        if self._last_run:
            await self.registry.run(lambda database: database.release_runs(next_run))

    @property
    def status(self) -> str:
        """``healthy``, or ``degraded`` while the engine or all workers are being restarted."""
        up = self.engine is not None and not self.engine.lost.is_set() and self.engine.ready.done()
        return "healthy" if up and self.runs.workers else "degraded"

    # --- runs -----------------------------------------------------------------------------------

    def start_run(
        self,
        tenant: str,
        module: str,
        sha256: str,
        artifact: Path,
        data: bytes,
        seed: int,
        sink: RunSink | GenerateSink,
    ) -> Run:
        """Raises RealmError as :meth:`RunManager.start` does."""
        if self._next_run > self._last_run:
            raise RealmError("busy", "run numbers are being reserved", retry_after=RETRY_SECONDS)
        run = self.runs.start(
            number=self._next_run,
            tenant=tenant,
            module=module,
            sha256=sha256,
            artifact=str(artifact),
            data=data,
            seed=seed,
            limits=self.settings.run,
            sink=sink,
        )
        self._next_run += 1
        if self._last_run - self._next_run < _RUN_BLOCK // 2 and not self._reserving:
            self._reserving = True
            self.registry.run(lambda database: database.reserve_runs(_RUN_BLOCK)).add_done_callback(self._reserved)
        return run

    def _reserved(self, future: asyncio.Future[int]) -> None:
        self._reserving = False
        if not future.cancelled() and future.exception() is None:
            # Only this process reserves, so the block continues the one before.
            self._last_run = future.result() + _RUN_BLOCK - 1

    def _run_started(self, record: RunRecord) -> None:
        self.registry.post(lambda database: database.add_run(record))

    def _run_finished(self, record: RunRecord, lines: list[LogLine]) -> None:
        self.registry.post(lambda database: database.finish_run(record, lines))
        self._finished_runs += 1
        if self._draining and not self.runs.runs:
            self.no_runs.set()
        if self._finished_runs % _PRUNE_EVERY == 0:
            self.registry.post(lambda database: database.prune_runs(self.limits.runs_kept))

    # --- modules --------------------------------------------------------------------------------

    def known_module(self, tenant: str, name: str) -> str | None:
        """The hash of a module, if it has been looked up before."""
        return self._builtin_sha256 if name == GENERATE else self._modules.get((tenant, name))

    async def prepare_module(self, tenant: str, name: str) -> tuple[str, Path]:
        """The hash and the artifact of a module, compiled anew where the cache has lost it.

        Raises:
            RealmError: ``module_not_found``, or what the compiler says.
        """
        if name == GENERATE:
            sha256 = await asyncio.to_thread(hash_and_sync, self._builtin)
            self._builtin_sha256 = sha256
            return sha256, (await self.artifacts.make(sha256, self._builtin)).artifact
        epoch = self._epoch.get((tenant, name), 0)
        record = await self.registry.run(lambda database: database.find_module(tenant, name))
        if self._epoch.get((tenant, name), 0) == epoch:
            self._modules[tenant, name] = record.sha256
        artifact = self.artifacts.known(record.sha256)
        if artifact is None:
            wasm = await self.registry.run(lambda database: database.borrow_content(tenant, record.sha256))
            try:
                artifact = (await self.artifacts.make(record.sha256, wasm)).artifact
            finally:
                wasm.unlink(missing_ok=True)
        return record.sha256, artifact

    async def commit_module(
        self, tenant: str, name: str, file: Path, sha256: str, size: int, imports: list[str]
    ) -> ModuleRecord:
        """Make ``file`` the module's next version."""
        return await self._change(
            tenant, name, lambda database: database.commit_module(tenant, name, file, sha256, size, imports)
        )

    async def remove_module(self, tenant: str, name: str) -> None:
        """Raises RealmError ``module_not_found``."""
        await self._change(tenant, name, lambda database: database.remove_module(tenant, name))

    async def _change(self, tenant: str, name: str, work: Callable[[Database], T]) -> T:
        """Change a module in the registry, and forget what was known of it, even if the caller leaves."""
        future = self.registry.run(work)

        def changed(done: asyncio.Future[T]) -> None:
            self._epoch[tenant, name] = self._epoch.get((tenant, name), 0) + 1
            self._modules.pop((tenant, name), None)
            if not done.cancelled():
                done.exception()

        future.add_done_callback(changed)
        return await asyncio.shield(future)

    # --- the guests' store ----------------------------------------------------------------------

    def _store(self, worker: Worker, tenant: str, request: StoreGet | StoreSet) -> None:
        limits = self.limits
        if isinstance(request, StoreSet):
            key, value = request.key, request.value
            if len(value) > limits.store_value_bytes:
                message = f"a value of {len(value)} bytes is over {limits.store_value_bytes}"
                worker.send(StoreReply(request.call, ErrorCode.LIMIT, message=message))
                return
            future: asyncio.Future[Any] = self.registry.run(
                lambda database: database.store_set(tenant, key, value, tenant_bytes=limits.store_tenant_bytes)
            )
        else:
            name = request.key
            future = self.registry.run(lambda database: database.store_get(tenant, name))

        def answer(done: asyncio.Future[Any]) -> None:
            if done.cancelled():
                return
            if (error := done.exception()) is not None:
                reply = StoreReply(request.call, ErrorCode.INTERNAL, message=str(error))
            elif isinstance(request, StoreGet):
                value = done.result()
                reply = StoreReply(request.call, 0 if value is not None else ErrorCode.NOT_FOUND, value)
            elif done.result():
                reply = StoreReply(request.call, 0)
            else:
                message = f"the tenant's store is full: {limits.store_tenant_bytes} bytes"
                reply = StoreReply(request.call, ErrorCode.LIMIT, message=message)
            worker.send(reply)

        future.add_done_callback(answer)

    # --- workers and engine ---------------------------------------------------------------------

    def _from_worker(self, link: Link[Any], message: WorkerHello | WorkerEvents) -> None:
        worker = self._links.get(link)
        if isinstance(message, WorkerEvents):
            if worker is None:
                raise ValueError("events before the worker's hello")
            self.runs.events(worker, message.events)
        else:
            self._links[link] = self.runs.add_worker(message.worker, link.send)
            self.worker_joined.set()

    def _worker_closed(self, link: Link[Any]) -> None:
        worker = self._links.pop(link, None)
        if worker is None:
            return
        self.runs.lose_worker(worker)
        asyncio.get_running_loop().call_later(_ENGINE_GRACE, self._bury, worker)
        if self.engine is not None:
            self.engine.worker_lost(worker.number)
        if self.on_worker_lost is not None:
            self.on_worker_lost(worker.number)

    def _bury(self, worker: Worker) -> None:
        error = RealmError(
            "worker_lost", "the process that ran this guest ended; other runs go on", retry_after=RETRY_SECONDS
        )
        self.runs.fail(worker.runs.values(), error)

    def engine_lost(self) -> None:
        """The engine is gone: nothing in progress can go on."""
        error = RealmError("engine_lost", "the engine ended and is being restarted", retry_after=5.0)
        self.runs.refuse(error)
        self.runs.fail(self.runs.runs.values(), error)

    def engine_ready(self, engine: EngineClient) -> None:
        """Runs may start again."""
        self.engine = engine
        self.runs.refuse(None)

    def drain(self) -> None:
        """Start nothing more; cancel what runs. ``no_runs`` is set when all have ended."""
        self.runs.refuse(RealmError("shutting_down", "the host is shutting down", retry_after=5.0))
        for run in list(self.runs.runs.values()):
            self.runs.cancel(run, "the host is shutting down")
        self._draining = True
        if not self.runs.runs:
            self.no_runs.set()

    async def engine_data(self, scope: str | None) -> dict[str, Any]:
        """The engine's counters; of tenants, only ``scope``'s (None: all)."""
        try:
            if self.engine is None:
                raise RealmError("engine_lost", "the engine has not started yet")
            stats = await self.engine.stats()
        except RealmError as error:
            return {"available": False, "reason": error.message}
        data = {"available": True, **msgspec.structs.asdict(stats)}
        del data["call"]
        data["tenants"] = {
            tenant: msgspec.structs.asdict(used) for tenant, used in stats.tenants.items() if scope in (None, tenant)
        }
        return data

    # --- connections ----------------------------------------------------------------------------

    def drop_key(self, key_id: str) -> None:
        """A key was revoked: its connections end."""
        for connection in list(self.connections):
            connection.revoked(key_id)
