"""``realm adapters`` and ``realm generate --adapter`` against a scripted server."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from realm.cli.terminal import HINTS, upload_bar, when
from tests.cli_harness import Invoke, answering, invoke_fixture, serving
from tests.unit.sdk_adapters import CONFIG, DATA
from tests.unit.sdk_adapters import folder as write_folder
from tests.unit.sdk_fake_server import Peer, idle

__all__ = ["invoke_fixture"]

LEGAL = DATA | {
    "model": "smollm2-135m-instruct",
    "size": 2 << 20,
    "targets": ["q_proj", "v_proj", "o_proj"],
    "parameters": 460_800,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAILED = LEGAL | {"state": "failed", "error": "its file is gone\x1b[2J", "sequences": 0, "pinned": False}


@pytest.fixture(name="folder")
def folder_fixture(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "my-adapter")


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


# --- add -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--name", "legal", "--model", "tiny"], []])
def test_add_uploads_a_folder_and_says_what_it_holds(invoke: Invoke, folder: Path, options: list[str]) -> None:
    heard: list[dict[str, Any]] = []

    async def script(peer: Peer) -> None:
        params, data = await peer.take_upload(3, kind="adapters")
        heard.append(params)
        assert data == b"abc"
        await peer.complete(await peer.expect("adapters.commit"), **LEGAL)
        await idle(peer)

    with serving(script) as url:
        result = invoke("adapters", "add", str(folder), *options, "--url", url, "--key", "k")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout == (
        "legal version 2 for smollm2-135m-instruct: rank 16 on q v o, 2.0 MiB, sha256 abababababababab…\n"
    )
    named = {"name": "legal", "model": "tiny"} if options else {"name": "my-adapter"}
    assert heard[0] == named | {"size": 3, "sha256": heard[0]["sha256"], "config": CONFIG}


def test_add_of_the_folder_one_is_in_takes_its_name(
    invoke: Invoke, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, Any]] = []
    monkeypatch.chdir(folder)
    answers: dict[str, dict[str, object]] = {
        "adapters.begin": {"upload": 1, "received": 0, "exists": True},
        "adapters.commit": LEGAL | {"targets": TARGETS},
    }
    with serving(answering(answers, heard)) as url:
        result = invoke("adapters", "add", ".", "--url", url, "--key", "k")
    assert result.exit_code == 0, result.output
    assert "rank 16 on all, " in result.stdout
    assert heard[0][1]["name"] == "my-adapter"


def test_add_of_what_is_no_adapter(invoke: Invoke, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    for source, text in ((folder, "safe_serialization=True"), (folder / "adapter_config.json", "give the folder")):
        with serving(answering({})) as url:
            result = invoke("adapters", "add", str(source), "--url", url, "--key", "k")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("adapter_invalid: ") and text in result.stderr
        assert f"hint: {HINTS['adapter_invalid']}" in result.stderr


@pytest.mark.parametrize("arguments", [["add"], ["add", "no-such-folder"], ["show"], ["pin"], ["remove"], ["share"]])
def test_wrong_usage_exits_with_2(invoke: Invoke, arguments: list[str]) -> None:
    assert invoke("adapters", *arguments, "--url", "ws://127.0.0.1:1", "--key", "k").exit_code == 2


@pytest.mark.parametrize("when_refused", ["begin", "commit"])
@pytest.mark.parametrize(
    ("code", "details", "hint"),
    [
        ("adapter_invalid", {"tensor": "base_model.model.lm_head.lora_A.weight"}, "PEFT"),
        ("adapter_too_large", {"name": "adapter_bytes", "limit": 2, "used": 3, "unit": "bytes"}, "realm tenants set"),
        ("limit_exceeded", {"name": "stored_adapters", "limit": 1, "used": 1, "unit": "adapters"}, "realm tenants set"),
        ("model_not_found", {"available": ["tiny"]}, "without --model"),
    ],
)
def test_a_refused_adapter_is_one_line_and_a_hint(
    invoke: Invoke, folder: Path, code: str, details: dict[str, Any], hint: str, when_refused: str
) -> None:
    async def script(peer: Peer) -> None:
        if when_refused == "begin":
            await peer.fail(await peer.expect("adapters.begin"), code, "the reason\x1b[2J", details=details)
        else:
            await peer.take_upload(3, kind="adapters")
            await peer.fail(await peer.expect("adapters.commit"), code, "the reason\x1b[2J", details=details)
        await idle(peer)

    with serving(script) as url:
        result = invoke("adapters", "add", str(folder), "--name", "legal", "--url", url, "--key", "k")
    assert (result.exit_code, result.stdout) == (1, "")
    line, last = result.stderr.splitlines()
    assert line == f"{code}: the reason\ufffd[2J"
    assert last.startswith("hint: ") and hint in last


@pytest.mark.parametrize(
    ("counts", "drawn"),
    [([], "hashing"), ([(1 << 20, 4 << 20)], "uploading"), ([(1 << 20, 4 << 20), (4 << 20, 4 << 20)], "checking")],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_says_what_is_going_on(
    monkeypatch: pytest.MonkeyPatch, counts: list[tuple[int, int]], drawn: str, terminal: bool
) -> None:
    file = io.StringIO()
    monkeypatch.setattr("realm.cli.terminal.err", lambda: Console(file=file, force_terminal=terminal, width=100))
    with upload_bar() as progress:
        for done, total in counts:
            progress(done, total)
    assert (drawn in file.getvalue()) if terminal else file.getvalue() == ""
    if terminal and counts:
        assert f"{counts[-1][0] / 1e6:.1f}/4.2 MB" in file.getvalue()


# --- looking -------------------------------------------------------------------------------------


def test_list_is_a_table(invoke: Invoke) -> None:
    given: dict[str, Any] = {"name": "json", "model": "m", "size": 512, "rank": 8, "targets": TARGETS}
    given |= {"own": False, "shared": True}
    adapters = [LEGAL, FAILED | {"name": "old", "shared": True, "rank": 128}, given]
    with serving(answering({"adapters.list": {"adapters": adapters}})) as url:
        result = invoke("adapters", "list", "--url", url, "--key", "k")
    assert result.exit_code == 0, result.output
    model = "smollm2-135m-instruct"
    assert [cells(line) for line in result.stdout.splitlines()] == [
        ["NAME", "RANK", "TARGETS", "SIZE", "MODEL", "STATE", "PINNED", "SHARED"],
        ["legal", "16", "q v o", "2.0 MiB", model, "resident", "yes", "-"],
        ["old", "128", "q v o", "2.0 MiB", model, "failed: its file is gone\ufffd[2J", "-", "with all"],
        # What the engine knows is left out while it restarts.
        ["json", "8", "all", "512 B", "m", "-", "-", "with you"],
    ]


def test_list_without_any(invoke: Invoke) -> None:
    with serving(answering({"adapters.list": {"adapters": []}})) as url:
        result = invoke("adapters", "list", "--url", url, "--key", "k")
    assert result.stdout.startswith("no adapters: `realm adapters add")


def shown(invoke: Invoke, adapter: dict[str, Any]) -> dict[str, str]:
    heard: list[tuple[str, object]] = []
    with serving(answering({"adapters.show": adapter}, heard)) as url:
        result = invoke("adapters", "show", "legal", "--url", url, "--key", "k")
    assert result.exit_code == 0, result.output
    assert heard == [("adapters.show", {"name": "legal"})]
    found = {}
    for line in result.stdout.splitlines():
        label, text = cells(line)
        found[label] = text
    return found


def test_show_tells_all(invoke: Invoke) -> None:
    known = {
        "name": "legal",
        "version": f"2, stored {when(5.5)}",
        "model": "smollm2-135m-instruct",
        "rank": "16, alpha 32.5",
        "targets": "q_proj v_proj o_proj",
        "parameters": "460,800",
        "size": f"2.0 MiB, sha256 {'ab' * 32}",
        "pinned": "yes",
        "shared": "no",
        "state": "resident",
        "sequences": "3 now",
        "loads": "1 from disk",
    }
    assert shown(invoke, LEGAL) == known
    failed = {"pinned": "no", "state": "failed: its file is gone\ufffd[2J", "sequences": "0 now"}
    assert shown(invoke, FAILED) == known | failed
    engine_facts = ("state", "sequences", "loads")
    quiet = {name: value for name, value in LEGAL.items() if name not in engine_facts} | {"own": False, "shared": True}
    found = shown(invoke, quiet)
    assert (found["state"], found["shared"]) == ("not known: the engine restarts, or has another model", "with you")
    assert "sequences" not in found and "loads" not in found
    theirs = shown(invoke, quiet | {"state": "resident"})
    assert theirs["state"] == "resident" and not theirs.keys() & {"sequences", "loads"}


# --- changing ------------------------------------------------------------------------------------

CHANGES: list[tuple[str, str, dict[str, object], str]] = [
    ("pin", "adapters.pin", {"pinned": True}, "pinned legal"),
    ("unpin", "adapters.pin", {"pinned": False}, "unpinned legal"),
    ("share", "adapters.share", {"shared": True}, "legal is shared with all tenants"),
    ("unshare", "adapters.share", {"shared": False}, "legal is shared no more"),
    ("remove", "adapters.remove", {}, "removed legal"),
]


@pytest.mark.parametrize(("command", "function", "params", "text"), CHANGES)
def test_changes(invoke: Invoke, command: str, function: str, params: dict[str, object], text: str) -> None:
    heard: list[tuple[str, object]] = []
    with serving(answering({function: LEGAL}, heard)) as url:
        result = invoke("adapters", command, "legal", "--url", url, "--key", "k")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(text)
    assert heard == [(function, {"name": "legal"} | params)]


@pytest.mark.parametrize("command", ["show", "pin", "unpin", "share", "unshare", "remove"])
@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("adapter_not_found", "realm adapters list"),
        ("limit_exceeded", "realm tenants set"),
        ("forbidden", "admin key"),
    ],
)
def test_a_refused_change_is_one_line_and_a_hint(invoke: Invoke, command: str, code: str, hint: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.fail(await peer.hear(), code, "the reason", details={"available": ["json"]})
        await idle(peer)

    with serving(script) as url:
        result = invoke("adapters", command, "legal", "--url", url, "--key", "k")
    assert (result.exit_code, result.stdout) == (1, "")
    line, last = result.stderr.splitlines()
    assert line == f"{code}: the reason"
    assert last.startswith("hint: ") and hint in last


# --- generate, help ------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["legal", None])
def test_generate_names_the_adapter(invoke: Invoke, adapter: str | None) -> None:
    async def script(peer: Peer) -> None:
        call = await peer.expect("generate")
        assert call["params"].get("adapter", None) == adapter
        assert ("adapter" in call["params"]) is (adapter is not None)
        await peer.stream(call, 0, text="there", index=0, is_final=False)
        await peer.complete(call, text="there")
        await idle(peer)

    options = [] if adapter is None else ["--adapter", adapter]
    with serving(script) as url:
        result = invoke("generate", "Hi", *options, "--url", url, "--key", "k")
    assert (result.exit_code, result.stdout) == (0, "there\n"), result.output


def test_generate_with_an_adapter_that_is_not_there(invoke: Invoke) -> None:
    async def script(peer: Peer) -> None:
        await peer.fail(await peer.expect("generate"), "adapter_not_found", "there is no adapter legal")
        await idle(peer)

    with serving(script) as url:
        result = invoke("generate", "Hi", "--adapter", "legal", "--url", url, "--key", "k")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "adapter_not_found: there is no adapter legal",
        f"hint: {HINTS['adapter_not_found']}",
    ]


def test_every_command_has_help_and_is_listed(invoke: Invoke) -> None:
    listed = invoke("adapters", "--help").output
    for command in ("add", "list", "show", "pin", "unpin", "share", "unshare", "remove"):
        assert re.search(rf"^\W*{command} ", listed, re.MULTILINE), listed
        result = invoke("adapters", command, "--help")
        assert result.exit_code == 0 and "Usage" in result.output
    assert "adapters" in invoke("--help").output
    assert "--adapter" in invoke("generate", "--help").output
