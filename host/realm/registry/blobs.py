"""Content-addressed files: a blob's name is the SHA-256 of its bytes, so it is never changed in place.

Which tenant may know of a blob is the database's business (:mod:`realm.registry.database`).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Set as AbstractSet
from pathlib import Path

_HASH_CHUNK = 1 << 20


def sync_folder(folder: Path) -> None:
    """Make a rename or removal inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_and_sync(path: Path) -> str:
    """Force a file to disk and give its SHA-256 in hex. Blocks; large updates release the GIL."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class BlobStore:
    """Blobs below ``root/blobs``; files that are not blobs yet below ``root/incoming``."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._incoming = root / "incoming"
        for folder in (self._blobs, self._incoming):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # What a crash left half-made is nobody's.
        for leftover in self._incoming.iterdir():
            leftover.unlink()

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be."""
        return self._blobs / sha256[:2] / sha256

    def incoming(self) -> Path:
        """A fresh name for a file being received, on the same file system as the blobs."""
        return self._incoming / secrets.token_hex(16)

    def adopt(self, file: Path, sha256: str) -> None:
        """Turn a file, already synced and hashed, into a blob. Atomic; ``file`` is gone afterwards.

        One that is there already is replaced by its like, so that how long it takes tells nobody of it.
        """
        target = self.path(sha256)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        file.replace(target)
        # Nothing was done if both were names of one file.
        file.unlink(missing_ok=True)
        sync_folder(target.parent)
        sync_folder(self._blobs)

    def borrow(self, sha256: str) -> Path:
        """A second name for a blob below ``incoming``, which outlives the blob's removal."""
        name = self.incoming()
        name.hardlink_to(self.path(sha256))
        return name

    def remove(self, sha256: str) -> None:
        """Delete a blob; one that is already gone is fine, since a crash may repeat a removal."""
        self.path(sha256).unlink(missing_ok=True)

    def sweep(self, referenced: AbstractSet[str]) -> int:
        """Delete blobs that nothing refers to (a crash between a file and its record); counts them."""
        removed = 0
        for folder in self._blobs.iterdir():
            for blob in folder.iterdir():
                if blob.name not in referenced:
                    blob.unlink()
                    removed += 1
        return removed
