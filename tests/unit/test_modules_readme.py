"""The guest that the READMEs show is short, builds with the command given, and works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.guest_harness import ANSWER, WORD, answers, run_guest
from tests.unit.test_modules_abi import ROOT, build


@pytest.mark.parametrize("file", ["README.md", "guest_modules/README.md"])
def test_the_shown_guest_works(tmp_path: Path, file: str) -> None:
    page = (ROOT / file).read_text(encoding="utf-8")
    found = re.search(r"```c\n(.*?)```", page, re.DOTALL)
    assert found is not None
    source, module = tmp_path / "hello.c", tmp_path / "hello.wasm"
    source.write_text(found[1])
    command = re.search(r"python -m ziglang (cc .*?) -o hello.wasm hello.c", page, re.DOTALL)
    assert command is not None
    build.zig([*command[1].replace("\\\n", " ").split(), "-o", str(module), str(source)])
    # The script begins after an answer mark; this guest uses no template, so the prompt stands for it.
    script = answers([WORD["Hel"], WORD["lo"]])
    ran = run_guest(module, b"once", lambda tokens: script([ANSWER, *tokens[4:]]))
    assert (ran.outcome, ran.code, ran.text) == ("complete", 0, "Hello")
    too_long = run_guest(module, b"x" * 16385, lambda tokens: script([ANSWER, *tokens[4:]]))
    assert (too_long.outcome, too_long.code) == ("error", -1)


def test_the_links_lead_somewhere() -> None:
    pages = [
        ROOT / "README.md",
        *(path for part in ("host", "guest_modules", "sdk") for path in (ROOT / part).rglob("*.md")),
    ]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
