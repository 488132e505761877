"""Which sequence loses its pages when another needs some: preemption by recomputation."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from realm.engine.sequence import Sequence, Tenant


def by_age(sequence: Sequence) -> int:
    """Sorting key: older sequences first."""
    return sequence.arrival


class _Candidates:
    """A tenant's sequences with pages that are not idle, as they are when a plan first needs them.

    ``young`` are all of them, ``recent`` those that were served in the last step; oldest first.
    """

    def __init__(self, tenant: Tenant, step: int) -> None:
        self.recent: list[Sequence] = []
        for sequence in reversed(tenant.idle.values()):
            if sequence.last_step < step - 1:
                break
            self.recent.append(sequence)
        self.recent.sort(key=by_age)
        pending = [s for queue in (tenant.decodes, tenant.prompts) for s in queue.values() if s.pages]
        self.young = sorted(pending + self.recent, key=by_age)

    def drop(self, planned: set[int]) -> None:
        """Leave out, from the youngest on, what is in the plan by now or has lost its pages."""
        for sequences in (self.young, self.recent):
            while sequences and (not sequences[-1].pages or sequences[-1].id in planned):
                sequences.pop()


class Victims:
    """The choice of victims during one plan.

    A choice costs a moment for each tenant, however many sequences there are: forks of one page free
    nothing until the last of them is preempted, and a thousand of them must not make a step slow.
    """

    def __init__(self) -> None:
        self._step = 0
        self._candidates: dict[Tenant, _Candidates] = {}

    def begin(self, step: int) -> None:
        """A new plan, for step number ``step``."""
        self._step = step
        self._candidates.clear()

    def choose(self, sequence: Sequence, planned: set[int], tenants: Iterable[Tenant]) -> Sequence | None:
        """Who of these tenants loses its pages for ``sequence``: idle ones first, then younger pending
        ones, then any that was just served; each time of the tenant that holds most.

        A sequence served in the last step counts as pending: its guest is about to answer.
        """
        idle: Sequence | None = None
        for tenant in tenants:
            if (idle is None or tenant.used > idle.tenant.used) and (old := self._least_recent(tenant)) is not None:
                idle = old
        if idle is not None:
            return idle
        young: Sequence | None = None
        recent: Sequence | None = None
        for tenant in tenants:
            candidates = self._candidates.get(tenant)
            if candidates is None:
                candidates = self._candidates[tenant] = _Candidates(tenant, self._step)
            candidates.drop(planned)
            if candidates.young and candidates.young[-1].arrival > sequence.arrival:
                if young is None or tenant.used > young.tenant.used:
                    young = candidates.young[-1]
            elif candidates.recent and (recent is None or tenant.used > recent.tenant.used):
                recent = candidates.recent[-1]
        return young or recent

    def add(self, sequence: Sequence) -> None:
        """A sequence got no room, but may have taken pages of its prefix since its tenant was looked at."""
        candidates = self._candidates.get(sequence.tenant)
        if candidates is not None and sequence.pages:
            insort(candidates.young, sequence, key=by_age)

    def oldest(self, tenant: Tenant) -> Sequence | None:
        """The tenant's oldest pending sequence with pages, if the plan had to look for victims."""
        candidates = self._candidates.get(tenant)
        if candidates is None:
            return None
        return next((sequence for sequence in candidates.young if sequence.queued and sequence.pages), None)

    def _least_recent(self, tenant: Tenant) -> Sequence | None:
        """The tenant's idle sequence that was served longest ago, but not in the last step."""
        while tenant.idle:
            first = next(iter(tenant.idle.values()))
            if first.pages:
                return first if first.last_step < self._step - 1 else None
            del tenant.idle[first.id]
        return None
