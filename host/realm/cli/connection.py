"""Which server and which key: options, environment, or what ``realm login`` saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
import typer

from realm.errors import RealmError
from realm_sdk import SyncClient

DEFAULT_URL = "ws://127.0.0.1:8765"

UrlOption: TypeAlias = Annotated[
    str | None, typer.Option("--url", envvar="REALM_URL", help="The server.", show_default=DEFAULT_URL)
]
KeyOption: TypeAlias = Annotated[
    str | None, typer.Option("--key", envvar="REALM_API_KEY", help="Your API key.", show_default="what login saved")
]


class Login(msgspec.Struct, frozen=True):
    """What ``realm login`` saves."""

    url: str = DEFAULT_URL
    key: str = ""


def login_file() -> Path:
    """``$XDG_CONFIG_HOME/realm/login.json``, by default in ``~/.config``."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "realm" / "login.json"


def read_login() -> Login:
    """What was saved, or the defaults.

    Raises:
        RealmError: ``invalid_config`` if the file cannot be read.
    """
    path = login_file()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Login)
    except FileNotFoundError:
        return Login()
    except (OSError, msgspec.MsgspecError) as error:
        raise RealmError("invalid_config", f"{path} cannot be read: {error}. Run `realm login` again.") from error


def save_login(login: Login) -> Path:
    """Save it, readable by this user only; the file's path."""
    path = login_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    # The mode is set at creation: at no time can another user read the key.
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(login))
    fresh.rename(path)
    return path


def connect(url: str | None, key: str | None) -> SyncClient:
    """A client that is not open yet.

    The saved key is sent only to the server it was saved for.

    Raises:
        RealmError: ``no_key``.
    """
    login = Login() if url and key else read_login()
    chosen = url or login.url
    if not key and chosen == login.url:
        key = login.key
    if not key:
        raise RealmError("no_key", f"there is no key for {chosen}")
    return SyncClient(chosen, key)
