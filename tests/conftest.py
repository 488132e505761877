"""Fixtures that every kind of test uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from realm.models.importer import import_model

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def realm_home() -> Path:
    """A data folder kept between test runs, so that the real model is imported once."""
    return Path(os.environ.get("REALM_TEST_HOME") or Path(__file__).parent.parent / ".cache" / "realm-home")


@pytest.fixture(scope="session")
def model_folder(realm_home: Path) -> Path:
    """The folder of the real model (imported if it is not there)."""
    return import_model(MODEL, home=realm_home).path
