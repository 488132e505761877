"""Fixtures that every kind of test uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports triton: tests run its kernels on the CPU (tests.interpreter), except those in tests/gpu.
os.environ["TRITON_INTERPRET"] = "1"

from realm.models.importer import import_model
from realm.settings import default_home

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def realm_home() -> Path:
    """The data folder, of which tests use only the imported model: so it is imported once."""
    return default_home()


@pytest.fixture(scope="session")
def model_folder(realm_home: Path) -> Path:
    """The folder of the real model (imported if it is not there)."""
    return import_model(MODEL, home=realm_home).path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes in one thread: for tiny tensors others only wait for each other, long on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
