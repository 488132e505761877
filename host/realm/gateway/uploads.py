"""Uploads in flight of one connection.

:class:`Upload` is the state machine, without I/O: what may come next, and which error otherwise.
:class:`Uploads` gives each one a file, which is gone when the upload ends in any way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from realm.errors import RealmError
from realm.gateway.quotas import TenantUse
from realm.settings import GatewayLimits

SMALL_CHUNK = 16 << 10
"""A chunk of fewer bytes costs more to handle than to send, so it counts as a call."""

Kind = Literal["module", "adapter"]


def check_hash(found: str, announced: str) -> None:
    """Raises RealmError ``upload_hash_mismatch``."""
    if found != announced:
        raise RealmError(
            "upload_hash_mismatch",
            "the content that came has another SHA-256 than announced: upload it again",
            details={"announced": announced, "received": found},
        )


@dataclass(slots=True)
class Upload:
    """Bytes of one module or adapter, expected in order.

    Attributes:
        number: what frames call it; of one connection, never reused.
        kind, config: what it will be; an adapter's ``adapter_config.json``.
        stored: the tenant has this content already: there is nothing to send.
        received: bytes that have come.
        committing: the commit has begun: nothing more may come.
    """

    number: int
    name: str
    size: int
    sha256: str
    stored: bool = False
    received: int = 0
    committing: bool = False
    kind: Kind = "module"
    config: bytes = b""

    def check(self, offset: int, size: int, chunk_bytes: int) -> None:
        """Whether a chunk may come now; after an error the client may go on.

        Raises:
            RealmError: ``upload_out_of_order`` or ``upload_size``; ``details.received`` is where to go on.
        """
        details = {"upload": self.number, "received": self.received}
        if self.committing:
            raise RealmError("upload_out_of_order", "the upload is being committed", details=details)
        if size > chunk_bytes:
            raise RealmError(
                "upload_size",
                f"a chunk of {size} bytes is over {chunk_bytes}",
                details={**details, "limit": chunk_bytes, "used": size},
            )
        if offset != self.received:
            raise RealmError("upload_out_of_order", f"offset {offset} came, {self.received} is next", details=details)
        if offset + size > self.size:
            raise RealmError(
                "upload_size",
                f"the upload was announced with {self.size} bytes and more came",
                details={**details, "limit": self.size, "used": offset + size},
            )

    def begin_commit(self) -> None:
        """All bytes must be there.

        Raises:
            RealmError: ``upload_size`` (go on sending) or ``upload_out_of_order`` (committed twice).
        """
        details = {"upload": self.number, "received": self.received}
        if self.committing:
            raise RealmError("upload_out_of_order", "the upload is being committed", details=details)
        if self.received != self.size:
            raise RealmError(
                "upload_size",
                f"{self.received} of {self.size} bytes have come",
                details={**details, "limit": self.size},
            )
        self.committing = True


@dataclass(slots=True)
class _Slot:
    upload: Upload
    path: Path | None
    file: BinaryIO | None
    active: float


@dataclass(slots=True)
class Uploads:
    """All uploads of one connection. ``new_file`` gives a fresh path for received bytes.

    Each one has a place of its tenant's (``use``) from :meth:`begin` until it ends in any way.
    """

    limits: GatewayLimits
    new_file: Callable[[], Path]
    use: TenantUse
    clock: Callable[[], float] = time.monotonic
    _slots: dict[int, _Slot] = field(default_factory=dict)
    _next: int = 1
    _closed: bool = False

    def begin(
        self, name: str, size: int, sha256: str, *, stored: bool, kind: Kind = "module", config: bytes = b""
    ) -> Upload:
        """The size is checked by the caller. Raises RealmError ``rate_limited`` (the tenant's ``uploads``)."""
        if self._closed:
            # A call that was still on its way when the connection went: nobody would end this upload.
            raise RealmError("upload_not_found", "the connection of this upload is gone")
        self.use.begin_upload()
        try:
            path = None if stored else self.new_file()
            file = path.open("xb") if path else None
        except OSError:
            self.use.end_upload()
            raise
        upload = Upload(self._next, name, size, sha256, stored, size if stored else 0, kind=kind, config=config)
        self._slots[upload.number] = _Slot(upload, path, file, self.clock())
        self._next += 1
        return upload

    def chunk(self, number: int, offset: int, data: bytes) -> int:
        """Write a chunk; gives the bytes received so far.

        One of fewer than :data:`SMALL_CHUNK` bytes that does not complete its upload counts as a call.

        Raises:
            RealmError: as :meth:`Upload.check`, or ``rate_limited``; then nothing has changed.
        """
        slot = self._slot(number)
        upload, chunk_bytes = slot.upload, self.limits.chunk_bytes
        upload.check(offset, len(data), chunk_bytes)
        completes = bool(data) and offset + len(data) == upload.size
        if len(data) < min(SMALL_CHUNK, chunk_bytes) and not completes:
            self.use.request()
        upload.received += len(data)
        if data:
            slot.active = self.clock()
        if slot.file is not None:
            slot.file.write(data)
        return upload.received

    def take(self, number: int, kind: Kind = "module") -> tuple[Upload, Path | None]:
        """Begin the commit: the upload and its whole file (None if stored), which :meth:`end` deletes.

        Raises:
            RealmError: ``upload_not_found``, also for one of the other kind, or see :meth:`Upload.begin_commit`;
                the upload goes on.
            OSError: the file could not be written; the upload has ended.
        """
        slot = self._slot(number, kind)
        slot.upload.begin_commit()
        if slot.file is not None:
            try:
                slot.file.close()
            except OSError:
                self.end(number)
                raise
            slot.file = None
        return slot.upload, slot.path

    def end(self, number: int) -> None:
        """Forget an upload, give its place back and delete its file, if it is still there."""
        slot = self._slots.pop(number)
        self.use.end_upload()
        if slot.file is not None:
            # A full disk shows again when the rest is written.
            with contextlib.suppress(OSError):
                slot.file.close()
        if slot.path is not None:
            slot.path.unlink(missing_ok=True)

    def expire(self) -> list[tuple[int, RealmError]]:
        """End the uploads that nothing has come for; gives each one's number and what to tell of it."""
        most = self.limits.upload_idle_seconds
        late = self.clock() - most
        ended: list[tuple[int, RealmError]] = []
        for number, slot in list(self._slots.items()):
            if slot.active < late and not slot.upload.committing:
                received = slot.upload.received
                self.end(number)
                message = f"nothing came for {most:g} seconds and the upload is gone: begin it again"
                ended.append((number, RealmError("upload_idle", message, details={"received": received})))
        return ended

    def abort(self, number: int, kind: Kind = "module") -> None:
        """Give one up. Raises RealmError ``upload_not_found``, or ``upload_out_of_order`` in its commit."""
        slot = self._slot(number, kind)
        if slot.upload.committing:
            raise RealmError("upload_out_of_order", "the upload is being committed", details={"upload": number})
        self.end(number)

    def close(self) -> None:
        """The connection is gone. An upload being committed is ended by its commit."""
        self._closed = True
        for number, slot in list(self._slots.items()):
            if not slot.upload.committing:
                self.end(number)

    def __len__(self) -> int:
        return len(self._slots)

    def _slot(self, number: int, kind: Kind | None = None) -> _Slot:
        slot = self._slots.get(number)
        if slot is None:
            raise RealmError("upload_not_found", f"this connection has no upload {number}", details={"upload": number})
        if kind not in (None, slot.upload.kind):
            there = slot.upload.kind
            raise RealmError(
                "upload_not_found",
                f"upload {number} is of the {there} {slot.upload.name!r}: there are {there}s.commit and {there}s.abort",
                details={"upload": number, "kind": there},
            )
        return slot
