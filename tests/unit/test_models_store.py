"""The list of models on disk."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from realm.errors import RealmError
from realm.models.store import ModelRecord, check_name, choose_model, list_models, models_dir


def add(home: Path, name: str) -> Path:
    folder = models_dir(home) / name
    folder.mkdir(parents=True)
    record = ModelRecord(
        name=name,
        source="pypi:x==1",
        sha256="0" * 64,
        architecture="LlamaForCausalLM",
        parameters=7,
        dtype="bfloat16",
        context_length=128,
        created="2026-01-01T00:00:00+00:00",
    )
    (folder / "realm.json").write_bytes(msgspec.json.encode(record))
    return folder


def test_an_empty_home_has_no_models(tmp_path: Path) -> None:
    assert list_models(tmp_path) == []
    with pytest.raises(RealmError, match="no model is imported yet") as caught:
        choose_model(tmp_path, "a")
    assert (caught.value.code, caught.value.details) == ("model_not_found", {"available": []})


def test_models_are_found_by_name_and_unfinished_ones_are_not(tmp_path: Path) -> None:
    folder = add(tmp_path, "b")
    add(tmp_path, "a").rename(models_dir(tmp_path) / "renamed")
    add(tmp_path, ".import-x")
    (models_dir(tmp_path) / "half").mkdir()
    assert [entry.name for entry in list_models(tmp_path)] == ["b", "renamed"]
    assert list_models(tmp_path)[0].path == folder == choose_model(tmp_path, "b")
    with pytest.raises(RealmError, match="choose with --model from b, renamed"):
        choose_model(tmp_path, "half")


@pytest.mark.parametrize("name", ["", ".", "..", "../b", "a/b", "A", "-x", ".import-x", "x" * 101, "a\0", "a\n"])
def test_names_that_are_no_names_are_refused(tmp_path: Path, name: str) -> None:
    add(tmp_path, "b")
    with pytest.raises(RealmError) as caught:
        check_name(name)
    assert caught.value.details == {"param": "name"}
    if name:  # an empty one means the only model there is
        with pytest.raises(RealmError) as caught:
            choose_model(tmp_path, name)
        assert caught.value.code == "model_not_found"


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (add(tmp_path, "b") / "realm.json").write_text('{"name": 5}')
    with pytest.raises(RealmError, match=r"b/realm\.json cannot be read"):
        list_models(tmp_path)
