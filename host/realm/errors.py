"""Errors a user can meet, each with a stable ``code``.

Every failure that leaves a process is a :class:`RealmError`: ``code`` is for programs and never
changes meaning, ``message`` says what happened, why, and what to do about it.
"""

from __future__ import annotations

from typing import Any


class RealmError(Exception):
    """A typed failure.

    Attributes:
        code: stable identifier in ``snake_case`` (the list is in ``sdk/README.md``).
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
