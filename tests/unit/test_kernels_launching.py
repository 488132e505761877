"""Which launches go to triton, and which to what it compiled for one of the same kind before."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from realm.engine.kernels.launching import Kernel


class FakeFunction:
    """A triton function: a launch returns the compiled kernel, which can be launched too."""

    def __init__(self, interprets: bool = False) -> None:
        self.interprets = interprets
        self.launches: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            self.launches.append(("function", grid, args, options))
            return None if self.interprets else FakeCompiled(self)

        return launch

    def paths(self) -> list[str]:
        return [path for path, *_ in self.launches]


class FakeCompiled:
    def __init__(self, function: FakeFunction) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: self.function.launches.append(("compiled", grid, args, {}))


FLOATS, TABLE = torch.zeros(64), torch.zeros(64, dtype=torch.int32)


def test_a_launch_of_a_known_kind_uses_the_compiled_kernel() -> None:
    function = FakeFunction()
    kernel = Kernel(function)
    kernel.launch((1, 2, 3), (FLOATS, TABLE), (5,), (64, True), warps=4)
    kernel.launch((7, 1, 1), (FLOATS[4:], TABLE), (6,), (64, True), warps=4)
    first, second = function.launches
    assert first == ("function", (1, 2, 3), (FLOATS, TABLE, 5, 64, True), {"num_warps": 4, "num_stages": 3})
    path, grid, (floats, _, *rest), _ = second
    assert (path, grid, rest) == ("compiled", (7, 1, 1), [6, 64, True])
    assert floats.data_ptr() == FLOATS[4:].data_ptr()


def test_other_types_and_constants_are_other_kinds() -> None:
    function = FakeFunction()
    kernel = Kernel(function)
    for tensors, constants, warps in [
        ((FLOATS, TABLE), (1,), 4),
        ((FLOATS.bfloat16(), TABLE), (1,), 4),
        ((FLOATS, TABLE.long()), (1,), 4),
        ((FLOATS, TABLE), (2,), 4),
        ((FLOATS, TABLE), (1,), 8),
    ]:
        kernel.launch((1, 1, 1), tensors, (), constants, warps=warps)
    assert function.paths() == ["function"] * 5


def test_unaligned_floats_are_left_to_triton_and_integers_are_not() -> None:
    function = FakeFunction()
    kernel = Kernel(function)
    kernel.launch((1, 1, 1), (FLOATS, TABLE), (), (), warps=4)
    kernel.launch((1, 1, 1), (FLOATS[1:], TABLE), (), (), warps=4)
    kernel.launch((1, 1, 1), (FLOATS, TABLE[1:]), (), (), warps=4)
    assert function.paths() == ["function", "function", "compiled"]


def test_the_interpreter_has_nothing_compiled() -> None:
    function = FakeFunction(interprets=True)
    kernel = Kernel(function)
    for _ in range(2):
        kernel.launch((1, 1, 1), (FLOATS,), (), (), warps=4)
    assert function.paths() == ["function", "function"]


def test_a_compiled_kernel_is_launched_with_all_arguments() -> None:
    """What :class:`Kernel` needs of the installed triton, and of no other place here is used without a GPU."""
    launched: list[tuple[Any, ...]] = []
    kernel = SimpleNamespace(
        _init_handles=lambda: None,
        launch_metadata=lambda grid, stream, *arguments: None,
        run=lambda *arguments: launched.append(arguments),
        function="function",
        packed_metadata="metadata",
    )
    CompiledKernel.__getitem__(kernel, (1, 2, 3))(FLOATS, 5, 64, True, stream=7)
    # What triton's own launch passes: grid, stream, function, both metadata, two hooks, every argument, constants too.
    (arguments,) = launched
    assert arguments[:5] == (1, 2, 3, 7, "function")
    assert len(arguments) == 9 + 4
    assert arguments[10:] == (5, 64, True)
    assert "*bound_args.values())" in inspect.getsource(JITFunction.run).rpartition("kernel.run(")[2]
