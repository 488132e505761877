"""The guest workers that are up: which has room, and how each tenant's fuel is shared among them. No I/O.

A tenant's ``fuel_per_second`` counts over all workers, each of which sees only its own runs. So it
is divided by the number of workers that have runs of the tenant, and they are told whenever that
number or the limit changes, before the run that changes it starts.
"""

from __future__ import annotations

from realm.gateway.quotas import Quotas
from realm.gateway.run import Run, Worker
from realm.run_messages import TenantShare
from realm.settings import GatewayLimits


class Workers:
    """See the module's docstring."""

    def __init__(self, limits: GatewayLimits, quotas: Quotas) -> None:
        self.up: dict[int, Worker] = {}
        self._limits = limits
        self._quotas = quotas
        self._having: dict[str, dict[Worker, None]] = {}

    def add(self, worker: Worker) -> None:
        self.up[worker.number] = worker

    def lose(self, worker: Worker) -> None:
        """It gets no more runs, and its part of the tenants' fuel goes to the others."""
        if self.up.get(worker.number) is not worker:
            return
        del self.up[worker.number]
        for tenant in worker.tenants:
            self._left(worker, tenant)

    def choose(self) -> Worker | None:
        """The least loaded worker that has room."""
        best: Worker | None = None
        for worker in self.up.values():
            if len(worker.runs) < (len(best.runs) if best else self._limits.runs_per_worker) and not self.behind(
                worker
            ):
                best = worker
        return best

    def behind(self, worker: Worker) -> bool:
        """Whether a worker does not take what it is sent."""
        return worker.unsent() > self._limits.link_bytes

    @property
    def all_behind(self) -> bool:
        """Whether workers are up and none of them takes what it is sent."""
        return bool(self.up) and all(self.behind(worker) for worker in self.up.values())

    def attach(self, worker: Worker, run: Run) -> None:
        """The worker gets a run: the next message about it may be its start."""
        worker.runs[run.number] = run
        count = worker.tenants.get(run.tenant, 0)
        worker.tenants[run.tenant] = count + 1
        if not count:
            self._having.setdefault(run.tenant, {})[worker] = None
            self.share(run.tenant)

    def detach(self, worker: Worker, run: Run) -> None:
        """A run is over. The worker may be lost."""
        del worker.runs[run.number]
        count = worker.tenants[run.tenant] - 1
        if count:
            worker.tenants[run.tenant] = count
        else:
            del worker.tenants[run.tenant]
            self._left(worker, run.tenant)

    def share(self, tenant: str) -> None:
        """Tell the workers that have runs of a tenant how much fuel each may give."""
        having = self._having.get(tenant)
        if having:
            message = TenantShare(tenant, self._quotas.of(tenant).limits.fuel_per_second / len(having))
            for worker in having:
                worker.send(message)

    def _left(self, worker: Worker, tenant: str) -> None:
        having = self._having.get(tenant)
        if having is None or worker not in having:
            return
        del having[worker]
        if having:
            self.share(tenant)
        else:
            del self._having[tenant]
