"""``realm tenants show`` and ``realm tenants set``."""

from __future__ import annotations

import re

import pytest

from realm.cli.admin import parse_limit
from realm.cli.terminal import when
from realm.limits import LIMITS
from tests.cli_harness import Invoke, answering, invoke_fixture, serving

__all__ = ["invoke_fixture"]


def limits_answer(name: str | None = "bob") -> dict[str, object]:
    def entry(name: str, value: int, source: str, used: int | None) -> dict[str, object]:
        limit = LIMITS[name]
        return {"name": name, "value": value, "unit": limit.unit, "from": source, "used": used, "doc": limit.doc}

    limits = [entry("kv_pages", 4000, "tenant", 12), entry("store_bytes", 16 << 20, "built-in", None)]
    return {"name": name, "created": 1.0, "keys": 2, "limits": limits}


def test_tenants_show_lists_limits(invoke: Invoke) -> None:
    heard: list[tuple[str, object]] = []
    with serving(answering({"tenants.show": limits_answer()}, heard)) as url:
        result = invoke("tenants", "show", "bob", "--url", url, "--key", "k")
    assert result.exit_code == 0, result.output
    assert heard == [("tenants.show", {"name": "bob"})]
    lines = [re.split(r"  +", line.strip()) for line in result.stdout.splitlines()]
    assert lines == [
        [f"tenant bob, made {when(1.0)}, keys: 2"],
        ["LIMIT", "VALUE", "UNIT", "FROM", "USED", "MEANING"],
        ["kv_pages", "4,000", "pages", "tenant", "12", LIMITS["kv_pages"].doc],
        ["store_bytes", "16,777,216", "bytes", "built-in", "-", LIMITS["store_bytes"].doc],
    ]
    with serving(answering({"tenants.show": limits_answer(None)}, heard)) as url:
        result = invoke("tenants", "show", "--url", url, "--key", "k")
    assert heard[-1] == ("tenants.show", {}) and "for tenants without" in result.stdout


def test_tenants_set_sends_values_and_shows_the_table(invoke: Invoke) -> None:
    heard: list[tuple[str, object]] = []
    arguments = [
        "kv_pages=4_000",
        "memory_bytes=128MiB",
        "store_bytes=10,000",
        "uploads=",
        "warp=2KiB",
        "fuel_per_run=7",
    ]
    limits = {
        "kv_pages": 4000,
        "memory_bytes": 128 << 20,
        "store_bytes": 10_000,
        "uploads": None,
        "warp": 2048,
        "fuel_per_run": 7,
    }
    with serving(answering({"tenants.set": limits_answer()}, heard)) as url:
        for who, params in ((["bob"], {"limits": limits, "name": "bob"}), (["--default"], {"limits": limits})):
            result = invoke("tenants", "set", *who, *arguments, "--url", url, "--key", "k")
            assert result.exit_code == 0, result.output
            assert heard[-1] == ("tenants.set", params)
            assert "kv_pages" in result.stdout and "4,000" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["uploads=1"],
        ["--default", "bob", "uploads=1"],
        ["bob", "uploads"],
        ["bob", "=1"],
        ["bob", "uploads=-1"],
        ["bob", "uploads=1.5"],
        ["bob", "uploads=1MiB"],
        ["bob", "store_bytes=1MB"],
        ["bob", "store_bytes=MiB"],
        ["bob", "uploads=\u0661"],
        ["bob", "uploads=1", "uploads=2"],
        [],
    ],
)
def test_limits_that_are_no_limits_exit_with_2(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke("tenants", "set", "--url", "ws://127.0.0.1:1", "--key", "k", *arguments)
    assert result.exit_code == 2, result.output


def test_limits_with_underscores_only_are_zero_at_least() -> None:
    assert parse_limit("uploads=0_") == ("uploads", 0)
    assert parse_limit("store_bytes=4GiB") == ("store_bytes", 4 << 30)
