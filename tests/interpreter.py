"""Triton kernels on a CPU: import this before a module with kernels.

``TRITON_INTERPRET`` is set in ``tests/conftest.py``, because whether a kernel is interpreted is decided when
triton is imported, and other libraries import it too.
"""

from __future__ import annotations

from typing import Any

from triton import knobs
from triton.runtime import interpreter

assert knobs.runtime.interpret, "triton was imported without TRITON_INTERPRET=1"

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    """Let ``range`` take scalars of a kernel: triton 3.6 has them as arrays of one element, NumPy 2.4 refuses those."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_and_index
