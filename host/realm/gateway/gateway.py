"""The gateway: what connections share. It joins clients, registry, workers and the engine.

Sockets of clients are :mod:`realm.gateway.server`'s; processes are :mod:`realm.serve`'s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from realm.channel import listen
from realm.errors import RealmError
from realm.gateway.adapters import SHARED, Adapters
from realm.gateway.artifacts import Artifacts, Compiled, Compiler
from realm.gateway.calls import GenerateSink, RunSink
from realm.gateway.functions import GENERATE, Functions
from realm.gateway.guest_store import GuestStore
from realm.gateway.invoking import internal_error
from realm.gateway.links import EngineClient, Link
from realm.gateway.quotas import RETRY_SECONDS, Quotas
from realm.gateway.recent import Recent
from realm.gateway.run import Run, Worker
from realm.gateway.runs import RunManager
from realm.messages import WorkerHello
from realm.models.config import ModelConfig
from realm.registry.blobs import hash_and_sync
from realm.registry.database import Database
from realm.registry.records import LogLine, ModuleRecord, RunRecord
from realm.registry.thread import Registry
from realm.run_messages import Shutdown, WorkerEvents, WorkerToGateway
from realm.settings import ServeSettings

if TYPE_CHECKING:
    from realm.gateway.connection import Connection

log = logging.getLogger("realm.gateway")

T = TypeVar("T")

_RUN_BLOCK = 4096
"""Run numbers reserved at a time: a start never waits for the disk."""
_PRUNE_EVERY = 1000
_MODELS_SECONDS = 1.0
"""Age of what ``models.list`` gives: it reads the disk, and any client may ask."""
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
        shape: ModelConfig,
        compiler: Compiler,
        builtin: Path,
        models: Callable[[], list[dict[str, Any]]],
    ) -> None:
        """``model`` is the served one's name, ``shape`` what its ``config.json`` says.

        ``builtin`` is the folder with ``generate.wasm``; ``models`` lists what ``models.list`` gives.
        """
        self.settings = settings
        self.limits = settings.limits
        self.registry = registry
        self.model = model
        self.models = Recent(models, _MODELS_SECONDS)
        self.began = time.monotonic()
        self.engine: EngineClient | None = None
        self.artifacts = Artifacts(
            settings.home / "cache", compiler, settings.limits.compiles, in_use=self._modules_in_use
        )
        self.connections: set[Connection] = set()
        self.on_worker_lost: Callable[[int], None] | None = None
        self.worker_joined = asyncio.Event()
        self.takes_runs = asyncio.Event()
        self.no_runs = asyncio.Event()
        self.no_connections = asyncio.Event()
        self.quotas = Quotas(settings.defaults)
        self.runs = RunManager(
            settings.limits,
            self.quotas,
            on_start=self._run_started,
            on_finish=self._run_finished,
            on_store=GuestStore(registry, self.quotas, settings.limits.store_value_bytes).request,
            on_damaged=self._artifact_damaged,
        )
        self.adapters = Adapters(
            registry,
            self.quotas,
            model=model,
            shape=shape,
            checks=settings.limits.checks,
            engine=lambda: self.engine,
        )
        self.functions = Functions(self)
        self._builtin = builtin / f"{GENERATE}.wasm"
        self._builtin_sha256: str | None = None
        self._modules: dict[tuple[str, str], str] = {}
        self._epoch: dict[str, int] = {}
        self._next_run = 1
        self._last_run = 0
        self._reserving = False
        self._finished_runs = 0
        self._draining = False
        self._links: dict[Link[Any], Worker | None] = {}
        self._worker_server: asyncio.Server | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self, worker_socket: Path) -> None:
        """Settle what a crash left, load the limits, and listen for workers on a Unix socket.

        Raises:
            RealmError: ``invalid_params`` for ``settings.defaults``.
        """
        defaults, chosen = await self.registry.run(lambda database: database.load_limits())
        self.quotas.set_defaults({**self.settings.defaults, **defaults})
        for tenant, values in chosen.items():
            self.quotas.set_tenant(tenant, values)
        lost = await self.registry.run(lambda database: database.recover())
        if lost:
            log.warning("%d runs were in progress when the host last ended", lost)
        await self.registry.run(lambda database: database.prune_runs(self.limits.runs_kept))
        await self.adapters.load()
        self._next_run = await self.registry.run(lambda database: database.reserve_runs(_RUN_BLOCK))
        self._last_run = self._next_run + _RUN_BLOCK - 1
        loop = asyncio.get_running_loop()
        self._worker_server = await loop.create_unix_server(
            lambda: Link[Any](
                WorkerToGateway,
                on_message=self._from_worker,
                on_closed=self._worker_closed,
                on_drained=lambda link: self.runs.pump(),
            ),
            sock=listen(str(worker_socket)),
        )

    async def close(self) -> None:
        """Tell the workers to end, and forget them."""
        if self._worker_server is not None:
            self._worker_server.close()
        if self._patience is not None:
            self._patience.cancel()
        for task in self._tasks:
            task.cancel()
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
        up = self.engine is not None and not self.engine.lost.is_set() and self.takes_runs.is_set()
        return "healthy" if up and self.runs.workers else "degraded"

    def check_model(self, name: str | None) -> None:
        """Whether a client that names a model means the served one. Raises RealmError ``model_not_found``."""
        if name is not None and name != self.model:
            raise RealmError(
                "model_not_found",
                f"this host serves {self.model!r}, not {name[:64]!r}",
                details={"available": [self.model]},
            )

    # --- runs -----------------------------------------------------------------------------------

    def start_run(
        self, tenant: str, module: str, compiled: Compiled, data: bytes, seed: int, sink: RunSink | GenerateSink
    ) -> Run:
        """Raises RealmError as :meth:`RunManager.start` does."""
        if self._next_run > self._last_run:
            raise RealmError("busy", "run numbers are being reserved", retry_after=RETRY_SECONDS)
        run = self.runs.start(
            number=self._next_run,
            tenant=tenant,
            module=module,
            sha256=compiled.sha256,
            artifact=str(compiled.artifact),
            artifact_sha256=compiled.artifact_sha256,
            data=data,
            seed=seed,
            sink=sink,
        )
        if run.worker is None and not self.runs.workers:
            self._watch_waiting(self.limits.worker_wait_seconds)
        self._next_run += 1
        if self._last_run - self._next_run < _RUN_BLOCK // 2 and not self._reserving:
            self._reserving = True
            future = self.registry.run(lambda database: database.reserve_runs(_RUN_BLOCK), urgent=True)
            future.add_done_callback(self._reserved)
        return run

    def _reserved(self, future: asyncio.Future[int]) -> None:
        self._reserving = False
        if not future.cancelled() and future.exception() is None:
            # Only this process reserves, so the block continues the one before.
            self._last_run = future.result() + _RUN_BLOCK - 1

    def _run_started(self, record: RunRecord) -> None:
        self.registry.post(lambda database: database.add_run(record), tenant=record.tenant)

    def _run_finished(self, record: RunRecord, lines: list[LogLine]) -> None:
        self.registry.post(lambda database: database.finish_run(record, lines), tenant=record.tenant)
        self._finished_runs += 1
        if self._draining and not self.runs.runs:
            self.no_runs.set()
        if self._finished_runs % _PRUNE_EVERY == 0:
            self.registry.post(lambda database: database.prune_runs(self.limits.runs_kept))

    def _watch_waiting(self, seconds: float | None) -> None:
        """End runs that wait for a worker in vain, in so many seconds."""
        if self._patience is None and seconds is not None:
            self._patience = asyncio.get_running_loop().call_later(max(seconds, 0.001), self._lose_patience)

    def _lose_patience(self) -> None:
        self._patience = None
        self._watch_waiting(self.runs.expire())

    def _artifact_damaged(self, run: Run, again: bool) -> None:
        log.error("a compiled module's file does not hold what was compiled (module %s); it is made anew", run.sha256)
        self.artifacts.forget(run.sha256, run.artifact_sha256)
        if again:
            self._spawn(self._start_again(run))

    async def _start_again(self, run: Run) -> None:
        try:
            compiled = await self._compiled(run.tenant, run.sha256)
        except Exception as cause:
            # Whatever it was, the run must end.
            error = cause if isinstance(cause, RealmError) else internal_error("making a module anew", cause)
            if run.number in self.runs.runs:
                self.runs.fail([run], error)
        else:
            self.runs.resume(run, str(compiled.artifact), compiled.artifact_sha256)
            if not self.runs.workers:
                self._watch_waiting(self.limits.worker_wait_seconds)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- limits ---------------------------------------------------------------------------------

    async def change_limits(self, tenant: str | None, changes: Mapping[str, int | None]) -> None:
        """Set (or with None unset) limits of a tenant, or of all; they count from now on, even if the caller leaves.

        Raises:
            RealmError: ``tenant_not_found``.
        """
        future = self.registry.run(lambda database: database.change_limits(tenant, changes))

        def changed(done: asyncio.Future[dict[str, int]]) -> None:
            if done.cancelled() or done.exception() is not None:
                return
            if tenant is None:
                self.quotas.set_defaults({**self.settings.defaults, **done.result()})
                self.runs.limits_changed(self.quotas.known)
            else:
                self.quotas.set_tenant(tenant, done.result())
                self.runs.limits_changed([tenant])
            self._send_quotas(tenant)

        future.add_done_callback(changed)
        await asyncio.shield(future)

    def _send_quotas(self, changed: str | None) -> None:
        """Tell the engine a tenant's limits, or (None) everybody's."""
        if self.engine is None:
            return
        if changed is not None:
            self.engine.quota(changed, self.quotas.limits(changed))
            return
        self.engine.quota("", self.quotas.limits(None))
        for tenant in self.quotas.chosen:
            self.engine.quota(tenant, self.quotas.limits(tenant))

    # --- modules --------------------------------------------------------------------------------

    def known_module(self, tenant: str, name: str) -> str | None:
        """The hash of a module, if it has been looked up before."""
        return self._builtin_sha256 if name == GENERATE else self._modules.get((tenant, name))

    async def prepare_module(self, tenant: str, name: str) -> Compiled:
        """A module as its name stands for it now, compiled anew where the cache has lost it.

        Raises:
            RealmError: ``module_not_found``, or what the compiler says.
        """
        if name == GENERATE:
            self._builtin_sha256 = await asyncio.to_thread(hash_and_sync, self._builtin)
            return await self._compiled(tenant, self._builtin_sha256)
        epoch = self._epoch.get(tenant, 0)
        record = await self.registry.run(lambda database: database.find_module(tenant, name), tenant=tenant)
        if self._epoch.get(tenant, 0) == epoch:
            self._modules[tenant, name] = record.sha256
        return await self._compiled(tenant, record.sha256)

    def _modules_in_use(self) -> set[str]:
        return {run.sha256 for run in self.runs.runs.values()}

    async def _compiled(self, tenant: str, sha256: str) -> Compiled:
        """Content of a tenant, or the host's own, compiled."""
        compiled = self.artifacts.known(sha256)
        if compiled is not None:
            return compiled
        if sha256 == self._builtin_sha256:
            return await self.artifacts.make(sha256, self._builtin, tenant, builtin=True)
        wasm = await self.registry.run(lambda database: database.borrow_content(tenant, sha256), tenant=tenant)
        try:
            return await self.artifacts.make(sha256, wasm, tenant)
        finally:
            wasm.unlink(missing_ok=True)

    async def commit_module(
        self, tenant: str, name: str, file: Path, sha256: str, size: int, imports: list[str]
    ) -> ModuleRecord:
        """Make ``file`` the module's next version. Raises RealmError ``limit_exceeded``."""
        limits = self.quotas.of(tenant).limits
        return await self._change(
            tenant,
            name,
            lambda database: database.commit_module(tenant, name, file, sha256, size, imports, limits=limits),
        )

    async def remove_module(self, tenant: str, name: str) -> None:
        """Raises RealmError ``module_not_found``."""
        await self._change(tenant, name, lambda database: database.remove_module(tenant, name))

    async def _change(self, tenant: str, name: str, work: Callable[[Database], T]) -> T:
        """Change a module in the registry, and forget what was known of it, even if the caller leaves."""
        future = self.registry.run(work, tenant=tenant)

        def changed(done: asyncio.Future[T]) -> None:
            self._epoch[tenant] = self._epoch.get(tenant, 0) + 1
            self._modules.pop((tenant, name), None)
            if not done.cancelled():
                done.exception()

        future.add_done_callback(changed)
        return await asyncio.shield(future)

    # --- workers and engine ---------------------------------------------------------------------

    def _from_worker(self, link: Link[Any], message: WorkerHello | WorkerEvents) -> None:
        worker = self._links.get(link)
        if isinstance(message, WorkerEvents):
            if worker is None:
                raise ValueError("events before the worker's hello")
            worker.heard += 1
            self.runs.events(worker, message.events)
        else:
            if worker is not None or message.worker in self.runs.workers:
                raise ValueError(f"a second hello, or one of worker {message.worker}, which is there already")
            self._links[link] = self.runs.add_worker(message.worker, link.send, link.unsent)
            self.worker_joined.set()

    def _worker_closed(self, link: Link[Any]) -> None:
        worker = self._links.pop(link, None)
        if worker is None:
            return
        self.runs.lose_worker(worker)
        if not self.runs.workers:
            self._watch_waiting(self.limits.worker_wait_seconds)
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
        self.takes_runs.clear()
        error = RealmError("engine_lost", "the engine ended and is being restarted", retry_after=5.0)
        self.runs.refuse(error)
        self.runs.fail(self.runs.runs.values(), error)

    def engine_ready(self, engine: EngineClient) -> None:
        """Runs may start again, as soon as the engine knows the adapters."""
        self.engine = engine
        self._send_quotas(None)
        if self.adapters.introduce(engine):
            self.takes_runs.clear()
            self.runs.refuse(RealmError("engine_lost", "the engine is being told of the adapters", retry_after=1.0))
            self._spawn(self._wait_until_informed(engine))
        else:
            self._take_runs()

    async def _wait_until_informed(self, engine: EngineClient) -> None:
        """Guests reach the engine over links of their own, so it must have read this one first."""
        try:
            await engine.adapters(SHARED)
        except RealmError as error:
            # Runs that need no adapter need not wait for it; those that do may be told that there is none.
            log.warning("the engine has not said that it knows the adapters (%s); runs are taken all the same", error)
        if self.engine is engine and not engine.lost.is_set() and not self._draining:
            self._take_runs()

    def _take_runs(self) -> None:
        self.takes_runs.set()
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
