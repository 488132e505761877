"""What is fuzzed: each target makes an input from a number, and checks an input's invariants."""

from __future__ import annotations

import contextlib
import json
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import wasmtime
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import seed as seeded
from hypothesis import settings as example_settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from realm.errors import RealmError
from realm.guests.compiler import compile_module_sync
from realm.guests.module_format import parse_module
from tests.hostile.counters import WholeHost, random_script
from tests.hostile.fuzz import arguments, binaryen, links, modules, rewriting
from tests.hostile.fuzz.compiling import artifact, artifact_of_text
from tests.hostile.fuzz.gateway_host import Loop
from tests.hostile.fuzz.neighbourhood import Neighbourhood
from tests.hostile.fuzz.problems import Problem
from tests.hostile.fuzz.uploads import UploadMachine
from tests.hostile.fuzz.wire import WireMachine

REFUSALS = frozenset(
    {
        "compile_limit",
        "module_abi_version",
        "module_export_missing",
        "module_import_unknown",
        "module_invalid",
        "module_too_large",
    }
)
GUEST_INPUTS = (
    b"",
    b'{"prompt":"once","max_tokens":4}',
    b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":3}',
    b'{"prompt":"a","n":3,"max_tokens":3}',
    b"[[[[[[",
    bytes(range(256)),
)


CAMPAIGN = 10_000_000
"""Numbers that belong to one campaign."""


class Target(ABC):
    """One kind of input. ``counts`` says what has been done, for the report."""

    name: str
    weight = 1

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def make(self, seed: int) -> bytes | None:
        """The input of this number, the same each time; None if there is none."""

    @abstractmethod
    def check(self, data: bytes) -> None:
        """Raises :class:`Problem`, or anything unforeseen, when an invariant does not hold."""

    def smaller(self, data: bytes) -> Iterator[bytes]:
        """Simpler inputs that may fail as this one does."""
        yield from ()

    def close(self) -> None:  # noqa: B027 (most have nothing)
        """Give back what the checks need."""


class _Guests(Target):
    """Targets that run guests beside the canary."""

    def __init__(self) -> None:
        super().__init__()
        self._neighbourhood: Neighbourhood | None = None

    def run(self, path: str, data: bytes) -> None:
        place = self._neighbourhood = self._neighbourhood or Neighbourhood()
        before = Counter(place.outcomes)
        calls = place.host_calls
        try:
            place.run(path, data)
        except BaseException:
            # Whatever state it is in, the next input is to start from a clean one.
            self._neighbourhood = None
            place.drop()
            raise
        self.counts += Counter(place.outcomes) - before
        self.counts["host calls"] += place.host_calls - calls
        self.counts["runs"] += 1

    def close(self) -> None:
        if self._neighbourhood is not None:
            self._neighbourhood.close()


class _Modules(_Guests):
    """Modules through the checks and the compiler, then into a run."""

    children_of = 64
    """One module in so many goes through the real child process too."""

    @abstractmethod
    def module(self, seed: int) -> bytes:
        """Raises :class:`modules.NoModule`."""

    def make(self, seed: int) -> bytes | None:
        try:
            return self.module(seed)
        except modules.NoModule:
            return None

    def check(self, data: bytes) -> None:
        self.counts["modules"] += 1
        random = Random(zlib.crc32(data))
        refusal: str | None = None
        try:
            path = artifact(data)
        except RealmError as error:
            refusal = error.code
            if refusal not in REFUSALS:
                raise Problem(f"refused with {error}") from error
            self.counts["refused"] += 1
        if random.randrange(self.children_of) == 0:
            self._check_child(data, refusal)
        if refusal is None:
            try:
                self.run(path, random.choice(GUEST_INPUTS))
            finally:
                Path(path).unlink()

    def _check_child(self, data: bytes, refusal: str | None) -> None:
        """The child says what the same functions say here."""
        self.counts["compile children"] += 1
        with tempfile.TemporaryDirectory(prefix="realm-fuzz-") as folder:
            wasm = Path(folder) / "module.wasm"
            wasm.write_bytes(data)
            try:
                compile_module_sync(wasm, Path(folder) / "cache")
                said = None
            except RealmError as error:
                said = error.code
            left = [path.name for path in (Path(folder) / "cache").iterdir() if path.name.startswith(".")]
        if said != refusal or left:
            raise Problem(f"the compiler's child says {said}, its functions here say {refusal}; files left: {left}")


class Smith(_Modules):
    name = "smith"
    weight = 3

    def module(self, seed: int) -> bytes:
        return modules.smith(seed)


class Mutate(_Modules):
    name = "mutate"
    weight = 3

    def module(self, seed: int) -> bytes:
        return modules.mutated(seed)


class Binaryen(_Modules):
    """Only where binaryen is installed; ``make fuzz`` does that. Its corpus runs everywhere."""

    name = "binaryen"
    weight = 2

    def module(self, seed: int) -> bytes:
        return binaryen.translated(seed)


class Corpus(_Modules):
    name = "corpus"

    def module(self, seed: int) -> bytes:
        # Each file once a campaign.
        number = seed % CAMPAIGN
        files = modules.corpus()
        if number >= len(files):
            raise modules.NoModule("no more files")
        return files[number].read_bytes()


class Rewriting(Target):
    """A module as it came and as the host rewrites it do the same."""

    name = "rewriting"

    def make(self, seed: int) -> bytes | None:
        return rewriting.make(seed)

    def check(self, data: bytes) -> None:
        self.counts["modules"] += 1
        rewriting.check(data, self.counts)


class Arguments(_Guests):
    """Host functions with any arguments, in any memory."""

    name = "arguments"
    weight = 2

    def __init__(self) -> None:
        super().__init__()
        self._artifacts: dict[str, str] = {}

    def make(self, seed: int) -> bytes:
        return arguments.encode(*arguments.program(seed))

    def check(self, data: bytes) -> None:
        # A quarter of the programs runs in a 64-bit memory.
        caller = arguments.CALLER if zlib.crc32(data) % 4 else arguments.WIDE_CALLER
        if caller not in self._artifacts:
            self._artifacts[caller] = artifact_of_text(caller)
        self.run(self._artifacts[caller], data)

    def smaller(self, data: bytes) -> Iterator[bytes]:
        memory, calls = arguments.decode(data)
        size = len(calls)
        while size:
            size //= 2
            for at in range(0, len(calls), max(size, 1)):
                yield arguments.encode(memory, calls[:at] + calls[at + max(size, 1) :])
        for at in range(0, len(memory), 512):
            yield arguments.encode(memory[:at] + bytes(512) + memory[at + 512 :], calls)


class Parser(Target):
    """The parser of the module format: only typed errors come out, and of valid modules only with a reason."""

    name = "parser"

    def make(self, seed: int) -> bytes:
        random = Random(seed)
        kind = random.randrange(8)
        if kind == 0:
            return random.randbytes(random.randrange(200))
        if kind == 1:
            return b"\0asm\x01\0\0\0" + random.randbytes(random.randrange(300))
        source = random.choice(modules.GUESTS + modules.corpus()).read_bytes()
        if seed % 16 == 0:
            with contextlib.suppress(modules.NoModule):
                source = modules.smith(seed)
            if random.random() < 0.5:
                return source
        if kind == 2:
            return source[: random.randrange(len(source))]
        data = bytearray(source)
        for _ in range(random.choice([1, 1, 2, 5, 50])):
            # Counts and sizes stand mostly near the front.
            at = random.randrange(min(len(data), random.choice([60, 600, len(data)])))
            match random.randrange(4):
                case 0:
                    data[at] ^= 1 << random.randrange(8)
                case 1:
                    data[at] = random.choice([0, 0x7F, 0x80, 0xFF])
                case 2:
                    data[at:at] = random.choice([b"\xff\xff\xff\xff\x0f", b"\x80" * 9, random.randbytes(3)])
                case _:
                    del data[at : at + random.randrange(1, 9)]
        return bytes(data)

    def check(self, data: bytes) -> None:
        self.counts["inputs"] += 1
        try:
            parse_module(data)
            self.counts["accepted"] += 1
        except RealmError as error:
            if error.code not in ("module_invalid", "module_too_large"):
                raise Problem(f"refused with {error}") from error
            if not error.details and _is_valid(data):
                raise Problem(f"a valid module is refused, and no limit or feature is named: {error}") from error

    def smaller(self, data: bytes) -> Iterator[bytes]:
        size = len(data)
        while size > 1:
            size //= 2
            for at in range(0, len(data), size):
                yield data[:at] + data[at + size :]


def _is_valid(data: bytes) -> bool:
    try:
        wasmtime.Module.validate(rewriting.engine().inner, data)
        # Validation alone lets imports of a later format pass.
        wasmtime.Module(rewriting.engine().inner, data)
    except wasmtime.WasmtimeError:
        return False
    return True


class _Machine(Target):
    """A Hypothesis state machine: an input is the seed of a few examples, which Hypothesis shrinks itself."""

    machine: type[RuleBasedStateMachine]
    examples = 25

    def __init__(self) -> None:
        super().__init__()
        self._shared: Loop | None = None

    def make(self, seed: int) -> bytes:
        return json.dumps({"seed": seed, "examples": self.examples, "steps": 40, "shrink": False}).encode()

    def smaller(self, data: bytes) -> Iterator[bytes]:
        # Hypothesis does it, and its account of the example is the finding.
        yield json.dumps({**json.loads(data), "shrink": True}).encode()

    def check(self, data: bytes) -> None:
        given = json.loads(data)
        shared = self._shared = self._shared or Loop()
        frames = shared.frames
        # Each input has a class of its own: the seed is kept on it.
        machine: Any = seeded(given["seed"])(type(self.machine.__name__, (self.machine,), {"shared": shared}))
        try:
            run_state_machine_as_test(
                machine,
                settings=example_settings(
                    max_examples=given["examples"],
                    stateful_step_count=given["steps"],
                    deadline=None,
                    database=None,
                    derandomize=False,
                    print_blob=False,
                    phases=(Phase.generate, Phase.shrink) if given["shrink"] else (Phase.generate,),
                    verbosity=Verbosity.normal,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        except BaseException:
            with contextlib.suppress(Exception):
                self.close()
            self._shared = None
            raise
        finally:
            self.counts["examples"] += given["examples"]
            self.counts["messages"] += shared.frames - frames

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()


class Wire(_Machine):
    name = "wire"
    weight = 2
    machine = WireMachine


class UploadFrames(_Machine):
    name = "uploads"
    machine = UploadMachine


class EngineLink(Target):
    """Frames of a worker that has been taken over, to the engine."""

    name = "engine link"

    def __init__(self) -> None:
        super().__init__()
        self._host: links.EngineHost | None = None

    def make(self, seed: int) -> bytes:
        random = Random(seed)
        may_save = random.random() < 0.2
        worker = 1000 + seed % 1_000_000
        if seed % 50 == 7:
            return b"\2" + links.deaf(worker)
        made: Callable[[Random, int], Any] = lambda random, worker: links.to_engine(random, worker, may_save)  # noqa: E731
        return bytes([may_save]) + links.stream(random, made, worker)

    def check(self, data: bytes) -> None:
        self.counts["intruders"] += 1
        self.counts["bytes"] += len(data)
        host = self._host = self._host or links.EngineHost()
        try:
            host.attack(data[1:], deaf=data[0] == 2, may_save=data[0] == 1)
        except BaseException:
            self._host = None
            with contextlib.suppress(Problem):
                host.close()
            raise

    def close(self) -> None:
        if self._host is not None:
            self._host.close()


class GatewayLink(Target):
    """Frames of a worker that has been taken over, to the gateway."""

    name = "gateway link"

    def __init__(self) -> None:
        super().__init__()
        self._shared: Loop | None = None

    def make(self, seed: int) -> bytes:
        return links.stream(Random(seed), links.to_gateway, 1000 + seed % 1_000_000)

    def check(self, data: bytes) -> None:
        self.counts["intruders"] += 1
        self.counts["bytes"] += len(data)
        shared = self._shared = self._shared or Loop()
        random = Random(zlib.crc32(data))
        pieces = [random.randrange(40) for _ in range(random.randrange(4))]
        try:
            shared.run(links.attack_gateway(shared, data, pieces))
        except BaseException as error:
            with contextlib.suppress(Exception):
                shared.close()
            self._shared = None
            if isinstance(error, TimeoutError):
                raise Problem("a good client or worker got no answer") from error
            raise

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()


class Counters(Target):
    """Scripts of what clients do to the whole host, after which every counter is as before."""

    name = "counters"
    weight = 3

    def __init__(self) -> None:
        super().__init__()
        self._host: WholeHost | None = None

    def make(self, seed: int) -> bytes:
        return json.dumps(random_script(seed)).encode()

    def check(self, data: bytes) -> None:
        script = json.loads(data)
        host = self._host = self._host or WholeHost()
        self.counts["scripts"] += 1
        self.counts["operations"] += len(script)
        self.counts["workers killed"] += sum(operation == "kill" for operation, *_ in script)
        before = Counter(host.ends)
        try:
            host.play(script)
        except BaseException:
            self._host = None
            with contextlib.suppress(Exception):
                host.close()
            raise
        finally:
            self.counts += host.ends - before

    def smaller(self, data: bytes) -> Iterator[bytes]:
        script = json.loads(data)
        size = len(script)
        while size:
            size //= 2
            for at in range(0, len(script), max(size, 1)):
                yield json.dumps(script[:at] + script[at + max(size, 1) :]).encode()

    def close(self) -> None:
        if self._host is not None:
            self._host.close()


TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        Smith,
        Mutate,
        Binaryen,
        Corpus,
        Rewriting,
        Arguments,
        Parser,
        Wire,
        UploadFrames,
        EngineLink,
        GatewayLink,
        Counters,
    )
}
