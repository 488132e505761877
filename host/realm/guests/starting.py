"""How runs begin: their module is found or loaded, and their fiber made."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from realm.errors import RealmError
from realm.guests import reports
from realm.guests.fibers import Code, Fiber, LinkedModule
from realm.guests.helper import Ticket
from realm.guests.hostcalls import HostLinkers, shared_linkers
from realm.guests.modules import Key, Modules, load_code
from realm.guests.run import GuestRun
from realm.guests.tenants import READY
from realm.run_messages import StartRun

if TYPE_CHECKING:
    from realm.guests.runtime import GuestRuntime

log = logging.getLogger("realm.guests")


def _key(start: StartRun) -> Key:
    return start.artifact, start.artifact_sha256


@dataclass(slots=True)
class _Load:
    """A module that the helper is to load.

    It is in the queue of every tenant that waits for it, and done when the first comes to it, so that
    nobody waits behind another tenant's work.

    Attributes:
        begun: the helper has come to it; only its thread sets this.
    """

    linkers: HostLinkers
    key: Key
    runs: list[GuestRun] = field(default_factory=list)
    tickets: dict[str, Ticket] = field(default_factory=dict)
    begun: bool = False

    def work(self) -> tuple[Code, int] | None:
        """What the helper does; None from the second time on."""
        if self.begun:
            return None
        self.begun = True
        return load_code(self.linkers, self.key)


class Starter:
    """Begins the runs of a runtime. A large module is loaded by the helper, once for all that wait for it."""

    def __init__(self, runtime: GuestRuntime) -> None:
        self._runtime = runtime
        self._modules = Modules(shared_linkers())
        self._loading: dict[Key, _Load] = {}

    def begin(self, run: GuestRun) -> None:
        """Put the guest among those that may run, now or once its module is loaded."""
        try:
            key = _key(run.start)
            module = self._modules.find(key)
            if module is not None:
                self._attach(run, module)
            elif key in self._loading:
                self._wait(run, self._loading[key])
            elif self._modules.is_small(key):
                code, size = load_code(self._modules.linkers, key)
                self._attach(run, self._modules.add(key, code, size))
            else:
                self._loading[key] = load = _Load(self._modules.linkers, key)
                self._wait(run, load)
        except Exception as error:
            self._fail_start(run, error)

    def _wait(self, run: GuestRun, load: _Load) -> None:
        load.runs.append(run)
        tenant = run.start.tenant
        if tenant not in load.tickets:
            load.tickets[tenant] = ticket = self._runtime.helper.submit(tenant, load.work)
            self._runtime.slices.jobs[ticket] = partial(self._loaded, load)

    def _attach(self, run: GuestRun, module: LinkedModule) -> None:
        limits = run.start.limits
        self._runtime.guard.admit(run)
        sizes = {"memory_bytes": limits.memory_bytes, "table_elements": limits.table_elements}
        run.attach(Fiber(module, run, fuel=limits.fuel, **sizes))
        self._runtime.schedule.push(run, READY)

    def _loaded(self, load: _Load, ticket: Ticket) -> None:
        """The helper has read a module: its runs may begin."""
        del self._loading[load.key]
        for other in load.tickets.values():
            if other is not ticket:
                self._runtime.helper.cancel(other)
                del self._runtime.slices.jobs[other]
        waiting = load.runs
        try:
            if ticket.error is not None:
                raise ticket.error
            module = self._modules.add(load.key, *ticket.value)
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
            load = self._loading.get(_key(run.start))
            if load is not None and run in load.runs:
                load.runs.remove(run)

    @property
    def loading(self) -> int:
        """Jobs for the helper's loading of modules: one for each module and each tenant that waits for it."""
        return sum(len(load.tickets) for load in self._loading.values())

    @property
    def waiting(self) -> set[GuestRun]:
        """Runs that wait for their module."""
        return {run for load in self._loading.values() for run in load.runs}

    def close(self) -> None:
        self._modules.close()
