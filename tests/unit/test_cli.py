"""The command line without a server and against a scripted one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from realm import run_messages
from realm.cli.connection import Login, login_file, read_login, save_login
from realm.cli.terminal import printable, size, when
from realm.errors import RealmError
from realm.models.store import choose_model
from realm.registry.blobs import BlobStore
from realm.registry.database import Database
from realm.serve import locked_home
from tests.cli_harness import Invoke, answering, invoke_fixture, serving
from tests.unit.sdk_fake_server import Peer

__all__ = ["invoke_fixture"]

COMMANDS = (
    *("serve", "run", "push", "ps", "logs", "cancel", "generate", "login", "doctor", "models import", "models list"),
    *("modules list", "modules remove", "tenants add", "tenants list", "tenants show"),
    *("tenants set", "keys add", "keys list", "keys revoke"),
)


# --- help and errors -----------------------------------------------------------------------------


def test_help_lists_what_there_is(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("serve", "run", "push", "ps", "logs", "models", "tenants", "keys", "doctor", "login"):
        assert command in result.output
    assert "demo" not in result.output


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_command_has_help(invoke: Invoke, arguments: str) -> None:
    result = invoke(*arguments.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").output.startswith("realm 0.")


def test_no_key_is_one_line_and_a_hint(invoke: Invoke) -> None:
    result = invoke("ps")
    assert result.exit_code == 1
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("no_key: ")
    assert second.startswith("hint: ") and "realm login" in second


def test_nobody_listens(invoke: Invoke) -> None:
    result = invoke("ps", "--url", "ws://127.0.0.1:1", "--key", "k")
    assert result.exit_code == 1
    assert result.stderr.startswith("connect_failed: ")
    assert "realm serve" in result.stderr
    assert "Traceback" not in result.stderr


def test_server_error_with_backtrace(invoke: Invoke) -> None:
    async def script(peer: Peer) -> None:
        details = {"trap": "unreachable", "backtrace": ["0: run", "1: \x1b[31mred"]}
        await peer.fail(await peer.expect("run"), "guest_trap", "the guest trapped\x1b[2J", details=details)

    with serving(script) as url:
        result = invoke("run", "chat", "--url", url, "--key", "k")
    assert result.exit_code == 1
    assert result.stderr.startswith("guest_trap: the guest trapped")
    assert "1: " in result.stderr
    assert "\x1b" not in result.stderr


DEATH = {
    "trap": "unreachable",
    "backtrace": ["0: inner", "1: run"],
    "fuel": 1234567,
    "memory_bytes": 131072,
    "last_call": "forward",
}
DEATH_LINES = [
    "guest_trap: the guest trapped",
    "trap: unreachable",
    "    0: inner",
    "    1: run",
    "fuel 1,234,567, memory 128.0 KiB, last host call forward",
]


def test_a_death_on_the_server_looks_like_one_at_home(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(peer: Peer) -> None:
        run = await peer.expect("run")
        await peer.stream(run, 0, kind="started", run="r1")
        await peer.stream(run, 1, kind="output", text="half a sen")
        await peer.fail(run, "guest_trap", "the guest trapped", details=DEATH | {"run": "r1", "usage": USAGE})

    with serving(script) as url:
        there = invoke("run", "chat", "--url", url, "--key", "k")

    def run_local(*arguments: object, **named: object) -> Iterator[run_messages.Output | run_messages.RunFinished]:
        yield run_messages.Output(1, b"half a sen", 1)
        error = run_messages.ErrorInfo("guest_trap", "the guest trapped", dict(DEATH))
        yield run_messages.RunFinished(1, "error", 0, error, run_messages.Usage(**USAGE))

    module = types.ModuleType("realm.local")
    module.run_local = run_local  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "realm.local", module)
    monkeypatch.setattr("realm.local", module, raising=False)
    (tmp_path / "home" / "models" / "one").mkdir(parents=True)
    (tmp_path / "home" / "models" / "one" / "realm.json").write_text("{}")
    (tmp_path / "chat.wasm").write_bytes(b"")
    here = invoke("run", str(tmp_path / "chat.wasm"))
    assert there.exit_code == here.exit_code == 1
    assert there.stdout == here.stdout == "half a sen\n"
    took, *report = there.stderr.splitlines()
    assert took.startswith("failed; 12 new tokens") and report == DEATH_LINES
    assert here.stderr.splitlines()[-len(DEATH_LINES) - 1 :] == [took, *DEATH_LINES]


def test_long_backtraces_and_odd_details_are_cut(invoke: Invoke) -> None:
    details = {"backtrace": [f"{n}: f" for n in range(50)], "fuel": None, "memory_bytes": "x", "last_call": ""}

    async def script(peer: Peer) -> None:
        await peer.fail(await peer.expect("ps"), "guest_trap", "m", details=details)

    with serving(script) as url:
        lines = invoke("ps", "--url", url, "--key", "k").stderr.splitlines()
    assert lines == ["guest_trap: m", *(f"    {n}: f" for n in range(20)), "    … and 30 more"]


def test_a_limit_is_named_with_when_to_try_again(invoke: Invoke) -> None:
    text = "too many runs wait for a place: waiting_guests is 2 runs, used 2"

    async def script(peer: Peer) -> None:
        details = {"name": "waiting_guests", "limit": 2, "used": 2, "unit": "runs"}
        await peer.fail(await peer.expect("run"), "rate_limited", text, details=details, retry_after=1)

    with serving(script) as url:
        lines = invoke("run", "chat", "--url", url, "--key", "k").stderr.splitlines()
    assert lines[:2] == [f"rate_limited: {text}", "retry after 1 s"]
    assert "realm tenants show" in lines[2]


def test_server_error_with_details(invoke: Invoke) -> None:
    details = {"allowed": ["realm.emit", "realm.seq_new\x1b"], "correlation": "c0ffee"}

    async def script(peer: Peer) -> None:
        await peer.fail(await peer.expect("ps"), "busy", "no", details=details, retry_after=1.5)

    with serving(script) as url:
        result = invoke("ps", "--url", url, "--key", "k")
    assert result.exit_code == 1
    assert "\nallowed: realm.emit, realm.seq_new\ufffd\n" in result.stderr
    assert "\ncorrelation: c0ffee" in result.stderr
    assert "\nretry after 1.5 s\n" in result.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["ps", "--limit", "0"], ["run"], ["push", "no-such-file"]])
def test_wrong_usage_exits_with_2(invoke: Invoke, arguments: list[str]) -> None:
    assert invoke(*arguments).exit_code == 2


# --- login ---------------------------------------------------------------------------------------


def test_login_saves_for_this_user_only(invoke: Invoke) -> None:
    heard: list[tuple[str, object]] = []
    with serving(answering({"ps": {"runs": [], "engine": {}}}, heard)) as url:
        result = invoke("login", "--url", url, input="secret\n")
        assert result.exit_code == 0, result.output
        assert "acme" in result.output
        assert "secret" not in result.output
        path = login_file()
        assert path.stat().st_mode & 0o777 == 0o600
        assert read_login() == Login(url, "secret")
        assert invoke("ps").exit_code == 0
    assert heard == [("ps", {"all": False, "limit": 50})]


def test_failed_login_saves_nothing(invoke: Invoke) -> None:
    result = invoke("login", "--url", "ws://127.0.0.1:1", "--key", "k")
    assert result.exit_code == 1
    assert not login_file().exists()


def test_saved_key_is_not_sent_to_another_server(invoke: Invoke) -> None:
    save_login(Login("ws://one.example", "secret"))
    result = invoke("ps", "--url", "ws://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("no_key: ")


def test_damaged_login_file(invoke: Invoke) -> None:
    path = save_login(Login("ws://one.example", "secret"))
    path.write_text("{")
    result = invoke("ps")
    assert result.exit_code == 1
    assert result.stderr.startswith("invalid_config: ")


def test_login_replaces_a_readable_file(invoke: Invoke) -> None:
    path = login_file()
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    path.chmod(0o644)
    assert save_login(Login("ws://x", "k")) == path
    assert path.stat().st_mode & 0o777 == 0o600


# --- commands against a server -------------------------------------------------------------------

USAGE = {"fuel": 1234567, "new_tokens": 12, "prompt_tokens": 7, "memory_bytes": 131072, "wall_seconds": 2.0}


async def a_run(peer: Peer) -> None:
    run = await peer.expect("run")
    assert run["params"] == {"module": "chat", "input": "Hi", "stream": True, "seed": 3}
    await peer.stream(run, 0, kind="started", run="r1")
    await peer.stream(run, 1, kind="output", text="Hel")
    await peer.stream(run, 2, kind="log", level="info", text="thinking")
    await peer.stream(run, 3, kind="output", text="lo")
    await peer.complete(run, run="r1", code=0, usage=USAGE)


def test_run_says_that_it_waits(invoke: Invoke) -> None:
    async def script(peer: Peer) -> None:
        run = await peer.expect("run")
        await peer.stream(run, 0, kind="waiting", run="r1")
        await peer.stream(run, 1, kind="started", run="r1")
        await peer.complete(run, run="r1", code=0, usage=USAGE)

    with serving(script) as url:
        result = invoke("run", "chat", "--url", url, "--key", "k")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines()[0] == "r1 waits for a place"


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_run_prints_text_and_what_it_took(invoke: Invoke, stream: list[str]) -> None:
    with serving(a_run) as url:
        result = invoke("run", "chat", "--input", "Hi", "--seed", "3", "--url", url, "--key", "k", *stream)
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello\n"
    assert "info: thinking" in result.stderr
    for part in ("fuel 1,234,567", "12 new tokens (6.0/s)", "7 prompt tokens", "peak memory 128.0 KiB"):
        assert part in result.stderr


def test_run_reads_input_from_a_file_and_from_standard_input(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("Hi")
    for source, given in ((str(path), None), ("-", "Hi")):
        with serving(a_run) as url:
            result = invoke(
                "run", "chat", "--input-file", source, "--seed", "3", "--url", url, "--key", "k", input=given
            )
        assert result.stdout == "Hello\n", result.output


@pytest.mark.parametrize(("content", "code"), [(b"\xff\xfe", 1), (None, 2)], ids=["not UTF-8", "no file"])
def test_run_with_input_that_cannot_be_sent(invoke: Invoke, tmp_path: Path, content: bytes | None, code: int) -> None:
    path = tmp_path / "in"
    if content is not None:
        path.write_bytes(content)
    result = invoke("run", "chat", "--input-file", str(path), "--url", "ws://127.0.0.1:1", "--key", "k")
    assert result.exit_code == code
    assert "Traceback" not in result.output


def test_run_of_a_missing_file(invoke: Invoke) -> None:
    result = invoke("run", "no-such.wasm")
    assert result.exit_code == 1
    assert result.stderr.startswith("file_not_found: there is no file no-such.wasm")
    assert "hint: " in result.stderr and "realm modules list" not in result.stderr


def test_push_takes_the_name_of_the_file(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "mine.wasm"
    path.write_bytes(b"\0asm")
    heard: list[tuple[str, object]] = []
    answers: dict[str, dict[str, object]] = {
        "modules.begin": {"upload": 1, "received": 0, "exists": True},
        "modules.commit": {"name": "mine", "sha256": "ab" * 32, "size": 4, "version": 2, "imports": []},
    }
    with serving(answering(answers, heard)) as url:
        result = invoke("push", str(path), "--url", url, "--key", "k")
    assert result.exit_code == 0, result.output
    assert "mine version 2: 4 B" in result.stdout
    assert isinstance(heard[0][1], dict) and heard[0][1]["name"] == "mine"


def test_tables(invoke: Invoke) -> None:
    run = {"run": "r1", "module": "chat", "status": "error", "started": 1.0, "seconds": 2.5, "usage": USAGE}
    answers: dict[str, dict[str, object]] = {
        "ps": {"runs": [run | {"error": {"code": "guest_trap", "message": "m"}}], "engine": {}},
        "logs": {"run": "r1", "lines": [{"level": "info", "text": "one"}]},
        "modules.list": {"modules": [{"name": "[bold]m", "sha256": "cd" * 32, "size": 2048, "version": 1}]},
        "tenants.list": {"tenants": [{"name": "t", "created": 1.0, "keys": 1}]},
        "keys.list": {"keys": [{"id": "k1", "tenant": "t", "created": 1.0, "revoked": None}]},
        "keys.add": {"key": "new-key", "id": "k2", "tenant": "t"},
        "tenants.add": {"name": "t"},
        "keys.revoke": {},
        "modules.remove": {},
        "cancel": {"cancelled": True},
    }
    expected = {
        "ps --all": "error (guest_trap)",
        "logs r1": "info    one",
        "modules list": "[bold]m",
        "modules remove m": "removed m",
        "tenants list": "KEYS",
        "keys list t": "k1",
        "keys revoke k1": "revoked k1",
        "cancel r1": "cancelled",
    }
    with serving(answering(answers)) as url:
        for command, text in expected.items():
            result = invoke(*command.split(), "--url", url, "--key", "k")
            assert result.exit_code == 0, result.output
            assert text in result.stdout, command
        # A new key stands alone on standard output.
        for command in ("tenants add t", "keys add t"):
            assert invoke(*command.split(), "--url", url, "--key", "k").stdout == "new-key\n"


def ps_answer() -> dict[str, dict[str, object]]:
    """Runs as wide as real ones get."""
    error = {"code": "fuel_exhausted", "message": "m"}
    run = {"run": "r12345", "module": "constrained", "status": "error", "started": 1.0, "seconds": 123.4}
    usage = USAGE | {"fuel": 19_999_123_456, "new_tokens": 12345}
    wide = {"module": "m" * 64, "tenant": "t" * 63}
    first = run | {"usage": usage, "error": error, "tenant": "globex"}
    return {"ps": {"runs": [first, first | wide], "engine": {}}}


def test_ps_into_a_pipe_cuts_nothing(invoke: Invoke) -> None:
    with serving(answering(ps_answer())) as url:
        result = invoke("ps", "--all", "--url", url, "--key", "k")
    header, first, wide = result.stdout.splitlines()
    assert header.split() == ["RUN", "TENANT", "MODULE", "STATUS", "STARTED", "SECONDS", "TOKENS", "FUEL"]
    end = ["error", "(fuel_exhausted)", *when(1.0).split(), "123.4", "12345", "19,999,123,456"]
    assert first.split() == ["r12345", "globex", "constrained", *end]
    assert wide.split() == ["r12345", "t" * 63, "m" * 64, *end]


@pytest.mark.parametrize("columns", [80, 200])
def test_ps_on_a_terminal_keeps_numbers_whole(tmp_path: Path, columns: int) -> None:
    with serving(answering(ps_answer())) as url:
        lines = on_terminal(tmp_path, columns, "ps", "--all", "--url", url, "--key", "k")
    assert all(len(line) <= columns for line in lines)
    rows = [line.split() for line in lines if line.startswith("r12345")]
    assert len(rows) == 2
    for row in rows:
        end = ["12345", "19,999.1", "M"] if columns == 80 else ["12345", "19,999,123,456"]
        assert row[-len(end) :] == end
    text = "".join("".join(lines).split())
    for letter in "mt":
        assert text.count(letter) > 63, "a long name goes on in the next line"
    assert "\u2026" not in text


def on_terminal(home: Path, columns: int, *arguments: str) -> list[str]:
    """The lines that ``realm`` draws on a real terminal of so many columns."""
    controller, terminal = os.openpty()
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        done = subprocess.Popen(
            [sys.executable, "-m", "realm.cli", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.DEVNULL,
            env=environment | {"TERM": "xterm", "XDG_CONFIG_HOME": str(home)},
        )
        os.close(terminal)
        drawn = b""
        # Reading fails once the last process has closed the terminal.
        with suppress(OSError):
            while piece := os.read(controller, 65536):
                drawn += piece
        assert done.wait(20) == 0, drawn
    finally:
        os.close(controller)
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode()).splitlines()]


def test_logs_of_a_run_that_logged_nothing(invoke: Invoke) -> None:
    with serving(answering({"logs": {"run": "r1", "lines": []}})) as url:
        result = invoke("logs", "r1", "--url", url, "--key", "k")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "r1 has logged nothing\n"


def test_logs_of_a_run_that_failed_end_with_why(invoke: Invoke) -> None:
    error = {"code": "guest_trap", "message": "the guest trapped", "details": DEATH}
    answer: dict[str, object] = {"run": "r1", "lines": [{"level": "info", "text": "one"}], "error": error}
    with serving(answering({"logs": answer})) as url:
        result = invoke("logs", "r1", "--url", url, "--key", "k")
    assert (result.exit_code, result.stdout) == (0, "info    one\n")
    assert result.stderr.splitlines() == DEATH_LINES


def test_ps_says_what_a_run_died_of(invoke: Invoke) -> None:
    run = {"run": "r1", "module": "chat", "status": "error", "started": 1.0, "seconds": 2.5, "usage": USAGE}
    errors = [
        {"code": "guest_trap", "message": "m", "details": DEATH},
        {"code": "limit_exceeded", "message": "m", "details": {"name": "store_bytes\x1b"}},
    ]
    runs = [run | {"error": error} for error in errors]
    with serving(answering({"ps": {"runs": runs, "engine": {}}})) as url:
        result = invoke("ps", "--all", "--url", url, "--key", "k")
    assert "error (guest_trap: unreachable)" in result.stdout
    assert "error (limit_exceeded: store_bytes\ufffd)" in result.stdout


def test_generate_streams(invoke: Invoke) -> None:
    async def script(peer: Peer) -> None:
        call = await peer.expect("generate")
        assert call["params"]["prompt"] == "Hi"
        await peer.stream(call, 0, text="there", index=0, is_final=False)
        await peer.complete(call, text="there", usage=USAGE)

    with serving(script) as url:
        result = invoke("generate", "Hi", "--url", url, "--key", "k")
    assert result.stdout == "there\n"
    assert "12 new tokens" in result.stderr


def test_an_error_after_some_text_begins_a_line(invoke: Invoke) -> None:
    async def script(peer: Peer) -> None:
        call = await peer.expect("generate")
        await peer.stream(call, 0, text="half a sen", index=0, is_final=False)
        await peer.fail(call, "rate_limited", "no")

    with serving(script) as url:
        result = invoke("generate", "Hi", "--url", url, "--key", "k")
    assert (result.exit_code, result.stdout) == (1, "half a sen\n")


# --- without a server ----------------------------------------------------------------------------


def test_models_list_is_empty_at_first(invoke: Invoke) -> None:
    result = invoke("models", "list")
    assert result.exit_code == 0
    assert "realm models import" in result.stdout


def test_import_of_what_does_not_exist(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("models", "import", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert "invalid_params: " in result.stderr


def test_serve_without_a_model(invoke: Invoke) -> None:
    result = invoke("serve")
    assert result.exit_code == 1
    assert "model_not_found: " in result.stderr
    assert "realm models import" in result.stderr


def test_printable_takes_the_sting_out() -> None:
    assert printable("a\x1b[31mb\r\x9b\u202ec\n\td é 你 👩‍💻") == "a\ufffd[31mb\ufffd\ufffd\ufffdc\n\td é 你 👩‍💻"


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_client_commands_start_without_torch(tmp_path: Path) -> None:
    """``realm ps`` must start fast."""
    code = (
        "import sys, json\nfrom realm.cli.app import app\n"
        "print(json.dumps([m for m in ('torch', 'wasmtime', 'numpy', 'transformers') if m in sys.modules]))"
    )
    environment = os.environ | {"REALM_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout) == []


def test_choose_model_needs_a_choice(tmp_path: Path) -> None:
    def refused(name: str) -> RealmError:
        with pytest.raises(RealmError) as caught:
            choose_model(tmp_path, name)
        assert caught.value.code == "model_not_found"
        return caught.value

    for name in ("", "x"):
        assert "no model is imported yet" in refused(name).message
        assert "realm models import" in refused(name).message
        assert refused(name).details == {"available": []}
    one = tmp_path / "models" / "one"
    for folder in (one, one.with_name("two")):
        folder.mkdir(parents=True)
        (folder / "realm.json").write_text("{}")
        assert choose_model(tmp_path, "one") == one
        if folder == one:
            assert choose_model(tmp_path, "") == one
    for name in ("", "x", "../one"):
        assert "--model from one, two" in refused(name).message
        assert refused(name).details == {"available": ["one", "two"]}


# --- a lost admin key ----------------------------------------------------------------------------


def test_a_lost_admin_key_is_replaced_without_a_server(invoke: Invoke, tmp_path: Path) -> None:
    home = tmp_path / "home"
    lost = _first_start(home)
    result = invoke("keys", "add", "admin", "--offline")
    assert result.exit_code == 0, result.output
    key = result.stdout.removesuffix("\n")
    assert "admin" in result.stderr and key not in result.stderr
    database = Database(home / "registry.sqlite", BlobStore(home))
    try:
        found = database.authenticate(key)
        assert found is not None and found.admin and key != lost
        # The lost one stays good until somebody revokes it.
        assert database.authenticate(lost) is not None
    finally:
        database.close()


def test_offline_keys_need_a_stopped_server_and_its_registry(invoke: Invoke, tmp_path: Path) -> None:
    home = tmp_path / "home"
    result = invoke("keys", "add", "admin", "--offline")
    assert result.exit_code == 1
    assert result.stderr.startswith("file_not_found: ") and "realm serve" in result.stderr
    assert not home.exists()
    _first_start(home)
    with locked_home(home):
        result = invoke("keys", "add", "admin", "--offline")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("already_running: ")
    result = invoke("keys", "add", "nobody", "--offline")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("tenant_not_found: ")


def test_help_says_what_to_do_about_a_lost_admin_key(invoke: Invoke) -> None:
    text = " ".join(invoke("keys", "add", "--help").output.split())
    assert "realm keys add admin --offline" in text


def _first_start(home: Path) -> str:
    """A registry as the first ``realm serve`` leaves it; the admin's key."""
    home.mkdir(mode=0o700)
    database = Database(home / "registry.sqlite", BlobStore(home))
    made = database.ensure_admin()
    database.close()
    assert made is not None
    return made.key
