"""Adapters: what tenants' names stand for, and how the engine comes to know it.

The registry keeps them; :class:`AdapterBook` has the same in memory, for runs and lists, and knows what to
tell the engine. :class:`Adapters` joins the two: a change is told once it is on disk, in the order of the
changes, and a new engine is told everything before any run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from realm.adapters.peft import AdapterInfo, check_adapter, parse_config
from realm.errors import RealmError
from realm.gateway.links import EngineClient
from realm.gateway.quotas import Quotas
from realm.gateway.uploads import Upload, check_hash
from realm.messages import AdapterFile, AdapterGone, AdapterState
from realm.models.config import ModelConfig
from realm.registry.adapters import NAMES, not_found
from realm.registry.blobs import hash_and_sync
from realm.registry.database import Database
from realm.registry.records import AdapterContent, AdapterRecord
from realm.registry.thread import Registry

T = TypeVar("T")
SHARED = ""
"""The tenant that shared adapters are of, for the engine."""


class AdapterBook:
    """What names stand for. No I/O.

    The engine knows adapters of the served model only. A shared one is there under :data:`SHARED` and not under
    its owner, for whom it is found all the same, so that nothing is loaded twice.
    """

    def __init__(self, model: str, path: Callable[[str], Path]) -> None:
        """``model`` is the served one's name; ``path`` gives a content's file for its hash."""
        self._model = model
        self._path = path
        self._own: dict[str, dict[str, AdapterRecord]] = {}
        self._shared: dict[str, AdapterRecord] = {}

    def put(self, record: AdapterRecord) -> list[AdapterFile | AdapterGone]:
        """A name stands for this from now on. Gives what to tell the engine, in order."""
        own = self._own.setdefault(record.tenant, {})
        before, now = self.place(own.get(record.name)), self.place(record)
        own[record.name] = record
        changes: list[AdapterFile | AdapterGone] = []
        if now is not None:
            if now == SHARED:
                self._shared[record.name] = record
            changes.append(self._file(now, record))
        return changes + self._gone(before, now, record.name)

    def drop(self, tenant: str, name: str) -> list[AdapterFile | AdapterGone]:
        """A name stands for nothing any more; see :meth:`put`."""
        return self._gone(self.place(self._own.get(tenant, {}).pop(name, None)), None, name)

    def files(self) -> Iterator[AdapterFile]:
        """All that a new engine has to know."""
        for own in self._own.values():
            for record in own.values():
                place = self.place(record)
                if place is not None:
                    yield self._file(place, record)

    def place(self, record: AdapterRecord | None) -> str | None:
        """The tenant that the engine knows an adapter of; None if it does not know it."""
        if record is None or record.model != self._model:
            return None
        return SHARED if record.shared else record.tenant

    def owns(self, tenant: str, name: str) -> bool:
        """Whether the tenant has an adapter of that name itself."""
        return name in self._own.get(tenant, {})

    def visible(self, tenant: str) -> list[AdapterRecord]:
        """A tenant's own adapters, and the shared ones that none of its own hides."""
        own = self._own.get(tenant, {})
        shared = [record for name, record in self._shared.items() if self.place(own.get(name)) is None]
        return sorted([*own.values(), *shared], key=lambda record: record.name)

    def find(self, tenant: str, name: str) -> AdapterRecord:
        """What a tenant's name stands for: its own adapter, or else a shared one.

        One of its own that is for another model comes last.

        Raises:
            RealmError: ``adapter_not_found`` with the names that there are (the first ones of many).
        """
        own = self._own.get(tenant, {}).get(name)
        record = own if self.place(own) is not None else self._shared.get(name, own)
        if record is None:
            raise not_found(name, self._names(self.visible(tenant)))
        return record

    def check_usable(self, tenant: str, name: str) -> None:
        """Whether the tenant's sequences can have it. Raises RealmError ``adapter_not_found`` with those they can."""
        own = self._own.get(tenant, {}).get(name)
        if self.place(own) is not None or name in self._shared:
            return
        available = self._names(r for r in self.visible(tenant) if self.place(r) is not None)
        if own is None:
            raise not_found(name, available)
        text = f"the adapter {name!r} is for {own.model!r}, and this host serves {self._model!r}"
        raise RealmError("adapter_not_found", text, details={"available": available})

    @staticmethod
    def _names(records: Iterable[AdapterRecord]) -> list[str]:
        return list(dict.fromkeys(record.name for record in records))[:NAMES]

    def _file(self, place: str, record: AdapterRecord) -> AdapterFile:
        path = str(self._path(record.sha256))
        return AdapterFile(place, record.name, path, record.sha256, record.config, record.pinned)

    def _gone(self, before: str | None, now: str | None, name: str) -> list[AdapterFile | AdapterGone]:
        if before is None or before == now:
            return []
        if before == SHARED:
            del self._shared[name]
        return [AdapterGone(before, name)]


class Checks:
    """Work on what tenants send, in threads: a few at a time, and one of each tenant."""

    def __init__(self, at_once: int) -> None:
        self._gate = asyncio.Semaphore(at_once)
        self._turns: dict[str, asyncio.Lock] = {}

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What ``work`` gives or raises. If the caller leaves, work that has begun keeps its place until it ends."""
        turn = self._turns.setdefault(tenant, asyncio.Lock())
        await turn.acquire()
        try:
            await self._gate.acquire()
        except BaseException:
            turn.release()
            raise
        working = asyncio.ensure_future(asyncio.to_thread(work))

        def done(future: asyncio.Future[T]) -> None:
            self._gate.release()
            turn.release()
            # Looked at here, so that a failure whose caller has left is not reported as forgotten.
            if not future.cancelled():
                future.exception()

        working.add_done_callback(done)
        return await asyncio.shield(working)


class Adapters:
    """See the module's docstring. :meth:`load` comes first."""

    def __init__(
        self,
        registry: Registry,
        quotas: Quotas,
        *,
        model: str,
        shape: ModelConfig,
        checks: int,
        engine: Callable[[], EngineClient | None],
    ) -> None:
        """``model`` and ``shape`` are the served one's; ``engine`` gives the engine of the moment."""
        self.book = AdapterBook(model, registry.blobs.path)
        self._registry = registry
        self._quotas = quotas
        self._model = model
        self._shape = shape
        self._checks = Checks(checks)
        self._readings = Checks(checks)
        self._engine = engine

    async def load(self) -> None:
        """Read what the registry keeps."""
        for record in await self._registry.run(lambda database: database.adapters.all()):
            self.book.put(record)

    def introduce(self, engine: EngineClient) -> bool:
        """Tell a new engine of all adapters; whether there are any."""
        told = False
        for file in self.book.files():
            engine.tell(file)
            told = True
        return told

    # --- changes --------------------------------------------------------------------------------

    async def check_config(self, tenant: str, config: bytes) -> None:
        """Read an ``adapter_config.json``, in a thread: a hostile one takes some milliseconds.

        Raises:
            RealmError: ``adapter_invalid``; ``details`` has the ``field``.
        """
        await self._readings.run(tenant, partial(parse_config, config))

    async def check_stored(self, tenant: str, name: str, sha256: str, size: int) -> int | None:
        """Whether the tenant may store it; the size of the same content that it has stored already.

        Raises:
            RealmError: ``limit_exceeded``.
        """
        limits = self._quotas.of(tenant).limits
        return await self._registry.run(
            lambda database: database.adapters.check_stored(tenant, name, sha256, size, limits), tenant=tenant
        )

    async def commit(self, tenant: str, upload: Upload, file: Path | None) -> AdapterRecord:
        """Check an upload, and let its name stand for it; takes the file. None is content stored before.

        Raises:
            RealmError: ``upload_hash_mismatch``, ``adapter_invalid``, ``limit_exceeded``, or ``upload_not_found``
                if the content was removed meanwhile.
        """
        sha256, name = upload.sha256, upload.name
        held = file
        try:
            if held is None:
                held = await self._registry.run(
                    lambda database: database.adapters.borrow_content(tenant, sha256), tenant=tenant
                )
            found = held
            info = await self._checks.run(tenant, partial(_check, found, sha256, upload.config, self._shape))
            content = AdapterContent(
                sha256=sha256,
                size=upload.size,
                model=self._model,
                config=upload.config,
                rank=info.rank,
                alpha=info.alpha,
                targets=tuple(info.targets),
                parameters=info.parameters,
            )
            limits = self._quotas.of(tenant).limits
            return await self._change(
                tenant, lambda database: database.adapters.commit(tenant, name, found, content, limits=limits)
            )
        finally:
            if held is not None:
                held.unlink(missing_ok=True)

    async def pin(self, tenant: str, name: str, pinned: bool) -> AdapterRecord:
        """Raises RealmError ``adapter_not_found`` or ``limit_exceeded``; of a shared one ``forbidden``."""
        self._check_own(tenant, name)
        limits = self._quotas.of(tenant).limits
        return await self._change(tenant, lambda database: database.adapters.pin(tenant, name, pinned, limits=limits))

    async def share(self, tenant: str, name: str, shared: bool) -> AdapterRecord:
        """Raises RealmError ``adapter_not_found``. Who may do so is the caller's business."""
        return await self._change(tenant, lambda database: database.adapters.share(tenant, name, shared))

    async def remove(self, tenant: str, name: str) -> None:
        """Raises RealmError ``adapter_not_found``; of a shared one ``forbidden``."""
        self._check_own(tenant, name)
        future = self._registry.run(lambda database: database.adapters.remove(tenant, name), tenant=tenant)
        future.add_done_callback(lambda done: self._changed(done, lambda _: self.book.drop(tenant, name)))
        await asyncio.shield(future)

    def _check_own(self, tenant: str, name: str) -> None:
        if not self.book.owns(tenant, name):
            self.book.find(tenant, name)
            text = f"the adapter {name!r} is shared by the operator, who alone can change it; add your own of that name"
            raise RealmError("forbidden", text)

    async def _change(self, tenant: str, work: Callable[[Database], AdapterRecord]) -> AdapterRecord:
        future = self._registry.run(work, tenant=tenant)
        future.add_done_callback(lambda done: self._changed(done, self.book.put))
        return await asyncio.shield(future)

    def _changed(self, done: asyncio.Future[T], note: Callable[[T], list[AdapterFile | AdapterGone]]) -> None:
        """Something is on disk: note it, and tell the engine, even if the caller has left."""
        if done.cancelled() or done.exception() is not None:
            return
        engine = self._engine()
        for change in note(done.result()):
            if engine is not None:
                engine.tell(change)

    # --- what clients see -----------------------------------------------------------------------

    async def describe(self, tenant: str, records: Iterable[AdapterRecord]) -> list[dict[str, Any]]:
        """Adapters as a tenant sees them: with what the engine knows of each, if it is there.

        How many sequences of all tenants have a shared one, and how often it was loaded, is its owner's to know.
        """
        placed = [(record, self.book.place(record)) for record in records]
        states = await self._states({place for _, place in placed if place is not None})
        described: list[dict[str, Any]] = []
        for record, place in placed:
            own = record.tenant == tenant
            entry: dict[str, Any] = {
                "name": record.name,
                "model": record.model,
                "sha256": record.sha256,
                "size": record.size,
                "version": record.version,
                "created": record.created,
                "rank": record.rank,
                "alpha": record.alpha,
                "targets": record.targets,
                "parameters": record.parameters,
                "pinned": record.pinned,
                "shared": record.shared,
                "own": own,
            }
            if place in states:
                state = states[place].get(record.name) or AdapterState(record.name, "registered")
                entry["state"] = state.state
                if own:
                    entry |= {"sequences": state.sequences, "loads": state.loads}
                if state.error is not None:
                    entry["error"] = state.error
            described.append(entry)
        return described

    async def _states(self, places: Iterable[str]) -> Mapping[str | None, Mapping[str, AdapterState]]:
        engine = self._engine()
        if engine is None:
            return {}
        asked = list(places)
        try:
            answers = await asyncio.gather(*(engine.adapters(place) for place in asked))
        except RealmError:
            # While the engine restarts, what it would know is left out.
            return {}
        return dict(zip(asked, answers, strict=True))


def _check(file: Path, sha256: str, config: bytes, shape: ModelConfig) -> AdapterInfo:
    check_hash(hash_and_sync(file), sha256)
    return check_adapter(file, parse_config(config), shape)
