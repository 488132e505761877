"""TLS: what is accepted as certificate and key, who is served without, and abuse of the handshake."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import ssl
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from realm.errors import RealmError
from realm.gateway.server import ClientServer
from realm.serve import bind, running
from realm.settings import DEFAULT_HOST, GatewayLimits, ServeSettings
from realm.tls import check_exposure, server_context
from realm_sdk import Client
from realm_sdk import RealmError as SdkError
from tests.fake_host import WASM, FakeHost, async_test, eventually, fake_host
from tests.raw_client import TEXT, authenticated, bystander, call, frame, raw
from tests.serve_harness import PYTHONPATH, prepare

FOLDER = Path(__file__).parents[1] / "tls"
CERT, KEY = FOLDER / "localhost.pem", FOLDER / "localhost.key"


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(CERT))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServeSettings:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    return prepare(tmp_path, monkeypatch.setattr)


@contextlib.asynccontextmanager
async def tls_host(home: Path, *, limits: GatewayLimits | None = None) -> AsyncIterator[tuple[FakeHost, FakeHost]]:
    """A host, and the same one as seen through a second listener, with TLS."""
    async with fake_host(home, limits=limits) as host:
        server = ClientServer(host.gateway)
        await server.open(bind("127.0.0.1", 0), server_context(CERT, KEY))
        try:
            yield host, dataclasses.replace(host, server=server)
        finally:
            await server.close(grace=0.2)
            assert not len(server.entrance.newcomers) and server.entrance.authenticated == 0


# --- files and addresses --------------------------------------------------------------------------


def test_the_servers_context() -> None:
    assert server_context(None, None) is None
    context = server_context(CERT, KEY)
    assert context is not None and context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.protocol is ssl.PROTOCOL_TLS_SERVER and context.verify_mode is ssl.CERT_NONE


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    missing, empty, cut = tmp_path / "missing", tmp_path / "empty", tmp_path / "cut"
    empty.write_text("")
    cut.write_text(CERT.read_text()[:300] + "\n-----END CERTIFICATE-----\n")
    cut_key = tmp_path / "cut.key"
    cut_key.write_text(KEY.read_text()[:160] + "\n-----END PRIVATE KEY-----\n")
    for cert, key, file, why in (
        (missing, KEY, missing, "No such file"),
        (CERT, missing, missing, "No such file"),
        (tmp_path, KEY, tmp_path, "Is a directory"),
        (empty, KEY, empty, "no certificate"),
        (KEY, KEY, KEY, "no certificate"),
        (CERT, empty, empty, "no private key"),
        (CERT, CERT, CERT, "no private key"),
        (cut, KEY, cut, "cannot be read as PEM"),
        (CERT, cut_key, cut_key, "cannot be read as PEM"),
        (CERT, FOLDER / "other.key", FOLDER / "other.key", "not the key of the certificate"),
        (CERT, FOLDER / "encrypted.key", FOLDER / "encrypted.key", "is encrypted"),
    ):
        with pytest.raises(RealmError) as caught:
            server_context(cert, key)
        assert caught.value.code == "tls_invalid" and caught.value.details == {"file": str(file)}, caught.value
        assert str(file) in caught.value.message and why in caught.value.message, caught.value
    for half in ((CERT, None), (None, KEY)):
        with pytest.raises(RealmError, match=r"tls_invalid: .* TLS needs both"):
            server_context(*half)


def test_who_may_be_served_without_tls() -> None:
    for address in ("127.0.0.1", "127.8.9.1", "::1"):
        check_exposure(address, tls=False, allow_plaintext=False)
    for address in ("0.0.0.0", "192.0.2.1", "10.0.0.1", "::", "fe80::1%eth0", "2001:db8::1"):
        with pytest.raises(RealmError) as caught:
            check_exposure(address, tls=False, allow_plaintext=False)
        assert caught.value.code == "insecure_bind" and "--allow-plaintext" in caught.value.message
        check_exposure(address, tls=True, allow_plaintext=False)
        check_exposure(address, tls=False, allow_plaintext=True)


def test_loopback_only_by_default() -> None:
    assert socket.inet_aton(DEFAULT_HOST)[0] == 127 and not ServeSettings().allow_plaintext


# --- serving --------------------------------------------------------------------------------------


@async_test
async def test_a_host_with_tls_and_the_sdk(settings: ServeSettings) -> None:
    async with running(dataclasses.replace(settings, tls_cert=CERT, tls_key=KEY)) as info:
        assert info.url.startswith("wss://127.0.0.1:") and info.admin_key is not None
        async with Client(info.url, info.admin_key, ssl=trusting()) as client:
            assert (await client.health()).status == "healthy"
        # A client that does not know the certificate does not show its key.
        with pytest.raises(SdkError) as caught:
            async with Client(info.url, info.admin_key):
                pass
        assert caught.value.code == "connect_failed" and "certificate" in caught.value.message.lower()
        with pytest.raises(SdkError):
            async with Client(info.url.replace("wss:", "ws:"), info.admin_key, open_timeout=3.0):
                pass


@async_test
async def test_open_addresses_need_tls_or_a_word(settings: ServeSettings) -> None:
    with pytest.raises(RealmError, match="insecure_bind"):
        async with running(dataclasses.replace(settings, host="0.0.0.0")):
            pass
    with pytest.raises(RealmError, match="tls_invalid"):
        async with running(dataclasses.replace(settings, host="0.0.0.0", tls_cert=CERT)):
            pass
    # Nothing has been left that would keep the home or an address.
    for change in ({"allow_plaintext": True}, {"tls_cert": CERT, "tls_key": KEY}):
        async with running(dataclasses.replace(settings, host="0.0.0.0", **change)) as info:
            assert info.url.startswith("wss" if "tls_cert" in change else "ws:")


# --- abuse ----------------------------------------------------------------------------------------


@async_test
async def test_the_whole_protocol_over_tls(tmp_path: Path) -> None:
    async with (
        tls_host(tmp_path) as (host, secure),
        bystander(host) as other,
        authenticated(secure, tls=trusting()) as client,
    ):
        content = WASM + bytes(500_000)
        prompt = "x" * 900_000
        client.send(call(1, "generate", prompt=prompt))
        assert (await client.message())["data"]["text"] == prompt
        # Ten thousand calls in one write; each has its answer.
        client.send(b"".join(call(n, "nothing") for n in range(2000)))
        for n in range(2000):
            assert (await client.message())["id"] == n
        client.send(call("u", "modules.begin", name="m", size=len(content), sha256="0" * 64))
        upload = (await client.message())["data"]["upload"]
        client.send(frame(2, upload.to_bytes(8, "little") + bytes(8) + content[: 256 << 10]))
        assert (await client.message())["received"] == 256 << 10
        await other.works()
        client.send(frame(TEXT, b"x", rsv=4))
        assert await client.closing() == 1002


@async_test
async def test_handshakes_that_never_end(tmp_path: Path) -> None:
    limits = GatewayLimits(auth_seconds=0.3)
    async with tls_host(tmp_path, limits=limits) as (host, secure), bystander(host) as other:
        newcomers = secure.server.entrance.newcomers
        async with raw(secure) as silent, raw(secure) as half, raw(secure) as garbage, raw(secure) as plain:
            half.send(b"\x16\x03\x01\x02\x00\x01\x00")
            garbage.send(b"\xff" * 100_000)
            plain.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            for client in (garbage, plain, half, silent):
                await client.ended()
            await other.works()
        # Through the TLS handshake, and then nothing.
        async with raw(secure, tls=trusting()) as silent:
            await silent.ended()
        await eventually(lambda: not len(newcomers))
        assert not secure.server._accepting
        async with authenticated(secure, tls=trusting()) as client:
            client.send(call(1))
            assert (await client.message())["status"] == "complete"


@async_test
async def test_a_flood_of_handshakes_hits_only_its_address(tmp_path: Path) -> None:
    limits = GatewayLimits(newcomers=20, newcomers_per_address=10, newcomer_grace=0.0)
    async with tls_host(tmp_path, limits=limits) as (host, secure), bystander(host) as other:
        newcomers = secure.server.entrance.newcomers
        async with contextlib.AsyncExitStack() as stack:
            flood = [await stack.enter_async_context(raw(secure, source="127.0.0.9")) for _ in range(30)]
            for client in flood:
                client.send(b"\x16\x03\x01")
            for client in flood[:20]:
                await client.ended()
            assert len(newcomers) == 10
            async with authenticated(secure, tls=trusting()) as client:
                client.send(call(1))
                assert (await client.message())["status"] == "complete"
            await other.works()
        await eventually(lambda: not len(newcomers))


@async_test
async def test_old_versions_of_tls_are_refused(tmp_path: Path) -> None:
    async with tls_host(tmp_path) as (host, secure), bystander(host):
        old = trusting()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            old.minimum_version = ssl.TLSVersion.TLSv1
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")

        def attempt() -> None:
            with socket.create_connection(("127.0.0.1", secure.server.port)) as sock:
                old.wrap_socket(sock, server_hostname="localhost")

        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(attempt)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--tls-cert", str(CERT)], "tls_invalid: --tls-cert is given without --tls-key"),
        (["--tls-key", str(KEY)], "tls_invalid: --tls-key is given without --tls-cert"),
        (["--tls-cert", "/no/such/file", "--tls-key", str(KEY)], "tls_invalid: /no/such/file cannot be read"),
        (["--host", "0.0.0.0"], "insecure_bind: 0.0.0.0 can be reached from other machines"),
        (["--host", "::"], "insecure_bind: :: can be reached from other machines"),
    ],
)
def test_serve_says_what_is_wrong(settings: ServeSettings, arguments: list[str], error: str) -> None:
    environment = os.environ | {"REALM_HOME": str(settings.home), "COLUMNS": "1000"}
    command = [sys.executable, "-m", "realm.cli", "serve", "--port", "0", *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert error in " ".join(ended.stderr.split())
