"""Triton kernels on a CPU: import this before a module with kernels.

``TRITON_INTERPRET`` is set in ``tests/conftest.py``, because whether a kernel is interpreted is decided when
triton is imported, and other libraries import it too.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton import knobs
from triton import language as tl
from triton.runtime import interpreter

assert knobs.runtime.interpret, "triton was imported without TRITON_INTERPRET=1"

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    """Let ``range`` take scalars of a kernel: triton 3.6 has them as arrays of one element, NumPy 2.4 refuses those."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_and_index

_patch_language = interpreter._patch_lang
_patched = False


def _patch_language_once(function: Any) -> Any:
    """Patch triton's language for a kernel and all that it calls.

    Triton does it anew, on top of what it did before, at each call of one function by another: most of the time.
    """
    global _patched
    if _patched:
        return SimpleNamespace(restore=lambda: None)
    _patched = True
    scope = _patch_language(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))

    def restore() -> None:
        global _patched
        _patched = False
        scope.restore()

    return SimpleNamespace(restore=restore)


interpreter._patch_lang = _patch_language_once
