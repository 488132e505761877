"""Pushing a module: hash, begin, chunks with a window, commit."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from realm_sdk.errors import ProtocolError, RealmError, WaitTimeout
from realm_sdk.events import Module
from realm_sdk.protocol import CHUNK_SIZE, Protocol

if TYPE_CHECKING:
    from realm_sdk.client import Client

WINDOW = 8
"""Chunks sent and not yet acknowledged: 2 MiB, which fills a link of 100 Mbit/s at 160 ms."""

Source = bytes | str | os.PathLike[str]
Progress = Callable[[int, int], object]
"""Called with (bytes the server has, all bytes) after each acknowledgement."""


class Begun(msgspec.Struct):
    """Data of ``modules.begin``."""

    upload: int
    received: int = 0
    exists: bool = False


class UploadState:
    """What the server has of one upload; filled by the connection's reader."""

    def __init__(self, received: int) -> None:
        self.received = received
        self._error: RealmError | None = None
        self._changed = asyncio.Event()

    def ack(self, received: int) -> None:
        """The server has ``received`` bytes."""
        self.received = received
        self._changed.set()

    def fail(self, error: RealmError) -> None:
        """The server refused a chunk, or is gone. The first reason counts: later ones follow from it."""
        if self._error is None:
            self._error = error
        self._changed.set()

    async def until(self, received: int, wait: float | None) -> None:
        """Wait until the server has ``received`` bytes, at most ``wait`` seconds between two acknowledgements."""
        while self.received < received and self._error is None:
            self._changed.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                raise WaitTimeout("wait_timeout", f"upload: no acknowledgement for {wait:g} seconds") from None
        if self._error is not None:
            raise self._error


def _load(source: Source) -> tuple[bytes, str]:
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    return data, hashlib.sha256(data).hexdigest()


async def push(client: Client, name: str, source: Source, progress: Progress | None, wait: float | None) -> Module:
    """Store ``source`` under ``name``; content that the server already has is not sent again."""
    # Reading and hashing may take a while and must not stall the connection's other calls.
    data, sha256 = await asyncio.to_thread(_load, source)
    params = {"name": name, "size": len(data), "sha256": sha256}
    begun = await client.call("modules.begin", params, Begun)
    try:
        if not begun.exists:
            await _send(client, begun, data, progress, wait)
        elif progress is not None:
            progress(len(data), len(data))
        return await client.call_within(None, "modules.commit", {"upload": begun.upload}, Module)
    except BaseException:
        # An upload that nobody will finish would be kept until the connection ends.
        client.post("modules.abort", {"upload": begun.upload})
        raise


async def _send(client: Client, begun: Begun, data: bytes, progress: Progress | None, wait: float | None) -> None:
    if not 0 <= begun.received <= len(data):
        raise ProtocolError("protocol_error", f"the server claims {begun.received} of {len(data)} bytes")
    view = memoryview(data)
    state = UploadState(begun.received)
    with client.uploading(begun.upload, state):
        offset = begun.received
        while offset < len(data):
            chunk = view[offset : offset + CHUNK_SIZE]
            await state.until(offset + len(chunk) - WINDOW * CHUNK_SIZE, wait)
            if progress is not None:
                progress(state.received, len(data))
            await client.send_frame(Protocol.chunk(begun.upload, offset, chunk))
            offset += len(chunk)
        await state.until(len(data), wait)
        if progress is not None:
            progress(len(data), len(data))
