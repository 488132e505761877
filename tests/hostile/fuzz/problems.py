"""What counts as a finding."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class Problem(Exception):
    """An invariant does not hold: a finding."""


@contextmanager
def no_host_errors() -> Iterator[None]:
    """Whatever Realm logs as an error means that a host-side exception came to light. Raises :class:`Problem`."""
    records: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(logging.Formatter().format(record))

    keeper = Keeper(logging.ERROR)
    logger = logging.getLogger("realm")
    logger.addHandler(keeper)
    try:
        yield
    finally:
        logger.removeHandler(keeper)
    if records:
        raise Problem("the host logged an error:\n" + "\n".join(records)[:4000])
