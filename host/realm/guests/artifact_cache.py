"""The folder of compiled modules: what is found there is native code, so it is trusted only as far as it is ours.

An entry is two files named by :func:`cache_key`: the artifact, and facts with its hash. Both must be
plain files of this user that nobody else can write, with the contents of the compilation that made them;
anything else in their place is removed, and the module is compiled again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import msgspec

from realm.errors import RealmError
from realm.guests import abi
from realm.guests.bulk_memory import REWRITER_VERSION
from realm.guests.fiber_types import settings_fingerprint

_FORMAT = 2
_MAX_FACTS = 1 << 20
_TEMPORARY = ".new-"
ABANDONED_SECONDS = 300.0
"""Age at which a temporary file belongs to no compilation any more: ten times what one may take."""
CACHE_BYTES = 8 << 30
"""Most bytes of artifacts that are kept, all tenants' together. Those unused for the longest time go first.

A tenant that compiles this much takes the place of what others have not used meanwhile. It costs them one
compilation, when they use that next; what is used all the time stays (``gateway.artifacts`` marks it).
"""


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What vouches for an artifact. ``key`` binds it to its module and settings."""

    key: str
    artifact_sha256: str
    imports: list[str]


@dataclass(frozen=True)
class Entry:
    """Where a module's artifact and facts are, or will be."""

    key: str
    artifact: Path
    facts: Path


def cache_key(sha256: str) -> str:
    """Name of a module's artifact: changes with content, Wasmtime's version, settings, ABI and rewriting."""
    text = f"{_FORMAT};{abi.ABI_VERSION};{REWRITER_VERSION};{sha256};{settings_fingerprint()}"
    return hashlib.sha256(text.encode()).hexdigest()


class ArtifactCache:
    """One folder; made, and private to this user.

    Raises:
        RealmError: ``internal`` if the folder belongs to somebody else or cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int = CACHE_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._make()

    def _make(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self._folder.stat()
            if found.st_uid != os.geteuid():
                raise RealmError("internal", f"the cache {self._folder} belongs to another user; remove it")
            if stat.S_IMODE(found.st_mode) != 0o700:
                # Whatever others put in meanwhile is not theirs to give: each entry is looked at by itself.
                self._folder.chmod(0o700)
        except OSError as error:
            raise RealmError("internal", f"the cache {self._folder} cannot be used: {error.strerror}") from error

    def entry(self, sha256: str) -> Entry:
        key = cache_key(sha256)
        return Entry(key, self._folder / f"{key}.cwasm", self._folder / f"{key}.json")

    def find(self, entry: Entry) -> Facts | None:
        """The facts of an earlier compilation, if its artifact is still what was written then."""
        try:
            with _ours(entry.facts) as file:
                text = file.read(_MAX_FACTS + 1)
            if len(text) > _MAX_FACTS:
                raise ValueError("facts are not that long")
            facts = msgspec.json.decode(text, type=Facts)
            with _ours(entry.artifact) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if facts.key == entry.key and facts.artifact_sha256 == digest:
                # Marks the entry as used.
                os.utime(entry.facts)
                return facts
        except FileNotFoundError:
            # Or another process is about to write the facts: nothing is removed.
            return None
        except (OSError, msgspec.MsgspecError, ValueError):
            pass
        for path in (entry.facts, entry.artifact):
            _remove(path)
        return None

    def temporary(self) -> Path:
        """A new empty file in the folder, for :meth:`install`."""
        try:
            descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=self._folder)
        except FileNotFoundError:
            # Somebody removed the folder: it is only a cache.
            self._make()
            descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=self._folder)
        os.close(descriptor)
        return Path(name)

    def install(self, entry: Entry, output: Path, facts: Facts) -> None:
        """Give the artifact in ``output`` its name. Raises OSError."""
        paper = self.temporary()
        try:
            paper.write_bytes(msgspec.json.encode(facts))
            for path in (entry.artifact, entry.facts):
                if path.is_dir() and not path.is_symlink():
                    _remove(path)
            # The artifact is in place before the facts that vouch for it.
            output.replace(entry.artifact)
            paper.replace(entry.facts)
        finally:
            paper.unlink(missing_ok=True)

    def sweep(self, keep: Entry | None = None) -> None:
        """Remove what killed compilations left, and the artifacts that are too many (never ``keep``'s)."""
        now = time.time()
        entries: list[tuple[float, int, Path]] = []
        with suppress(FileNotFoundError), os.scandir(self._folder) as found:
            for item in found:
                path = Path(item.path)
                with suppress(OSError):
                    about = item.stat(follow_symlinks=False)
                    if item.name.startswith(_TEMPORARY) and now - about.st_mtime > ABANDONED_SECONDS:
                        _remove(path)
                    elif path.suffix == ".cwasm":
                        entries.append((_used(path, about.st_mtime), about.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._max_bytes:
                break
            if keep is not None and path == keep.artifact:
                continue
            # A worker that has it mapped goes on.
            _remove(path.with_suffix(".json"))
            _remove(path)
            total -= size


def _used(artifact: Path, marked: float) -> float:
    """When an entry was last used: a look-up touches the facts, and whoever uses what it found the artifact."""
    try:
        return max(marked, artifact.with_suffix(".json").lstat().st_mtime)
    except OSError:
        return marked


@contextmanager
def _ours(path: Path) -> Iterator[BufferedReader]:
    """Open a plain file of this user that no other name and no other user reaches. Raises OSError if it is not one."""
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
            raise OSError("not a plain file with one name")
        if about.st_uid != os.geteuid() or about.st_mode & 0o022:
            raise OSError("others can write it")
        yield file


def _remove(path: Path) -> None:
    """Remove whatever has that name."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
