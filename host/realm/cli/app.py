"""All commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

import realm
from realm.cli import adapters, admin, bench, client_commands, models, run, serving
from realm.cli.terminal import ErrorGroup


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"realm {realm.__version__}")
        raise typer.Exit


def make_app() -> typer.Typer:
    """The application: one command or group a line."""
    app = typer.Typer(
        cls=ErrorGroup,
        help="Run tenants' WebAssembly guests next to one shared model.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        """Run tenants' WebAssembly guests next to one shared model."""

    app.command()(serving.serve)
    app.command()(serving.doctor)
    app.command(hidden=True)(serving.demo)
    app.command()(run.run)
    app.command()(client_commands.push)
    app.command()(client_commands.ps)
    app.command()(client_commands.logs)
    app.command()(client_commands.cancel)
    app.command()(client_commands.generate)
    app.command()(client_commands.login)
    app.add_typer(client_commands.modules_app, name="modules")
    app.add_typer(adapters.app, name="adapters")
    app.add_typer(models.app, name="models")
    app.add_typer(bench.app, name="bench")
    app.add_typer(admin.tenants_app, name="tenants")
    app.add_typer(admin.keys_app, name="keys")
    return app


app = make_app()
