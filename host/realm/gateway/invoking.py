"""Carrying one call out, and what becomes of it when its function fails."""

from __future__ import annotations

import asyncio
import logging
import secrets
from functools import partial
from typing import Any

from realm.errors import RealmError
from realm.gateway.calls import Call
from realm.gateway.functions import Caller, Functions
from realm.gateway.session import Invoke

log = logging.getLogger("realm.gateway")


def invoke(functions: Functions, caller: Caller, call: Call, action: Invoke) -> None:
    """Begin a call; whatever happens, it gets exactly one last reply, now or later."""
    name = action.function.name
    try:
        result = functions.handlers[name](caller, call, action.params)
        if asyncio.iscoroutine(result):
            call.task = asyncio.get_running_loop().create_task(result)
            call.task.add_done_callback(partial(_finish, call, name))
        elif result is not None:
            call.complete(result)
    except RealmError as error:
        call.fail(error)
    except Exception as error:
        call.fail(internal_error(name, error))


def _finish(call: Call, function: str, task: asyncio.Task[dict[str, Any] | None]) -> None:
    call.task = None
    if task.cancelled():
        # By `cancel`, or because the client is gone (then nothing is sent).
        call.cancelled({})
        return
    error = task.exception()
    if error is None:
        result = task.result()
        if result is not None:
            call.complete(result)
    elif isinstance(error, RealmError):
        call.fail(error)
    else:
        call.fail(internal_error(function, error))


def internal_error(what: str, cause: BaseException) -> RealmError:
    """Log what went wrong under a number that the client gets."""
    correlation = secrets.token_hex(6)
    log.error("%s failed (correlation %s)", what, correlation, exc_info=cause)
    return RealmError("internal", "the host failed; its log has the cause", details={"correlation": correlation})
