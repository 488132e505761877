"""What can go wrong, each with a stable ``code`` (the list is in ``sdk/README.md``).

Codes that only this package makes: ``auth_failed``, ``connect_failed``, ``connection_lost``, ``wait_timeout``,
``protocol_error``, ``slow_consumer`` and ``cancelled``.
"""

from __future__ import annotations

from typing import Any


class RealmError(Exception):
    """A typed failure.

    Attributes:
        code: stable identifier in ``snake_case``, for programs.
        message: one or two sentences for a person.
        details: values a program may act on (the parameter's name, a limit, what was used).
        retry_after: seconds after which the same call may succeed, where waiting helps.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details: dict[str, Any] = details or {}
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class AuthenticationError(RealmError):
    """The key is unknown or revoked."""


class PermissionDenied(RealmError):
    """The key is good, but not for this."""


class NotFound(RealmError):
    """A module, adapter, model, run, upload, tenant or key that does not exist (for this tenant)."""


class InvalidRequest(RealmError):
    """The server refused what was asked; ``details["param"]`` names a parameter where one is wrong."""


class ModuleRefused(RealmError):
    """An upload or its content was refused; ``details`` say what."""


class AdapterRefused(RealmError):
    """An adapter was refused; ``details`` name the ``file``, the ``field`` of its configuration or the ``tensor``."""


class GuestFailed(RealmError):
    """The guest trapped or returned an error."""


class LimitExceeded(RealmError):
    """A limit of the tenant or of a run; ``details`` have its ``name``, ``limit``, ``used`` and ``unit``."""


class Unavailable(RealmError):
    """The server cannot do it now; the same call may succeed after ``retry_after`` seconds."""


class RateLimited(LimitExceeded, Unavailable):
    """A limit of the tenant is used up at the moment; ``retry_after`` says for how long."""


class ConnectionLost(RealmError):
    """No connection could be made, or it ended; ``details["close_code"]`` when the server said why."""


class WaitTimeout(RealmError, TimeoutError):
    """One wait took too long. The connection and its other calls go on."""


class ProtocolError(RealmError):
    """The server sent something that is not in the protocol; the connection is closed."""


_INVALID = {"malformed_message", "unknown_function", "invalid_params", "duplicate_id", "already_exists"}
_LIMITS = {
    "limit_exceeded",
    "fuel_exhausted",
    "wall_time_exceeded",
    "first_call_timeout",
    "memory_limit",
    "output_limit",
    "token_limit",
}
_UNAVAILABLE = {"busy", "worker_lost", "engine_lost", "shutting_down", "artifact_damaged"}


def _class_of(code: str) -> type[RealmError]:
    if code == "auth_failed":
        return AuthenticationError
    if code in ("forbidden", "tenant_mismatch"):
        return PermissionDenied
    if code.endswith("_not_found"):
        return NotFound
    if code in _INVALID or code == "context_length_exceeded":
        return InvalidRequest
    if code == "rate_limited":
        return RateLimited
    if code in _LIMITS:
        return LimitExceeded
    if code in _UNAVAILABLE:
        return Unavailable
    if code.startswith("guest_"):
        return GuestFailed
    if code.startswith(("module_", "upload_")) or code == "compile_limit":
        return ModuleRefused
    if code in ("adapter_invalid", "adapter_too_large"):
        return AdapterRefused
    return RealmError


def error_of(
    code: str, message: str, details: dict[str, Any] | None = None, retry_after: float | None = None
) -> RealmError:
    """The error the server reported, as the class that fits its code."""
    return _class_of(code)(code, message, details=details, retry_after=retry_after)
