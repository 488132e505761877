"""A client's LoRA adapters: PEFT folders that are stored on the server and used by name."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import msgspec

from realm_sdk.errors import RealmError, error_of
from realm_sdk.events import Adapter
from realm_sdk.upload import Progress, store

if TYPE_CHECKING:
    from realm_sdk.client import Client

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

MAX_CONFIG = 64 << 10
"""Largest ``adapter_config.json`` that a server takes, in bytes."""

_NAMED = 3
"""Most sub-folders that an error names."""

Folder: TypeAlias = str | os.PathLike[str]


class _Listed(msgspec.Struct):
    adapters: list[Adapter]


class _Nothing(msgspec.Struct):
    pass


class Adapters:
    """``client.adapters``: see :meth:`add`, and ``adapter=`` of :meth:`realm_sdk.Client.generate`.

    A name means the tenant's own adapter of that name, or else one that is shared with all tenants. Each call
    raises ``adapter_not_found`` for a name that means none (``details["available"]`` are the names that do).
    """

    def __init__(self, client: Client, wait: float | None) -> None:
        self._client = client
        self._wait = wait

    async def add(
        self, name: str, source: Folder, *, model: str | None = None, progress: Progress | None = None
    ) -> Adapter:
        """Store the adapter of a PEFT folder (``adapter_config.json``, ``adapter_model.safetensors``) under ``name``.

        The server checks all of it before it stores anything. An adapter of that name is replaced: what computes
        with the old one goes on with it as long as the engine has it loaded. Weights that this tenant has stored
        before are not sent again.

        Args:
            model: the served model that it must be for; None is whichever is served.
            progress: called with (bytes the server has, all bytes) as they arrive.

        Raises:
            AdapterRefused: ``adapter_invalid`` (``details`` have the ``file`` that the folder lacks, the ``field`` of
                the configuration or the ``tensor``), ``adapter_too_large``.
            LimitExceeded: the tenant stores too many adapters, or too many bytes of them.
            NotFound: ``model_not_found``: that model is not served.
        """
        # The disk may be slow, and other calls of the connection do not wait for it.
        config, file = await asyncio.to_thread(_open, Path(source))
        params: dict[str, Any] = {"name": name, "config": config}
        if model is not None:
            params["model"] = model
        with file:
            return await store(self._client, "adapters", file, params, Adapter, progress, self._wait)

    async def list(self) -> list[Adapter]:
        """The tenant's adapters, and those shared with it."""
        return (await self._client.call("adapters.list", {}, _Listed)).adapters

    async def show(self, name: str) -> Adapter:
        """One adapter."""
        return await self._client.call("adapters.show", {"name": name}, Adapter)

    async def pin(self, name: str) -> Adapter:
        """Have the engine keep one of the tenant's adapters ready; ``limit_exceeded`` beyond ``pinned_adapters``."""
        return await self._client.call("adapters.pin", {"name": name, "pinned": True}, Adapter)

    async def unpin(self, name: str) -> Adapter:
        """Let the engine unload it again when others need the room."""
        return await self._client.call("adapters.pin", {"name": name, "pinned": False}, Adapter)

    async def share(self, name: str) -> Adapter:
        """Let all tenants use one of the admin tenant's adapters by its name (admin key)."""
        return await self._client.call("adapters.share", {"name": name, "shared": True}, Adapter)

    async def unshare(self, name: str) -> Adapter:
        """Take it back from them (admin key); what computes with it goes on with it."""
        return await self._client.call("adapters.share", {"name": name, "shared": False}, Adapter)

    async def remove(self, name: str) -> None:
        """Remove one of the tenant's adapters; what computes with it goes on as long as the engine has it loaded."""
        await self._client.call("adapters.remove", {"name": name}, _Nothing)


def _open(folder: Path) -> tuple[msgspec.Raw, BinaryIO]:
    """The configuration in a PEFT folder, and the file of its weights.

    Raises:
        AdapterRefused: ``adapter_invalid``: it is no such folder; ``details["file"]`` is what lacks or is wrong.
    """
    if not folder.is_dir():
        what = "is a file: give the folder that it is in" if folder.is_file() else "is no folder"
        raise _invalid(folder.name, f"{folder} {what}")
    config = _config(folder)
    try:
        return config, (folder / WEIGHTS_FILE).open("rb")
    except FileNotFoundError:
        if (folder / PICKLE_FILE).exists():
            text = (
                f"{folder} has its weights in {PICKLE_FILE} only, a format that can run code when it is read: save it "
                f"again with PEFT's save_pretrained(…, safe_serialization=True), which writes {WEIGHTS_FILE}"
            )
            raise _invalid(PICKLE_FILE, text) from None
        raise _missing(folder, WEIGHTS_FILE) from None
    except OSError as error:
        raise _invalid(WEIGHTS_FILE, f"{folder / WEIGHTS_FILE} cannot be read: {error.strerror}") from error


def _config(folder: Path) -> msgspec.Raw:
    """The file as it is: what is wrong inside the object is the server's to find, and it names the field."""
    path = folder / CONFIG_FILE
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG + 1)
    except FileNotFoundError:
        raise _missing(folder, CONFIG_FILE) from None
    except OSError as error:
        raise _invalid(CONFIG_FILE, f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > MAX_CONFIG:
        raise _invalid(CONFIG_FILE, f"{path} has more than {MAX_CONFIG:,} bytes")
    try:
        msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(CONFIG_FILE, f"{path} is no JSON object: {error}") from error
    return msgspec.Raw(raw)


def _missing(folder: Path, name: str) -> RealmError:
    """PEFT and its trainers often write the files one folder further down: that is worth a word."""
    text = f"{folder} has no {name}: an adapter is a folder as PEFT's save_pretrained writes it"
    inner = sorted(found.parent.name for found in folder.glob(f"*/{name}"))
    if inner:
        more = ", …" if len(inner) > _NAMED else ""
        text = f"{text}; in it, {', '.join(inner[:_NAMED])}{more} {'have' if len(inner) > 1 else 'has'} one"
    return _invalid(name, text)


def _invalid(file: str, text: str) -> RealmError:
    return error_of("adapter_invalid", text, {"file": file})
