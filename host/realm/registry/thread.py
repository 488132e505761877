"""The one thread that owns the database, and the asyncio side of it.

Operations are queued (:mod:`realm.registry.turns`), never awaited in the loop's own thread. Those that
wait share one transaction, hence one disk flush; each has its own savepoint, so that one that fails
leaves the others alone. An operation is answered only once its transaction is on disk, so a transaction
ends after a short time too, however many more wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from realm.errors import RealmError
from realm.registry.blobs import BlobStore
from realm.registry.database import Database
from realm.registry.turns import Turns

log = logging.getLogger("realm.registry")

T = TypeVar("T")
_GROUP = 256
"""Most operations of one transaction."""
_GROUP_SECONDS = 0.02
"""After so long a transaction takes no further operation."""


@dataclass(slots=True)
class _Operation:
    work: Callable[[Database], Any]
    future: asyncio.Future[Any] | None
    result: Any = None
    error: BaseException | None = None


class Registry:
    """The database and the blobs, for one event loop. Open with :meth:`open`, end with :meth:`close`."""

    def __init__(self, home: Path, loop: asyncio.AbstractEventLoop, clock: Callable[[], float]) -> None:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.blobs = BlobStore(home)
        self._database = Database(home / "registry.sqlite", self.blobs, clock=clock)
        self._loop = loop
        self._turns: Turns[_Operation] = Turns()
        self._thread = threading.Thread(target=self._main, name="realm-registry", daemon=True)
        self._thread.start()

    @classmethod
    async def open(cls, home: Path, *, clock: Callable[[], float] = time.time) -> Registry:
        """Open or create the registry below ``home`` (a folder of mode 0700)."""
        return cls(home, asyncio.get_running_loop(), clock)

    def run(
        self, work: Callable[[Database], T], *, tenant: str | None = None, urgent: bool = False
    ) -> asyncio.Future[T]:
        """Queue an operation; the future is done when its effect is on disk.

        Args:
            tenant: on whose behalf. Its operations keep their order, and it has its turn among the others.
                None is for the host itself: after all that was queued before, so nothing that a tenant
                causes often may use it.
            urgent: before all others; for what must not wait and is short.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        self._turns.put(_Operation(work, future), tenant, urgent=urgent)
        return future

    def post(self, work: Callable[[Database], object], *, tenant: str | None = None) -> None:
        """Queue an operation nobody waits for; a failure is logged. ``tenant`` as for :meth:`run`."""
        self._turns.put(_Operation(work, None), tenant)

    async def close(self) -> None:
        """Finish everything queued, then close the file."""
        self._turns.close()
        while self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    # --- the thread -----------------------------------------------------------------------------

    def _main(self) -> None:
        while (operation := self._turns.take(wait=True)) is not None:
            self._transact(operation)
        self._database.close()

    def _transact(self, first: _Operation) -> None:
        """Do this operation and others that wait, and answer them."""
        group = [first]
        end = time.monotonic() + _GROUP_SECONDS
        database = self._database
        connection = database.connection
        database.after_commit.clear()
        try:
            connection.execute("BEGIN")
            # It grows meanwhile: each next one is chosen when the one before is done.
            for operation in group:
                connection.execute("SAVEPOINT operation")
                mark = len(database.after_commit)
                try:
                    operation.result = operation.work(database)
                except Exception as error:
                    operation.error = error
                    del database.after_commit[mark:]
                    connection.execute("ROLLBACK TO operation")
                connection.execute("RELEASE operation")
                if len(group) < _GROUP and time.monotonic() < end:
                    following = self._turns.take(wait=False)
                    if following is not None:
                        group.append(following)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            # The disk is full or damaged: nothing of the group may be reported as done.
            log.exception("a registry transaction failed")
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for operation in group:
                operation.error = operation.error or error
        else:
            self._after_commit()
        for operation in group:
            failure = operation.error
            if failure is not None and (operation.future is None or not isinstance(failure, RealmError)):
                log.error("a registry operation failed", exc_info=failure)
        waited = [operation for operation in group if operation.future is not None]
        if waited:
            # A loop that is closed has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_settle, waited)

    def _after_commit(self) -> None:
        for action in self._database.after_commit:
            try:
                action()
            except (sqlite3.Error, OSError):
                # What could not be deleted now is swept at the next start.
                log.exception("clean-up after a registry transaction failed")


def _settle(operations: list[_Operation]) -> None:
    for operation in operations:
        future = operation.future
        if future is None or future.done():
            continue
        if operation.error is None:
            future.set_result(operation.result)
        elif isinstance(operation.error, RealmError):
            future.set_exception(operation.error)
        else:
            error = RealmError("internal", "the registry failed; the host's log has the cause")
            error.__cause__ = operation.error
            future.set_exception(error)
