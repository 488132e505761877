"""Host functions whose work is done while the guest waits, off its small stack and between slices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from realm.guests.run import GuestRun

P = ParamSpec("P")


def deferred(
    method: Callable[Concatenate[Any, GuestRun, P], int],
) -> Callable[Concatenate[Any, GuestRun, P], None]:
    """Decorates a method: the call is put aside as ``run.job`` and the guest waits for its result."""

    def put_aside(self: Any, run: GuestRun, /, *args: P.args, **kwargs: P.kwargs) -> None:
        run.job = functools.partial(method, self, run, *args, **kwargs)

    put_aside.__doc__ = method.__doc__
    return put_aside
