"""TLS of ``realm serve``, and which addresses may be served without."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

from realm.errors import RealmError


def server_context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The server's side of TLS 1.2 and later, from PEM files; None if neither is given.

    Raises:
        RealmError: ``tls_invalid`` naming the file and what is wrong with it.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        missing, given = ("--tls-cert", "--tls-key") if cert is None else ("--tls-key", "--tls-cert")
        raise RealmError("tls_invalid", f"{given} is given without {missing}: TLS needs both", details={"file": ""})
    text = _read(cert)
    if "-----BEGIN CERTIFICATE-----" not in text:
        raise _invalid(cert, "has no certificate in PEM form")
    text = _read(key)
    if "PRIVATE KEY-----" not in text:
        raise _invalid(key, "has no private key in PEM form")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # TLS 1.2 clients could make the server do a handshake again and again on one connection.
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        # An empty password: OpenSSL would ask for one on the terminal.
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _invalid(key, f"is not the key of the certificate in {cert}") from None
        if "ENCRYPTED" in text:
            raise _invalid(key, "is encrypted: give a key without a passphrase") from None
        raise _invalid(_guilty(cert, key), f"cannot be read as PEM: {error.reason or error}") from None
    return context


def check_exposure(address: str, *, tls: bool, allow_plaintext: bool) -> None:
    """Whether a bound address (as the socket names it) may be served like this.

    Raises:
        RealmError: ``insecure_bind``: keys and prompts would cross the network in clear.
    """
    if tls or allow_plaintext or ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return
    raise RealmError(
        "insecure_bind",
        f"{address} can be reached from other machines, and without TLS keys and prompts would cross the network "
        "in clear: give --tls-cert and --tls-key, or --allow-plaintext if something else protects the way",
        details={"address": address},
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError as error:
        raise _invalid(file, f"cannot be read: {error.strerror or error}") from None


def _guilty(cert: Path, key: Path) -> Path:
    """OpenSSL does not say which of the two it could not read."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cert)
    except ssl.SSLError:
        return cert
    return key


def _invalid(file: Path, why: str) -> RealmError:
    return RealmError("tls_invalid", f"{file} {why}", details={"file": str(file)})
