"""``realm run``: a guest on the server, or a ``.wasm`` file right here in one process."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from realm.cli.connection import KeyOption, UrlOption, connect
from realm.cli.terminal import err, printable, status, usage_line, write
from realm.errors import RealmError
from realm.models.store import choose_model
from realm.settings import default_home
from realm_sdk import Finished, Log, Output, Usage, Waiting
from realm_sdk import RealmError as SdkError


def run(
    module: Annotated[str, typer.Argument(help="A .wasm file to run here, or the name of a module on the server.")],
    input: Annotated[str | None, typer.Option("--input", "-i", help="The guest's input.")] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input-file", help="Read the input from a file; - is standard input.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Write output as it comes.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes the run repeatable.")] = None,
    model: Annotated[
        str, typer.Option(help="For a local run: the model to use.", show_default="the only one there is")
    ] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="For a local run: a PEFT folder for lora_apply; may be repeated."),
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Run a guest and print its output; what it took goes to standard error."""
    data = _input(input, input_file)
    path = Path(module)
    if path.suffix == ".wasm" or path.is_file():
        if not path.is_file():
            raise RealmError("file_not_found", f"there is no file {path}")
        _run_here(path, data, stream, seed, model, _adapters(adapter or []))
    elif adapter:
        raise typer.BadParameter("--adapter is for .wasm files run here; a server has those of `realm adapters add`")
    else:
        _run_there(module, data, stream, seed, url, key)


def _input(text: str | None, file: Path | None) -> bytes:
    if text is not None and file is not None:
        raise typer.BadParameter("give --input or --input-file, not both")
    if text is not None:
        return text.encode()
    if file is None:
        return b""
    try:
        return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from error


def _adapters(given: list[str]) -> dict[str, Path]:
    """Folders by name."""
    folders = {}
    for text in given:
        name, separator, folder = text.partition("=")
        if not (name and separator and folder):
            raise typer.BadParameter(f"{text!r} is not of the form NAME=FOLDER")
        if name in folders:
            raise typer.BadParameter(f"the adapter {name!r} is given twice")
        folders[name] = Path(folder)
    return folders


def _run_there(module: str, data: bytes, stream: bool, seed: int | None, url: str | None, key: str | None) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RealmError("invalid_params", f"the input is not UTF-8 text: {error}") from error
    with connect(url, key) as client:
        output = _Output(stream)
        try:
            for event in client.run(module, text, seed=seed):
                if isinstance(event, Waiting):
                    err().print(f"{event.run} waits for a place", style="dim")
                elif isinstance(event, Output):
                    output.add(event.text)
                elif isinstance(event, Log):
                    _show_log(event.level, event.text)
                elif isinstance(event, Finished):
                    output.end()
                    _show_end(f"returned {event.code}", event.usage)
        except SdkError as error:
            output.end()
            if usage := error.details.get("usage"):
                _show_end("failed", msgspec.convert(usage, Usage))
            raise


def _run_here(path: Path, data: bytes, stream: bool, seed: int | None, model: str, adapters: dict[str, Path]) -> None:
    with status("loading the model"):
        # torch is behind this import.
        from realm import local, run_messages

        folder = choose_model(default_home(), model)
        events = local.run_local(path, data, folder, seed=seed, adapters=adapters)
        # The guest is compiled and the model loaded before the first event.
        event = next(events, None)
    output = _Output(stream)
    # A character may be split between two outputs.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while event is not None:
        if isinstance(event, run_messages.Output):
            output.add(decoder.decode(event.data))
        elif isinstance(event, run_messages.Log):
            _show_log(event.level, event.text)
        else:
            output.add(decoder.decode(b"", final=True))
            output.end()
            failed = event.error
            how = f"returned {event.code}" if failed is None else "failed"
            _show_end(how, msgspec.convert(msgspec.structs.asdict(event.usage), Usage))
            if failed is not None:
                raise RealmError(failed.code, failed.message, details=failed.details, retry_after=failed.retry_after)
        event = next(events, None)


class _Output:
    """A run's text: written as it comes, or all at the end."""

    def __init__(self, stream: bool) -> None:
        self._stream = stream
        self._text: list[str] = []
        self._last = "\n"

    def add(self, text: str) -> None:
        self._last = text[-1:] or self._last
        if self._stream:
            write(text)
        else:
            self._text.append(text)

    def end(self) -> None:
        """Leave the cursor at the start of a line."""
        write("".join(self._text) + ("" if self._last == "\n" else "\n"))


def _show_log(level: str, text: str) -> None:
    err().print(f"{level}: {printable(text)}", style="dim")


def _show_end(how: str, usage: Usage) -> None:
    err().print(f"{how}; {usage_line(usage)}", style="dim")
