"""How runs begin: their module is found or loaded, and their fiber made."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from realm.errors import RealmError
from realm.guests import reports
from realm.guests.fibers import Fiber, LinkedModule
from realm.guests.helper import Ticket
from realm.guests.hostcalls import shared_linkers
from realm.guests.modules import Key, Modules, load_code
from realm.guests.run import GuestRun
from realm.guests.tenants import READY
from realm.messages import StartRun

if TYPE_CHECKING:
    from realm.guests.runtime import GuestRuntime

log = logging.getLogger("realm.guests")


def _key(start: StartRun) -> Key:
    return start.artifact, start.artifact_sha256


class Starter:
    """Begins the runs of a runtime. A large module is loaded by the helper, once for all that wait for it."""

    def __init__(self, runtime: GuestRuntime) -> None:
        self._runtime = runtime
        self._modules = Modules(shared_linkers())
        self._loading: dict[Key, list[GuestRun]] = {}

    def begin(self, run: GuestRun) -> None:
        """Put the guest among those that may run, now or once its module is loaded."""
        try:
            key = _key(run.start)
            module = self._modules.find(key)
            if module is not None:
                self._attach(run, module)
            elif key in self._loading:
                self._loading[key].append(run)
            elif self._modules.is_small(key):
                code, size = load_code(self._modules.linkers, key)
                self._attach(run, self._modules.add(key, code, size))
            else:
                self._loading[key] = [run]
                ticket = self._runtime.helper.submit(run.start.tenant, partial(load_code, self._modules.linkers, key))
                self._runtime.slices.jobs[ticket] = partial(self._loaded, key)
        except Exception as error:
            self._fail_start(run, error)

    def _attach(self, run: GuestRun, module: LinkedModule) -> None:
        limits = run.start.limits
        sizes = {"memory_bytes": limits.memory_bytes, "table_elements": limits.table_elements}
        run.attach(Fiber(module, run, fuel=limits.fuel, **sizes))
        self._runtime.schedule.push(run, READY)

    def _loaded(self, key: Key, ticket: Ticket) -> None:
        """The helper has read a module: its runs may begin."""
        waiting = self._loading.pop(key, [])
        try:
            if ticket.error is not None:
                raise ticket.error
            module = self._modules.add(key, *ticket.value)
        except Exception as error:
            for run in waiting:
                self._fail_start(run, error)
            return
        for run in waiting:
            try:
                self._attach(run, module)
            except Exception as error:
                self._fail_start(run, error)

    def _fail_start(self, run: GuestRun, error: Exception) -> None:
        if isinstance(error, RealmError):
            log.error("run %d: %s", run.start.run, error)
            self._runtime.fail(run, reports.stopped(error))
        else:
            self._runtime.fail_internal(run, "the compiled module cannot be loaded", error)

    def forget(self, run: GuestRun) -> None:
        """The run has ended. Its module goes on being loaded: it will be wanted again."""
        if run.fiber is None:
            waiting = self._loading.get(_key(run.start))
            if waiting and run in waiting:
                waiting.remove(run)

    @property
    def loading(self) -> int:
        """Modules that the helper is loading."""
        return len(self._loading)

    @property
    def waiting(self) -> set[GuestRun]:
        """Runs that wait for their module."""
        return {run for runs in self._loading.values() for run in runs}

    def close(self) -> None:
        self._modules.close()
