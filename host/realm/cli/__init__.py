"""The command line. Nothing is imported before it is known to be needed: ``realm ps`` must start fast."""

from __future__ import annotations


def main() -> None:
    """Entry point of ``realm``."""
    from realm.cli.app import app

    app(prog_name="realm")
