"""Adapters between the gateway and the engine: what it is told and when, and what it knows."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
from functools import partialmethod
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from realm.errors import RealmError
from realm.gateway.adapters import AdapterBook
from realm.gateway.links import EngineClient
from realm.messages import AdapterFile, AdapterGone, AdapterState
from realm.registry.records import AdapterRecord
from realm.run_messages import StartRun
from tests.fake_host import FakeEngine, FakeWorker, async_test, eventually, fake_host, hang
from tests.gateway_adapters import CONFIG, add, blob, send, weights

# --- what it knows ---------------------------------------------------------------------------


@async_test
async def test_states_come_from_the_engine(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client, host.client("admin") as admin:
        for seed, name in enumerate(("a", "b", "c")):
            await add(client, name, weights(seed))
        await add(admin, "house", weights(5))
        await admin.data("adapters.share", name="house", shared=True)
        host.engine.states["alice"] = [
            AdapterState("a", "resident", 3, 1),
            AdapterState("b", "failed", 0, 2, "it is gone"),
            AdapterState("gone", "cached", 9, 9),
        ]
        host.engine.states[""] = [AdapterState("a", "loading", 7, 7)]
        host.engine.asked.clear()
        listed = {adapter["name"]: adapter for adapter in (await client.data("adapters.list"))["adapters"]}
        assert sorted(host.engine.asked) == ["", "alice"]
        seen = {
            name: tuple(adapter.get(key) for key in ("state", "sequences", "loads", "error"))
            for name, adapter in listed.items()
        }
        assert seen == {
            "a": ("resident", 3, 1, None),
            "b": ("failed", 0, 2, "it is gone"),
            "c": ("registered", 0, 0, None),
            "house": ("registered", None, None, None),
        }
        assert "error" not in listed["a"]


@async_test
async def test_without_an_engine_its_part_is_left_out(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host, host.client() as client:
        await add(client, "a", weights(1))
        await host.lose_engine()
        for adapter in (
            (await client.data("adapters.list"))["adapters"][0],
            await client.data("adapters.show", name="a"),
            await client.data("adapters.pin", name="a", pinned=True),
            await add(client, "b", weights(2)),
        ):
            assert not {"state", "sequences", "loads", "error"} & adapter.keys() and adapter["rank"] == 2


@async_test
async def test_an_engine_that_goes_while_it_is_asked(tmp_path: Path) -> None:
    def script(worker: FakeWorker, start: StartRun) -> None:
        raise AssertionError("nothing is run here")

    async with fake_host(tmp_path, script=script) as host, host.client() as client:
        await add(client, "a", weights(1))
        host.engine.gate.clear()
        call = await client.start("adapters.list")
        await eventually(lambda: len(host.engine.asked) == 2)
        host.engine.die()
        (reply,) = await client.replies(call)
        assert reply["status"] == "complete" and "state" not in reply["data"]["adapters"][0]


# --- what it is told -----------------------------------------------------------------------------


def told(engine: FakeEngine) -> list[tuple[Any, ...]]:
    return [
        (m.tenant, m.name, m.sha256[:6], m.pinned) if isinstance(m, AdapterFile) else (m.tenant, m.name)
        for m in engine.adapters
    ]


def short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:6]


@async_test
async def test_each_change_is_told_once_and_in_order(tmp_path: Path) -> None:
    one, two = weights(1), weights(2)
    async with fake_host(tmp_path) as host, host.client() as alice, host.client("admin") as admin:
        await add(alice, "legal", one)
        (file,) = host.engine.adapters
        assert isinstance(file, AdapterFile)
        assert file == AdapterFile("alice", "legal", str(blob(host, one)), hashlib.sha256(one).hexdigest(), file.config)
        assert json.loads(file.config) == CONFIG and blob(host, one).exists()
        await alice.data("adapters.pin", name="legal", pinned=True)
        await add(alice, "legal", two)
        await alice.data("adapters.remove", name="legal")
        await add(admin, "house", one)
        await admin.data("adapters.share", name="house", shared=True)
        await admin.data("adapters.share", name="house", shared=True)
        await add(admin, "house", two)
        await admin.data("adapters.pin", name="house", pinned=True)
        await admin.data("adapters.share", name="house", shared=False)
        await admin.data("adapters.share", name="house", shared=True)
        await admin.data("adapters.remove", name="house")
        # What is refused is not told.
        await alice.error("adapters.remove", name="legal")
        await alice.data("adapters.list")
        assert told(host.engine) == [
            ("alice", "legal", short(one), False),
            ("alice", "legal", short(one), True),
            ("alice", "legal", short(two), True),
            ("alice", "legal"),
            ("admin", "house", short(one), False),
            ("", "house", short(one), False),
            ("admin", "house"),
            ("", "house", short(one), False),
            ("", "house", short(two), False),
            ("", "house", short(two), True),
            ("admin", "house", short(two), True),
            ("", "house"),
            ("", "house", short(two), True),
            ("admin", "house"),
            ("", "house"),
        ]


@async_test
async def test_the_configuration_is_told_as_it_came(tmp_path: Path) -> None:
    """To the byte: the engine reads what was checked."""
    config = '{ "peft_type":"LORA",  "r":2,"lora_alpha":4.0, "task_type":"\\u00e9"}'
    async with fake_host(tmp_path) as host, host.client() as client:
        content = weights()
        params = {"name": "x", "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        await client.send(
            f'{{"id":1,"function":"adapters.begin","params":{json.dumps(params)[:-1]},"config":{config}}}}}'
        )
        upload = (await client.receive())["data"]["upload"]
        await client.chunk(upload, 0, content)
        await client.data("adapters.commit", upload=upload)
        (file,) = host.engine.adapters
        assert isinstance(file, AdapterFile) and file.config == config.encode()
        kept = await host.registry.run(lambda database: database.adapters.find("alice", "x"))
        assert kept.config == config.encode()


@async_test
async def test_a_commit_is_answered_when_the_engine_knows(tmp_path: Path) -> None:
    """Guests reach the engine over other links: a run that follows the answer must find the adapter."""
    async with fake_host(tmp_path) as host, host.client() as client:
        host.engine.gate.clear()
        upload = await send(client, "legal", weights())
        call = await client.start("adapters.commit", upload=upload)
        await eventually(lambda: host.engine.asked == ["alice"])
        assert [m.name for m in host.engine.adapters] == ["legal"]
        health = await client.start("health")
        assert (await client.receive())["id"] == health
        host.engine.gate.set()
        assert (await client.replies(call))[-1]["status"] == "complete"


@async_test
async def test_a_new_engine_is_told_all_before_any_run(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as alice, host.client("admin") as admin:
        for seed, name in enumerate(("a", "b", "c")):
            await add(alice, name, weights(seed))
        await alice.data("adapters.pin", name="b", pinned=True)
        await add(admin, "house", weights(5))
        await admin.data("adapters.share", name="house", shared=True)
        await host.lose_engine()
        # Changes while nobody is there to be told.
        await alice.data("adapters.remove", name="a")
        await add(alice, "c", weights(6))
        await add(alice, "d", weights(7))
        await admin.data("adapters.pin", name="house", pinned=True)
        assert (await alice.error("generate", prompt="x", adapter="d"))["code"] == "engine_lost"
        gate = asyncio.Event()
        await host.restart_engine(gate)
        await eventually(lambda: host.engine.asked == [""])
        assert sorted(told(host.engine)) == [
            ("", "house", short(weights(5)), True),
            ("alice", "b", short(weights(1)), True),
            ("alice", "c", short(weights(6)), False),
            ("alice", "d", short(weights(7)), False),
        ]
        # It has been told, and nobody knows yet that it has listened.
        error = await alice.error("generate", prompt="x")
        assert error["code"] == "engine_lost" and error["retry_after"] and not host.worker.starts
        assert (await alice.data("health"))["status"] == "degraded"
        gate.set()
        await eventually(lambda: host.gateway.status == "healthy")
        assert (await alice.data("generate", prompt="x", adapter="d"))["text"] == "x"
        await alice.data("adapters.remove", name="d")
        await alice.data("adapters.list")
        assert told(host.engine)[4:] == [("alice", "d")]
        # Once more, and without any.
        for client, name in ((alice, "b"), (alice, "c"), (admin, "house")):
            await client.data("adapters.remove", name=name)
        await host.lose_engine()
        await host.restart_engine()
        assert (await alice.data("generate", prompt="x"))["text"] == "x"
        assert host.engine.adapters == [] and host.engine.asked == []


@async_test
async def test_an_engine_that_goes_before_it_has_listened_takes_no_runs(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await add(client, "a", weights())
        await host.lose_engine()
        gate = asyncio.Event()
        await host.restart_engine(gate)
        await eventually(lambda: host.engine.asked == [""])
        await host.lose_engine()
        for _ in range(5):
            assert (await client.error("generate", prompt="x"))["code"] == "engine_lost"
        # The first engine's news does not open the gate for the second.
        second = asyncio.Event()
        await host.restart_engine(second)
        gate.set()
        await eventually(lambda: host.engine.asked == [""])
        assert (await client.error("generate", prompt="x"))["code"] == "engine_lost"
        second.set()
        await eventually(lambda: host.gateway.status == "healthy")
        await client.data("generate", prompt="x")


@async_test
async def test_an_engine_that_says_nothing_of_adapters_gets_runs_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Most runs need no adapter."""
    impatient = partialmethod(EngineClient.adapters, patience=0.05)
    async with fake_host(tmp_path) as host, host.client() as alice:
        await add(alice, "a", weights())
        await host.lose_engine()
        monkeypatch.setattr(EngineClient, "adapters", impatient)
        gate = asyncio.Event()
        await host.restart_engine(gate)
        await eventually(lambda: host.gateway.status == "healthy")
        assert "has not said that it knows the adapters" in caplog.text and "did not answer in 0.05" in caplog.text
        gate.set()
        assert (await alice.data("generate", prompt="x"))["text"] == "x"


@async_test
async def test_a_change_counts_though_its_caller_has_left(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await add(client, "a", weights())
        release = threading.Event()
        async with host.client() as other:
            host.registry.post(lambda database: release.wait(8), tenant="bob")
            await other.start("adapters.remove", name="a")
            await other.start("health")
            assert (await other.receive())["id"] == 2
        await eventually(lambda: host.gateway.quotas.of("alice").connections == 1)
        release.set()
        await eventually(lambda: told(host.engine)[1:] == [("alice", "a")])
        assert (await client.data("adapters.list"))["adapters"] == []


# --- the book, in any order of changes ------------------------------------------------------------

WHO = st.sampled_from(["admin", "alice", "bob"])
WHAT = st.sampled_from(["a", "b"])


class Book(RuleBasedStateMachine):
    """Beside a model of the registry, and of an engine that does as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.book = AdapterBook("tiny", lambda sha256: Path("/blobs") / sha256)
        self.rows: dict[tuple[str, str], AdapterRecord] = {}
        self.engine: dict[tuple[str, str], AdapterFile] = {}

    def tell(self, changes: list[AdapterFile | AdapterGone], name: str, tenant: str, *, stays: bool) -> None:
        for change in changes:
            assert change.name == name
            if isinstance(change, AdapterFile):
                self.engine[change.tenant, name] = change
            else:
                # Nothing is taken away that was not there.
                del self.engine[change.tenant, name]
            if stays:
                # Not for a moment is a name unknown that stands for something before and after.
                assert (tenant, name) in self.engine or ("", name) in self.engine

    def usable(self, row: AdapterRecord | None) -> bool:
        return row is not None and row.model == "tiny"

    @rule(tenant=WHO, name=WHAT, sha256=st.sampled_from(["1", "2"]), model=st.sampled_from(["tiny", "tiny", "other"]))
    def commit(self, tenant: str, name: str, sha256: str, model: str) -> None:
        old = self.rows.get((tenant, name))
        record = AdapterRecord(
            sha256=sha256,
            size=1,
            model=model,
            config=b"{}",
            rank=1,
            alpha=1.0,
            targets=(),
            parameters=1,
            tenant=tenant,
            name=name,
            version=1,
            created=0.0,
            pinned=old.pinned if old else False,
            shared=old.shared if old else False,
        )
        self.rows[tenant, name] = record
        self.tell(self.book.put(record), name, tenant, stays=self.usable(old) and model == "tiny")

    @rule(tenant=WHO, name=WHAT, pinned=st.booleans())
    def pin(self, tenant: str, name: str, pinned: bool) -> None:
        self.change(tenant, name, pinned=pinned)

    @rule(name=WHAT, shared=st.booleans())
    def share(self, name: str, shared: bool) -> None:
        self.change("admin", name, shared=shared)

    def change(self, tenant: str, name: str, **values: bool) -> None:
        old = self.rows.get((tenant, name))
        if old is not None:
            self.rows[tenant, name] = record = msgspec.structs.replace(old, **values)
            self.tell(self.book.put(record), name, tenant, stays=self.usable(old))

    @rule(tenant=WHO, name=WHAT)
    def remove(self, tenant: str, name: str) -> None:
        self.tell(self.book.drop(tenant, name), name, tenant, stays=False)
        self.rows.pop((tenant, name), None)

    @invariant()
    def all_agree(self) -> None:
        files = list(self.book.files())
        assert {(file.tenant, file.name): file for file in files} == self.engine and len(files) == len(self.engine)
        assert len(self.engine) == sum(map(self.usable, self.rows.values()))
        for tenant in ("admin", "alice", "bob", "nobody"):
            visible = self.book.visible(tenant)
            own = [row for (who, _), row in self.rows.items() if who == tenant]
            assert [row for row in visible if row.tenant == tenant] == sorted(own, key=lambda row: row.name)
            assert all(row.tenant == tenant or (row.shared and row.tenant == "admin") for row in visible)
            for name in ("a", "b"):
                # What the engine would take: the tenant's own first, then what is shared.
                file = self.engine.get((tenant, name)) or self.engine.get(("", name))
                try:
                    self.book.check_usable(tenant, name)
                except RealmError as error:
                    assert file is None and error.code == "adapter_not_found"
                    assert name not in error.details["available"]
                    assert all(
                        (tenant, other) in self.engine or ("", other) in self.engine
                        for other in error.details["available"]
                    )
                else:
                    assert file is not None
                    found = self.book.find(tenant, name)
                    assert (found.sha256, found.pinned) == (file.sha256, file.pinned) and found in visible


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


# --- nothing of it needs torch --------------------------------------------------------------------


def test_the_gateway_does_without_torch() -> None:
    code = "import sys, realm.serve, realm.gateway.adapters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
