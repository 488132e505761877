"""A benchmark's own data folder: nothing of it is left, and nothing of the user's is changed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from realm.models.shapes import write_shape
from realm.models.store import choose_model
from realm.settings import default_home


@contextlib.contextmanager
def bench_home(shape: str, model: str) -> Iterator[tuple[Path, Path]]:
    """A data folder for the benchmark alone, and the model's folder in it; both are gone afterwards.

    Args:
        shape: of :data:`realm.models.shapes.SHAPES`; its weights are not there. model: else, a stored model's name
            or a model folder's path.

    Raises:
        RealmError: ``invalid_params`` or ``model_not_found`` if there is no such one.
    """
    with tempfile.TemporaryDirectory(prefix="realm-bench-") as name:
        home = Path(name)
        (home / "models").mkdir()
        # Kernels are compiled once, not for each benchmark.
        kernels = default_home() / "triton"
        kernels.mkdir(parents=True, exist_ok=True)
        (home / "triton").symlink_to(kernels)
        if shape:
            folder = home / "models" / shape
            write_shape(folder, shape)
        else:
            given = Path(model)
            found = given.resolve() if given.is_dir() else choose_model(default_home(), model).resolve()
            folder = home / "models" / found.name
            folder.symlink_to(found)
        yield home, folder
