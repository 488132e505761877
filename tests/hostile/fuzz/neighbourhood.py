"""A guest under test beside a canary: one guest runtime and one engine of a tiny random model, in this process.

Time is the neighbourhood's own, so a run that waits for a minute takes none, and the same module and
input do the same each time.
"""

from __future__ import annotations

import gc
import hashlib
import tempfile
import zlib
from pathlib import Path
from random import Random

from realm.engine.core import EngineCore
from realm.engine.loading import EngineOptions, load_engine
from realm.guests.abi import ErrorCode
from realm.guests.facts import ModelFacts
from realm.guests.runtime import GuestRuntime
from realm.limits import LIMITS as LIMIT_NAMES
from realm.messages import CallDone, EngineOp, EngineReply, EngineResult, SaveSequence
from realm.models.tokenizer import Tokenizer
from realm.run_messages import (
    CancelRun,
    ClientMessage,
    Credit,
    Log,
    Output,
    RunFinished,
    RunLimits,
    StartRun,
    StoreGet,
    StoreReply,
    StoreSet,
    WorkerEvent,
)
from tests.hostile.fuzz.compiling import artifact_of_text
from tests.hostile.fuzz.problems import Problem, no_host_errors
from tests.model_files import write_folder
from tests.wat import guest, sampling

WORKER = 3
PAGES = 64
LIMITS = RunLimits(
    fuel=20_000_000,
    wall_seconds=60.0,
    memory_bytes=4 << 20,
    table_elements=2_000,
    tokens=300,
    output_bytes=32 << 10,
    log_bytes=8 << 10,
    sequences=8,
    first_call_seconds=20.0,
)
MAX_TURNS = 4_000
"""Far more than the fuel, the tokens and the output of one run can make."""
RENEW_AFTER = 24
"""Guests until engine and runtime are made anew, and what the process holds is counted."""
SLACK = 96
"""Mappings and descriptors that come and go with the allocator and the libraries."""

CANARY = guest(
    """
    (drop (call $input_read (i32.const 0) (i32.const 600) (i32.const 64)))
    (memory.fill (i32.const 4096) (i32.const 0xa5) (i32.const 4096))
    (local.set $a (call $seq_new))
    (i32.store (i32.const 512) (i32.const 5))
    (loop $again
      (local.set $c (call $forward (local.get $a) (i32.const 512) (i32.const 1) (i32.const 600) (i32.const 0)))
      (if (i32.lt_s (local.get $c) (i32.const 0)) (then (return (local.get $c))))
      (i32.store (i32.const 512) (local.get $c))
      (local.set $c (call $emit (i32.const 512) (i32.const 4)))
      (if (i32.lt_s (local.get $c) (i32.const 0)) (then (return (local.get $c))))
      (br_if $again (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 10))))
    (local.set $b (i32.const 4096))
    (loop $check
      (if (i64.ne (i64.load (local.get $b)) (i64.const 0xa5a5a5a5a5a5a5a5)) (then (return (i32.const 99))))
      (br_if $check (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 8))) (i32.const 8192))))
    (i32.const 0)""",
    "seq_new",
    "forward",
    "emit",
    "input_read",
)
CANARY_INPUT = sampling(0.8)

LIMIT_ERRORS = frozenset(
    {
        "first_call_timeout",
        "fuel_exhausted",
        "limit_exceeded",
        "memory_limit",
        "output_limit",
        "rate_limited",
        "token_limit",
        "wall_time_exceeded",
    }
)
OTHER_ERRORS = frozenset({"guest_error", "guest_trap"})


class Neighbourhood:
    """Runs guests one after the other, each beside the canary; see the module's description."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="realm-fuzz-")
        self.model = write_folder(Path(self._folder.name) / "tiny")
        self._tokenizer = Tokenizer(self.model)
        self._facts = ModelFacts.load(self.model, bos=self._tokenizer.bos, eos=self._tokenizer.eos)
        self._runs = 0
        self._baseline: tuple[int, int] | None = None
        self._renewals = 0
        self.outcomes: dict[str, int] = {}
        self.host_calls = 0
        self._canary = artifact_of_text(CANARY)
        self._start()
        self._expected = self._alone()

    # --- making and ending ------------------------------------------------------------------------

    def _start(self) -> None:
        options = EngineOptions(dtype="float32", pages=PAGES, token_budget=64, threads=1)
        self.core: EngineCore = load_engine(self.model, options)
        self.now = 1000.0
        self.runtime = GuestRuntime(
            WORKER, self._tokenizer, self._facts, clock=lambda: self.now, wall_clock=lambda: 1_700_000_000.0
        )
        self._fresh = 0
        self._replies = 0
        self._saved: set[tuple[str, str]] = set()
        self._saving: dict[int, tuple[str, str]] = {}
        self._tenant_of: dict[int, str] = {}
        self.store: dict[str, bytes] = {}

    def renew(self) -> None:
        """Give everything back, and see that the process holds no more than before."""
        self.runtime.close()
        self.core.submit(WORKER, self.runtime.turn(self.now).ops)
        del self.core, self.runtime
        gc.collect()
        held = (len(list(Path("/proc/self/fd").iterdir())), Path("/proc/self/maps").read_text().count("\n"))
        self._renewals += 1
        if self._renewals == 2:
            self._baseline = held
        elif self._baseline is not None and any(
            now > before + SLACK for now, before in zip(held, self._baseline, strict=True)
        ):
            raise Problem(f"(descriptors, mappings) grew from {self._baseline} to {held}")
        self._start()

    def close(self) -> None:
        """Give everything back. Raises :class:`Problem` if the process still holds more than before."""
        try:
            self.renew()
            self.runtime.close()
        finally:
            self._folder.cleanup()

    def drop(self) -> None:
        """Give up on it after a problem: it may be in any state."""
        self._folder.cleanup()

    def _alone(self) -> tuple[bytes, int]:
        run = self._begin(self._canary, "canary", CANARY_INPUT, RunLimits())
        _, output, ends = self._until_done({run}, Random(0), subject=None)
        return output[run], ends[run].usage.new_tokens

    # --- one guest --------------------------------------------------------------------------------

    def run(self, artifact: str, data: bytes = b"") -> RunFinished:
        """Run a guest with the canary. The same artifact and data do the same.

        Raises:
            Problem: an invariant does not hold.
        """
        if self._fresh >= RENEW_AFTER:
            self.renew()
        self._fresh += 1
        random = Random(zlib.crc32(data) ^ zlib.crc32(Path(artifact).read_bytes()))
        with no_host_errors():
            canary = self._begin(self._canary, "canary", CANARY_INPUT, RunLimits())
            subject = self._begin(artifact, "subject", data, LIMITS)
            logs, output, ends = self._until_done({canary, subject}, random, subject)
        self._check_end(ends[canary], "the canary")
        if ends[canary].outcome != "complete" or ends[canary].code:
            raise Problem(f"the canary ended with {ends[canary]}")
        if (output[canary], ends[canary].usage.new_tokens) != self._expected:
            raise Problem(f"the canary's output is {output[canary]!r}, not {self._expected[0]!r}")
        end = ends[subject]
        self._check_end(end, "the guest")
        if any("the host failed" in text for text in logs[subject]):
            raise Problem(f"a host function failed inside: {logs[subject]}")
        self._check_limits(end, output[subject], logs[subject])
        self._check_nothing_left()
        key = end.outcome if end.error is None else end.error.code
        self.outcomes[key] = self.outcomes.get(key, 0) + 1
        self.host_calls += end.usage.host_calls
        return end

    def _begin(self, artifact: str, tenant: str, data: bytes, limits: RunLimits) -> int:
        self._runs += 1
        digest = artifact_digest(artifact)
        self.runtime.start(
            StartRun(self._runs, tenant, "m", artifact, data, 7, limits, 1 << 12, artifact_sha256=digest)
        )
        self._tenant_of[self._runs] = tenant
        return self._runs

    def _until_done(
        self, runs: set[int], random: Random, subject: int | None
    ) -> tuple[dict[int, list[str]], dict[int, bytes], dict[int, RunFinished]]:
        logs: dict[int, list[str]] = {run: [] for run in runs}
        output: dict[int, bytes] = dict.fromkeys(runs, b"")
        ends: dict[int, RunFinished] = {}
        # A fifth of the guests is cancelled somewhere; all get a few messages and an end of input.
        cancel_at = random.randrange(200) if random.random() < 0.2 else -1
        message_at = {random.randrange(40): random.randbytes(random.choice([0, 1, 40, 5000])) for _ in range(3)}
        close_at = random.randrange(20, 400)
        for number in range(MAX_TURNS):
            if subject is not None and subject not in ends:
                if number == cancel_at:
                    self.runtime.cancel(CancelRun(subject, "the fuzz says so"))
                if number in message_at:
                    self.runtime.message(ClientMessage(subject, message_at[number]))
                if number == close_at:
                    self.runtime.close_input(subject)
            turn = self.runtime.turn(self.now)
            self._submit(turn.ops)
            for event in turn.events:
                self._event(event, logs, output, ends, random)
            if runs <= ends.keys():
                return logs, output, ends
            if self.core.has_work():
                self._deliver(self.core.step().get(WORKER, []))
            elif not turn.busy and not turn.events and not turn.ops:
                if turn.deadline is None:
                    raise Problem("guests wait for nothing that could ever come")
                self.now = max(self.now, turn.deadline)
            self.now += 0.0002
        raise Problem(f"not at rest after {MAX_TURNS} turns: {runs - ends.keys()}")

    def _submit(self, ops: list[EngineOp]) -> None:
        for op in ops:
            if isinstance(op, SaveSequence):
                self._saving[op.call] = ("subject", op.name)
        self.core.submit(WORKER, ops)

    def _deliver(self, results: list[EngineResult]) -> None:
        for result in results:
            saved = self._saving.pop(result.call, None)
            if saved is not None and isinstance(result, CallDone):
                self._saved.add(saved)
        if results:
            self._replies += 1
            self.runtime.deliver(EngineReply(self._replies, results))

    def _event(
        self,
        event: WorkerEvent,
        logs: dict[int, list[str]],
        output: dict[int, bytes],
        ends: dict[int, RunFinished],
        random: Random,
    ) -> None:
        if event.run in ends:
            raise Problem(f"an event after the end of run {event.run}: {event}")
        match event:
            case Output():
                output[event.run] += event.data
                if self._tenant_of[event.run] == "canary" or random.random() < 0.8:
                    self.runtime.credit(Credit(event.run, len(event.data)))
            case Log():
                logs[event.run].append(event.text)
            case StoreGet():
                value = self.store.get(event.key)
                self.runtime.store_reply(StoreReply(event.call, 0 if value is not None else ErrorCode.NOT_FOUND, value))
            case StoreSet():
                self.store[event.key] = event.value
                self.runtime.store_reply(StoreReply(event.call, 0))
            case RunFinished():
                ends[event.run] = event

    # --- invariants -------------------------------------------------------------------------------

    def _check_end(self, end: RunFinished, who: str) -> None:
        if (end.outcome == "error") != (end.error is not None) or end.outcome not in ("complete", "error", "cancelled"):
            raise Problem(f"{who} has no proper outcome: {end}")
        if end.error is not None and end.error.code not in LIMIT_ERRORS | OTHER_ERRORS:
            raise Problem(f"{who} ended with {end.error}")
        if end.error is not None and end.error.code in LIMIT_ERRORS:
            details = end.error.details
            if not details.keys() >= {"name", "limit", "used", "unit"} or details["name"] not in LIMIT_NAMES:
                raise Problem(f"{who} met a limit that is not named: {end.error}")
        usage = end.usage
        values = [getattr(usage, name) for name in usage.__struct_fields__]
        if any(value < 0 for value in values):
            raise Problem(f"{who} used less than nothing: {usage}")

    def _check_limits(self, end: RunFinished, output: bytes, logs: list[str]) -> None:
        usage = end.usage
        used = {
            "fuel": usage.fuel <= LIMITS.fuel,
            "memory_bytes": usage.memory_bytes <= LIMITS.memory_bytes,
            "prompt_tokens": usage.prompt_tokens <= LIMITS.tokens,
            "output_bytes": len(output) <= usage.output_bytes <= LIMITS.output_bytes,
            # The host's own lines (at most 65, each short) come on top of what the guest may log.
            "log_bytes": sum(map(len, logs)) <= LIMITS.log_bytes + 66 * 1024,
        }
        if not all(used.values()):
            raise Problem(f"over a limit: {[name for name, fine in used.items() if not fine]}: {usage}")

    def _check_nothing_left(self) -> None:
        # What the ends of the runs still asked of the engine.
        self._submit(self.runtime.turn(self.now).ops)
        while self.core.has_work():
            self._deliver(self.core.step().get(WORKER, []))
        self.core.check()
        stats = self.core.stats()
        open_sequences = sum(tenant.sequences for tenant in stats.tenants.values())
        left = {
            "runs": self.runtime.live,
            "calls": self.runtime.pending_calls,
            "sequences": open_sequences - len(self._saved),
        }
        if any(left.values()):
            raise Problem(f"something is left: {left}")


def artifact_digest(artifact: str) -> str:
    """Its SHA-256 in hex, as the gateway tells the worker."""
    return hashlib.sha256(Path(artifact).read_bytes()).hexdigest()
