"""``realm models``: what is on disk. Works without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from realm.cli.terminal import err, out, table
from realm.settings import default_home

DEFAULT_MODEL = "smollm2-135m-instruct"

app = typer.Typer(help="Models on this machine.", no_args_is_help=True)

_STAGES = {
    "waiting": "waiting for another import",
    "download": "downloading",
    "unpack": "unpacking",
    "hash": "hashing",
    "tokenizer": "making the tokenizer",
    "weights": "converting the weights",
    "check": "checking",
}


class ImportProgress:
    """A bar for each stage of an import, on standard error."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description:26}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=err()
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """What :func:`realm.models.importer.import_model` calls."""
        if stage not in self._tasks:
            self._tasks[stage] = self.bars.add_task(_STAGES.get(stage, stage), total=max(total, 1))
        self.bars.update(self._tasks[stage], completed=done if total else 1, total=max(total, 1))


def import_with_progress(source: str, home: Path, name: str | None, dtype: str, force: bool) -> str:
    """Import a model and show how far it is; its name."""
    # torch is behind this import.
    from realm.models.importer import import_model

    progress = ImportProgress()
    with progress.bars:
        entry = import_model(source, home=home, name=name, dtype=dtype, force=force, progress=progress)
    return entry.name


@app.command("import")
def import_command(
    source: Annotated[
        str,
        typer.Argument(help="A known model's name, a Hugging Face folder, or a .gguf file of the Llama family."),
    ] = DEFAULT_MODEL,
    name: Annotated[str | None, typer.Option(help="What to call it.", show_default="made from the source")] = None,
    dtype: Annotated[str, typer.Option(help="Of the stored weights: bfloat16 or float32.")] = "bfloat16",
    force: Annotated[bool, typer.Option("--force", help="Replace a model of the same name.")] = False,
) -> None:
    """Bring a model into the data folder: all of it, or nothing."""
    home = default_home()
    made = import_with_progress(source, home, name, dtype, force)
    out().print(f"{made} is in {home / 'models' / made}")


@app.command("list")
def list_command() -> None:
    """List the models in the data folder."""
    from realm.models.store import list_models

    entries = list_models(default_home())
    listed = table("NAME", "PARAMETERS", "CONTEXT", "DTYPE", "SOURCE", right=("PARAMETERS", "CONTEXT"))
    for entry in entries:
        parameters = f"{entry.parameters / 1e6:.1f} M"
        listed.add_row(entry.name, parameters, str(entry.context_length), entry.dtype, entry.source)
    out().print(listed if entries else f"no models: `realm models import {DEFAULT_MODEL}` fetches a small one")
