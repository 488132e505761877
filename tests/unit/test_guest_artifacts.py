"""Compiled modules: only what has the hash is run, loaded once, in the helper when it is large."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import pytest

from realm.guests import modules, starting
from realm.guests.fibers import Code
from realm.guests.hostcalls import HostLinkers
from realm.run_messages import CancelRun, RunFinished, RunLimits, StartRun
from tests.fakes import Host, compiled, digest
from tests.wat import guest

FIVE, SIX = guest("(i32.const 5)"), guest("(i32.const 6)")


def start(host: Host, path: Path | str, sha256: str) -> RunFinished:
    host.runs += 1
    host.runtime.start(StartRun(host.runs, "a", "m", str(path), b"", 1, RunLimits(), artifact_sha256=sha256))
    for _ in range(100):
        end = host.finished(host.runs)
        if end is not None:
            return end
        host.turn()
    raise AssertionError("the run does not end")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    path = tmp_path / "guest.cwasm"
    path.write_bytes(Path(compiled(FIVE)).read_bytes())
    return path


def check_damaged(end: RunFinished, expected: str, found: str) -> None:
    assert end.outcome == "error"
    assert end.error is not None
    assert end.error.code == "artifact_damaged"
    assert end.error.details["expected"] == expected
    assert end.error.details["found"] == found
    assert "/" not in str(end.error.details["artifact"])


def test_the_hash_decides(copy: Path) -> None:
    host = Host()
    assert start(host, copy, digest(compiled(FIVE))).code == 5
    host.turn()
    host.check_empty()


@pytest.mark.parametrize("change", ["byte", "cut", "longer", "swapped", "empty"])
def test_a_damaged_or_swapped_artifact_does_not_run(copy: Path, change: str) -> None:
    data = bytearray(copy.read_bytes())
    if change == "byte":
        data[len(data) // 2] ^= 1
    elif change == "cut":
        del data[-1:]
    elif change == "longer":
        data += b"!"
    elif change == "swapped":
        data = bytearray(Path(compiled(SIX)).read_bytes())
    else:
        data = bytearray()
    copy.write_bytes(data)
    host = Host()
    expected = digest(compiled(FIVE))
    check_damaged(start(host, copy, expected), expected, hashlib.sha256(data).hexdigest())
    # Once it is right again the same number may be started again.
    copy.write_bytes(Path(compiled(FIVE)).read_bytes())
    assert start(host, copy, expected).code == 5
    host.turn()
    host.check_empty()


def test_without_a_hash_nothing_is_loaded(copy: Path) -> None:
    check_damaged(start(Host(), copy, ""), "", "")


def test_a_missing_artifact_is_an_error_of_that_run(tmp_path: Path) -> None:
    end = start(Host(), tmp_path / "absent.cwasm", "ab" * 32)
    check_damaged(end, "ab" * 32, "")


def test_another_hash_is_another_module(copy: Path) -> None:
    """What is loaded under a path is not what the path is taken to be later."""
    host = Host()
    assert start(host, copy, digest(compiled(FIVE))).code == 5
    copy.write_bytes(Path(compiled(SIX)).read_bytes())
    assert start(host, copy, digest(compiled(SIX))).code == 6
    # The old one is loaded still: its bytes were checked.
    assert start(host, copy, digest(compiled(FIVE))).code == 5


def test_code_that_the_runtime_does_not_take_is_damaged_too(copy: Path) -> None:
    copy.write_bytes(b"not native code")
    expected = hashlib.sha256(b"not native code").hexdigest()
    check_damaged(start(Host(), copy, expected), expected, expected)


def test_large_modules_are_loaded_by_the_helper_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "INLINE_BYTES", 0)
    host = Host()
    sha256 = digest(compiled(FIVE))
    for number in range(1, 5):
        host.runtime.start(StartRun(number, "a", "m", str(copy), b"", 1, RunLimits(), artifact_sha256=sha256))
    host.runs = 4
    assert len(host.runtime.slices.jobs) == 1
    host.runtime.check()
    host.runtime.cancel(CancelRun(2, "enough"))
    host.settle()
    outcomes = {e.run: e.outcome for e in host.events if isinstance(e, RunFinished)}
    assert outcomes == {1: "complete", 2: "cancelled", 3: "complete", 4: "complete"}
    host.check_empty()
    # It is there now: no job any more.
    host.runtime.start(StartRun(5, "a", "m", str(copy), b"", 1, RunLimits(), artifact_sha256=sha256))
    assert not host.runtime.slices.jobs
    host.runtime.close()


def test_a_module_is_loaded_in_the_queue_of_every_tenant_that_waits(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes second waits for the module, not for the first one's other work."""
    monkeypatch.setattr(modules, "INLINE_BYTES", 0)
    loads: list[Path] = []
    load_code = starting.load_code

    def noting(linkers: HostLinkers, key: modules.Key) -> tuple[Code, int]:
        loads.append(Path(key[0]))
        return load_code(linkers, key)

    monkeypatch.setattr(starting, "load_code", noting)
    order: list[str] = []
    host = Host()
    for number in range(5):
        host.runtime.helper.submit("a", partial(order.append, f"a{number}"))
    sha256 = digest(compiled(FIVE))
    for number, tenant in ((1, "a"), (2, "b"), (3, "b")):
        host.runtime.start(StartRun(number, tenant, "m", str(copy), b"", 1, RunLimits(), artifact_sha256=sha256))
    host.runs = 3
    host.runtime.helper.submit("b", lambda: order.append(f"b after {len(loads)} loads"))
    assert len(host.runtime.slices.jobs) == 2
    host.runtime.check()
    host.settle()
    assert order[:4] == ["a0", "a1", "b after 1 loads", "a2"]
    assert loads == [copy]
    assert [e.outcome for e in host.events if isinstance(e, RunFinished)] == ["complete"] * 3
    host.check_empty()
    assert not host.runtime.slices.jobs
    host.runtime.close()


def test_a_damaged_large_module_fails_all_that_wait_for_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "INLINE_BYTES", 0)
    host = Host()
    for number in (1, 2):
        host.runtime.start(StartRun(number, "a", "m", str(copy), b"", 1, RunLimits(), artifact_sha256="00" * 32))
    host.runs = 2
    host.settle()
    for number in (1, 2):
        end = host.finished(number)
        assert end is not None
        check_damaged(end, "00" * 32, digest(compiled(FIVE)))
    host.check_empty()


def test_loaded_modules_are_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    monkeypatch.setattr(modules, "MODULES_KEPT", 3)
    for value in range(8):
        assert host.run(guest(f"(i32.const {value})")).code == value
    kept = host.runtime._starter._modules
    assert len(kept._kept) == 3
    assert kept._bytes == sum(size for _, size in kept._kept.values())
    monkeypatch.setattr(modules, "KEPT_BYTES", 1)
    host.run(guest("(i32.const 99)"))
    assert len(kept._kept) == 1
    host.runtime.close()
    assert (len(kept._kept), kept._bytes) == (0, 0)
