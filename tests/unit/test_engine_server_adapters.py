"""Adapters through the engine process's real socket, from real files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from realm.adapters.made_up import CONFIG_FILE, TENSORS_FILE, write_random_adapter
from realm.engine.adapter_loader import AdapterLoader
from realm.engine.batch import NoAdapterMemory
from realm.guests.abi import ErrorCode
from realm.messages import (
    AdapterFile,
    AdapterGone,
    AdaptersRequest,
    AdapterState,
    AdapterStates,
    ApplyAdapter,
    CallDone,
    CallFailed,
    EngineResult,
    ForwardDone,
    OpenSequence,
    WorkerTurn,
)
from realm.models.config import ModelConfig
from tests.engine_link import Link
from tests.engine_process import Engine, running
from tests.tiny import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-served")
    make_model(path)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    yield from running(folder, tmp_path_factory.mktemp("engine"))


def adapter_file(
    folder: Path, place: Path, name: str = "legal", *, tenant: str = "t1", seed: int = 1, rank: int = 4
) -> AdapterFile:
    write_random_adapter(place, ModelConfig.load(folder), rank=rank, seed=seed, scale=0.5)
    path = place / TENSORS_FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return AdapterFile(tenant, name, str(path), digest, (place / CONFIG_FILE).read_bytes())


_numbers = iter(range(1, 1000))


def new_worker(engine: Engine) -> Link:
    return engine.worker(next(_numbers))


def ask(link: Link, *ops: object) -> EngineResult:
    link.channel.send(WorkerTurn(list(ops)))  # type: ignore[arg-type]
    results: list[EngineResult] = []
    while not results:
        results = link.results()
    (result,) = results
    return result


def text(link: Link, seq: int, count: int = 12, tokens: list[int] | None = None) -> list[int]:
    """Greedy tokens after a prompt."""
    drawn: list[int] = []
    call, ask_for = 1000, tokens or [5, 6, 7]
    for _ in range(count):
        call += 1
        done = ask(link, link.forward(call, seq, ask_for))
        assert isinstance(done, ForwardDone), done
        drawn.append(done.token)
        ask_for = [done.token]
    return drawn


def states(engine: Engine, tenant: str) -> list[AdapterState]:
    engine.gateway.channel.send(AdaptersRequest(9, tenant))
    answer = engine.gateway.next()
    assert isinstance(answer, AdapterStates) and answer.call == 9
    return answer.states


def test_an_engine_at_rest_wakes_when_an_adapter_is_there(engine: Engine, folder: Path, tmp_path: Path) -> None:
    engine.gateway.channel.send(adapter_file(folder, tmp_path))
    link = new_worker(engine)
    base = link.seq(1)
    link.channel.send(WorkerTurn([OpenSequence(base, "t1", 1)]))
    plain = text(link, 1)
    assert ask(link, OpenSequence(link.seq(2), "t1", 1), ApplyAdapter(1, link.seq(2), "legal")) == CallDone(1, 4)
    adapted = text(link, 2)
    assert adapted != plain
    assert ask(link, ApplyAdapter(2, link.seq(2), "")) == CallDone(2, 0)
    link.channel.send(WorkerTurn([OpenSequence(link.seq(3), "t1", 1)]))
    assert text(link, 3) == plain
    assert states(engine, "t1") == [AdapterState("legal", "resident", 0, 1)]
    assert engine.stats().adapters == 1
    engine.gateway.channel.send(AdapterGone("t1", "legal"))
    failed = ask(link, ApplyAdapter(3, link.seq(2), "legal"))
    assert isinstance(failed, CallFailed) and failed.code == ErrorCode.NOT_FOUND
    assert states(engine, "t1") == []


def test_files_that_are_not_what_was_said(engine: Engine, folder: Path, tmp_path: Path) -> None:
    link = new_worker(engine)
    link.channel.send(WorkerTurn([OpenSequence(link.seq(1), "t2", 1)]))
    good = adapter_file(folder, tmp_path / "good", tenant="t2")
    content = Path(good.path).read_bytes()
    cases = {
        "gone": (None, good.sha256, good.config),
        "other": (content[:-1] + bytes([content[-1] ^ 1]), good.sha256, good.config),
        "short": (content[:-1], None, good.config),
        "junk": (b"\xff" * 64, None, good.config),
        "empty": (b"", None, good.config),
        "config": (content, None, b"{"),
    }
    for number, (name, (data, sha256, config)) in enumerate(cases.items(), 1):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        digest = sha256 or hashlib.sha256(data or b"").hexdigest()
        engine.gateway.channel.send(AdapterFile("t2", name, str(path), digest, config))
        # The gateway's message and the worker's come by different links.
        engine.stats()
        failed = ask(link, ApplyAdapter(number, link.seq(1), name))
        assert isinstance(failed, CallFailed) and failed.code == ErrorCode.NOT_FOUND, name
        assert str(tmp_path) not in failed.message, "a tenant is told where files lie"
    assert {state.state for state in states(engine, "t2")} == {"failed"}
    assert len(text(link, 1)) == 12


def test_only_the_gateway_says_which_adapters_there_are(engine: Engine, folder: Path, tmp_path: Path) -> None:
    for message in (adapter_file(folder, tmp_path), AdapterGone("t1", "legal"), AdaptersRequest(1, "t1")):
        link = new_worker(engine)
        link.channel.send(message)
        assert link.gone()
    assert engine.stats().adapters >= 0


def test_an_adapter_that_takes_more_than_there_is(folder: Path, tmp_path: Path) -> None:
    for engine in running(folder, tmp_path, "--adapter-memory=1"):
        engine.gateway.channel.send(adapter_file(folder, tmp_path / "a", rank=256))
        engine.gateway.channel.send(adapter_file(folder, tmp_path / "b", "small"))
        engine.stats()
        link = new_worker(engine)
        failed = ask(link, OpenSequence(link.seq(1), "t1", 1), ApplyAdapter(1, link.seq(1), "legal"))
        assert isinstance(failed, CallFailed) and failed.code == ErrorCode.OUT_OF_MEMORY
        assert "1,048,576" in failed.message and "--adapter-memory" in failed.message
        assert ask(link, ApplyAdapter(2, link.seq(1), "small")) == CallDone(2, 4)
        assert len(text(link, 1)) == 12


def test_an_engine_that_was_started_without_adapters(folder: Path, tmp_path: Path) -> None:
    for engine in running(folder, tmp_path, "--adapter-memory=-1"):
        engine.gateway.channel.send(adapter_file(folder, tmp_path / "a"))
        link = new_worker(engine)
        failed = ask(link, OpenSequence(link.seq(1), "t1", 1), ApplyAdapter(1, link.seq(1), "legal"))
        assert isinstance(failed, CallFailed) and failed.code == ErrorCode.NOT_SUPPORTED
        assert len(text(link, 1)) == 12


def test_a_loader_ends_with_its_thread(folder: Path) -> None:
    import torch

    loader = AdapterLoader(NoAdapterMemory(torch.float32), ModelConfig.load(folder))
    loader.read("/nowhere", "", b"")
    deadline = time.monotonic() + 20
    while (outcome := loader.take()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert isinstance(outcome[0], Exception) and not loader.busy
    loader.close()
    loader.close()
    assert not loader._thread.is_alive()
