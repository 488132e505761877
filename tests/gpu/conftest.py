"""Tests that need a CUDA GPU. They are no part of ``make test``: run ``python -m pytest tests/gpu``."""

from __future__ import annotations

import os

import pytest

# Set for all other tests. This file is read before anything imports triton.
os.environ.pop("TRITON_INTERPRET", None)


def pytest_collection(session: pytest.Session) -> None:
    """Fail at once rather than skip: these tests are only run on purpose."""
    import torch

    if not torch.cuda.is_available():
        pytest.exit("tests/gpu needs a CUDA GPU, and torch sees none here", returncode=1)
