"""Uploads: hash, begin, chunks with a window, commit. The same for modules and adapters."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import msgspec

from realm_sdk.errors import ProtocolError, RealmError, WaitTimeout, error_of
from realm_sdk.protocol import CHUNK_SIZE, Protocol

if TYPE_CHECKING:
    from realm_sdk.client import Client

WINDOW = 8
"""Chunks sent and not yet acknowledged: 2 MiB, which fills a link of 100 Mbit/s at 160 ms."""

PIECE = WINDOW * CHUNK_SIZE
"""Bytes read from a file at a time: it is never in memory as a whole."""

Source = bytes | str | os.PathLike[str]
Progress = Callable[[int, int], object]
"""Called with (bytes the server has, all bytes) after each acknowledgement."""

T = TypeVar("T")


class Begun(msgspec.Struct):
    """Data of ``modules.begin`` and ``adapters.begin``."""

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


def open_source(source: Source) -> BinaryIO:
    """A file to read ``source`` from."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = Path(source)
    # What is no regular file, such as a pipe, may be read once only, and the content is needed twice.
    return path.open("rb") if path.is_file() else io.BytesIO(path.read_bytes())


def _digest(file: BinaryIO) -> tuple[int, str]:
    """How many bytes a file has, and their SHA-256 in hex."""
    digest, size = hashlib.sha256(), 0
    while piece := file.read(PIECE):
        digest.update(piece)
        size += len(piece)
    return size, digest.hexdigest()


async def store(
    client: Client,
    kind: str,
    file: BinaryIO,
    params: dict[str, Any],
    result: type[T],
    progress: Progress | None,
    wait: float | None,
) -> T:
    """Send ``file`` with ``KIND.begin``, chunks and ``KIND.commit``; what the latter gives.

    Content that the server already has is not sent again. ``params`` are added to those of ``KIND.begin``; ``wait``
    bounds each wait but that for the commit. The file is left open. A failure of any sort aborts the upload.
    """
    # Reading may take a while and must not stall the connection's other calls.
    size, sha256 = await asyncio.to_thread(_digest, file)
    begun = await client.call_within(wait, f"{kind}.begin", {**params, "size": size, "sha256": sha256}, Begun)
    try:
        if not begun.exists:
            await _send(client, begun, file, size, progress, wait)
        elif progress is not None:
            progress(size, size)
        return await client.call_within(None, f"{kind}.commit", {"upload": begun.upload}, result)
    except BaseException:
        # An upload that nobody will finish would be kept until the connection ends.
        client.post(f"{kind}.abort", {"upload": begun.upload})
        raise


async def _send(
    client: Client, begun: Begun, file: BinaryIO, size: int, progress: Progress | None, wait: float | None
) -> None:
    offset = begun.received
    if not 0 <= offset <= size:
        raise ProtocolError("protocol_error", f"the server claims {offset} of {size} bytes")
    state = UploadState(offset)
    with client.uploading(begun.upload, state):
        while offset < size:
            piece = memoryview(await asyncio.to_thread(_read, file, offset, min(PIECE, size - offset)))
            if not piece:
                text = f"the file had {size} bytes and now ends after {offset}: it was changed while it was sent"
                raise error_of("upload_size", text)
            for start in range(0, len(piece), CHUNK_SIZE):
                chunk = piece[start : start + CHUNK_SIZE]
                await state.until(offset + len(chunk) - WINDOW * CHUNK_SIZE, wait)
                if progress is not None:
                    progress(state.received, size)
                await client.send_frame(Protocol.chunk(begun.upload, offset, chunk))
                offset += len(chunk)
        await state.until(size, wait)
        if progress is not None:
            progress(size, size)


def _read(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)
