"""Which worker has which sequences: the check of every number that a worker sends.

A worker is trusted with its own runs and no further: it runs tenants' code, and one that was taken
over may send anything. It reaches only sequences whose numbers are its own (the upper bits say so).
Which tenant a sequence belongs to is the worker's word, because each worker serves all tenants: a
worker that was taken over can spend any tenant's tokens and pages, and open what it saved. It cannot
reach what another worker's runs compute, nor take more memory than there is for its tenants.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from realm.engine.scheduler import Scheduler
from realm.engine.sequence import BYTES_PER_PAGE, SEQUENCE_BYTES, TOKEN_BYTES, Sequence, Tenant
from realm.engine.tenants import Tenants
from realm.guests.abi import ErrorCode

WORKER_SHIFT = 40
"""A worker's sequences are numbered ``(worker << WORKER_SHIFT) + n``; any other number is not its own."""

MAX_WORKER = 1 << (63 - WORKER_SHIFT)
"""Workers are numbered below this, so that sequences are signed 64-bit numbers."""

MAX_BYTES = 1 << 30
"""Memory for tokens and sequences of all tenants together (:data:`~realm.engine.sequence.BYTES_PER_PAGE`)."""

MAX_REFUSED = 4096
"""Refused sequences of a worker whose reason is remembered."""


@dataclass(slots=True)
class _Worker:
    """What one worker has, by sequence and by run.

    ``refused``: run of sequences for which there was no memory, whose, and which was full.
    """

    sequences: dict[int, Sequence] = field(default_factory=dict)
    runs: dict[int, dict[int, Sequence]] = field(default_factory=dict)
    refused: dict[int, tuple[int, Tenant, ErrorCode]] = field(default_factory=dict)


class Workers:
    """The sequences of all workers. Operations that are not in order are dropped; none raises."""

    def __init__(self, scheduler: Scheduler, tenants: Tenants) -> None:
        self._scheduler = scheduler
        self._tenants = tenants
        self._workers: dict[int, _Worker] = {}
        self._arrivals = 0
        self._saved = 0

    def __len__(self) -> int:
        return len(self._workers)

    def of(self, worker: int) -> _Worker:
        """What the worker has; nothing before its first operation."""
        state = self._workers.get(worker)
        if state is None:
            state = self._workers[worker] = _Worker()
        return state

    def refusal(self, worker: int, seq: int) -> tuple[Tenant, ErrorCode] | None:
        """Why there was no memory for ``seq`` (:meth:`lacks_memory`); None if that is not why it is missing."""
        refused = self.of(worker).refused.get(seq)
        return None if refused is None else refused[1:]

    def lacks_memory(self, tenant: Tenant, sequences: int, tokens: int) -> ErrorCode | None:
        """Whether so much more can be held: LIMIT if the tenant has no room, OUT_OF_MEMORY if nobody has."""
        more = sequences * SEQUENCE_BYTES + tokens * TOKEN_BYTES
        mine = tenant.open * SEQUENCE_BYTES + tenant.tokens * TOKEN_BYTES
        if mine + more > tenant.quota.kv_pages * BYTES_PER_PAGE:
            return ErrorCode.LIMIT
        return ErrorCode.OUT_OF_MEMORY if self._scheduler.bytes + more > MAX_BYTES else None

    def open(self, worker: int, seq: int, tenant: str, run: int, parent: Sequence | None = None) -> Sequence | None:
        """A new sequence of a run, a copy of ``parent`` if that is given.

        None if the number is not the worker's own or in use, or if there is no memory for it
        (:meth:`refusal`).
        """
        state = self.of(worker)
        if seq >> WORKER_SHIFT != worker or seq in state.sequences:
            return None
        account = self._tenants.of(tenant)
        if account is None:
            return None
        lack = self.lacks_memory(account, 1, 0 if parent is None else len(parent.tokens))
        if lack is not None:
            if len(state.refused) < MAX_REFUSED:
                state.refused[seq] = (run, account, lack)
            return None
        state.refused.pop(seq, None)
        sequence = self._new(seq, worker, account, run, parent)
        state.sequences[seq] = sequence
        state.runs.setdefault(run, {})[seq] = sequence
        return sequence

    def _new(self, seq: int, worker: int, tenant: Tenant, run: int, parent: Sequence | None) -> Sequence:
        self._arrivals += 1
        sequence = Sequence(seq, worker, tenant, run, self._arrivals)
        if parent is None:
            self._scheduler.add(sequence)
        else:
            self._scheduler.fork(parent, sequence)
        return sequence

    def fork(self, worker: int, parent: int, child: int) -> None:
        """Open ``child`` as a copy of the worker's ``parent``."""
        state = self.of(worker)
        sequence = state.sequences.get(parent)
        if sequence is not None:
            self.open(worker, child, sequence.tenant.name, sequence.run, sequence)
        elif (refused := state.refused.get(parent)) is not None and len(state.refused) < MAX_REFUSED:
            state.refused.setdefault(child, refused)

    def free(self, worker: int, seq: int) -> None:
        """Forget one of the worker's sequences."""
        state = self.of(worker)
        state.refused.pop(seq, None)
        sequence = state.sequences.pop(seq, None)
        if sequence is None:
            return
        self._scheduler.remove(sequence)
        run = state.runs[sequence.run]
        del run[seq]
        if not run:
            del state.runs[sequence.run]

    def end_run(self, worker: int, number: int) -> None:
        """Forget all that a run has at this worker."""
        state = self.of(worker)
        if state.refused:
            state.refused = {seq: refused for seq, refused in state.refused.items() if refused[0] != number}
        for seq, sequence in state.runs.pop(number, {}).items():
            self._scheduler.remove(sequence)
            del state.sequences[seq]

    def drop(self, worker: int) -> None:
        """Forget all that a worker has."""
        state = self._workers.pop(worker, None)
        if state is not None:
            for sequence in state.sequences.values():
                self._scheduler.remove(sequence)

    def save(self, sequence: Sequence, name: str) -> Sequence:
        """Keep a copy under a name of the tenant, in place of one that has it already.

        Saved copies belong to no run and no worker; they live until replaced or the engine ends.
        """
        tenant = sequence.tenant
        if (old := tenant.saved.pop(name, None)) is not None:
            self._scheduler.remove(old)
        # Numbers below 0 are no worker's.
        self._saved += 1
        copy = tenant.saved[name] = self._new(-self._saved, -1, tenant, -1, sequence)
        return copy

    def check(self) -> None:
        """Verify that each sequence is listed once, where it belongs. Raises AssertionError."""
        listed: list[Sequence] = [s for tenant in self._tenants for s in tenant.saved.values()]
        for worker, state in self._workers.items():
            listed += state.sequences.values()
            of_runs = {s.id: s for run in state.runs.values() for s in run.values()}
            if of_runs != state.sequences or not all(state.runs.values()):
                raise AssertionError(f"the runs of worker {worker} do not have its sequences")
            if any(s.worker != worker or s.id >> WORKER_SHIFT != worker for s in state.sequences.values()):
                raise AssertionError(f"worker {worker} has a sequence that is not its own")
        known = {sequence.id: sequence for sequence in self._scheduler.sequences}
        if len(listed) != len(known) or any(known.get(sequence.id) is not sequence for sequence in listed):
            raise AssertionError("the scheduler has a sequence that nobody owns")
