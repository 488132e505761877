"""Uploads in flight of one connection.

:class:`Upload` is the state machine, without I/O: what may come next, and which error otherwise.
:class:`Uploads` gives each one a file, which is gone when the upload ends in any way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from realm.errors import RealmError
from realm.settings import GatewayLimits


@dataclass(slots=True)
class Upload:
    """Bytes of one module, expected in order.

    Attributes:
        number: what frames call it; of one connection, never reused.
        stored: the tenant has this content already: there is nothing to send.
        received: bytes that have come.
        committing: ``modules.commit`` has begun: nothing more may come.
    """

    number: int
    name: str
    size: int
    sha256: str
    stored: bool = False
    received: int = 0
    committing: bool = False

    def accept(self, offset: int, size: int, chunk_bytes: int) -> None:
        """Account for a chunk; after an error nothing has changed, and the client may go on.

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
        self.received += size

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


@dataclass(slots=True)
class Uploads:
    """All uploads of one connection. ``new_file`` gives a fresh path for received bytes."""

    limits: GatewayLimits
    new_file: Callable[[], Path]
    _slots: dict[int, _Slot] = field(default_factory=dict)
    _next: int = 1

    def begin(self, name: str, size: int, sha256: str, *, stored: bool) -> Upload:
        """Raises RealmError ``busy`` or ``module_too_large``."""
        if size > self.limits.module_bytes:
            raise RealmError(
                "module_too_large",
                f"a module of {size} bytes is over {self.limits.module_bytes}",
                details={"limit": self.limits.module_bytes, "used": size},
            )
        if len(self._slots) >= self.limits.uploads:
            raise RealmError(
                "busy",
                f"{self.limits.uploads} uploads of this connection are in flight: commit or abort one",
                details={"limit": self.limits.uploads, "used": len(self._slots)},
                retry_after=1.0,
            )
        upload = Upload(self._next, name, size, sha256, stored, size if stored else 0)
        path = None if stored else self.new_file()
        self._slots[upload.number] = _Slot(upload, path, path.open("xb") if path else None)
        self._next += 1
        return upload

    def chunk(self, number: int, offset: int, data: bytes) -> int:
        """Write a chunk; gives the bytes received so far. Raises RealmError."""
        slot = self._slot(number)
        slot.upload.accept(offset, len(data), self.limits.chunk_bytes)
        if slot.file is not None:
            slot.file.write(data)
        return slot.upload.received

    def take(self, number: int) -> tuple[Upload, Path | None]:
        """Begin the commit: the upload and its whole file (None if stored), which :meth:`end` deletes."""
        slot = self._slot(number)
        slot.upload.begin_commit()
        if slot.file is not None:
            slot.file.close()
            slot.file = None
        return slot.upload, slot.path

    def end(self, number: int) -> None:
        """Forget an upload and delete its file, if it is still there."""
        slot = self._slots.pop(number)
        if slot.file is not None:
            slot.file.close()
        if slot.path is not None:
            slot.path.unlink(missing_ok=True)

    def abort(self, number: int) -> None:
        """Give one up. Raises RealmError ``upload_not_found``, or ``upload_out_of_order`` in its commit."""
        slot = self._slot(number)
        if slot.upload.committing:
            raise RealmError("upload_out_of_order", "the upload is being committed", details={"upload": number})
        self.end(number)

    def close(self) -> None:
        """The connection is gone. An upload being committed is ended by its commit."""
        for number, slot in list(self._slots.items()):
            if not slot.upload.committing:
                self.end(number)

    def __len__(self) -> int:
        return len(self._slots)

    def _slot(self, number: int) -> _Slot:
        slot = self._slots.get(number)
        if slot is None:
            raise RealmError("upload_not_found", f"this connection has no upload {number}", details={"upload": number})
        return slot
