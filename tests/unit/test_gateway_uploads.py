"""Uploads as a state machine: whatever is sent in whatever order, files and bytes are accounted for."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from realm.errors import RealmError
from realm.gateway.quotas import TenantUse
from realm.gateway.uploads import SMALL_CHUNK, Uploads
from realm.limits import TenantLimits
from realm.settings import GatewayLimits

LIMITS = GatewayLimits(chunk_bytes=16, upload_idle_seconds=60.0)


class UploadMachine(RuleBasedStateMachine):
    """A model of what each upload has received, beside the real thing with real files."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        names = itertools.count()
        root = Path(self.folder.name)
        self.now = 1000.0
        self.use = TenantUse("alice", TenantLimits(uploads=3), lambda: self.now)
        self.uploads = Uploads(LIMITS, lambda: root / str(next(names)), self.use, lambda: self.now)
        self.model: dict[int, tuple[int, bytes]] = {}
        self.active: dict[int, float] = {}
        self.committing: set[int] = set()
        self.elsewhere = 0

    @rule(size=st.integers(0, 80), stored=st.booleans())
    def begin(self, size: int, stored: bool) -> None:
        try:
            upload = self.uploads.begin("m", size, "0" * 64, stored=stored)
        except RealmError as error:
            assert error.code == "rate_limited" and error.details["name"] == "uploads" and error.retry_after
            assert len(self.model) + self.elsewhere == 3
            return
        assert len(self.model) + self.elsewhere < 3 and upload.number not in self.model
        self.model[upload.number] = (size, bytes(size) if stored else b"")
        self.active[upload.number] = self.now

    @rule(begun=st.booleans())
    def another_connection(self, begun: bool) -> None:
        """Of the same tenant: it takes a place, or gives one back."""
        if begun and len(self.model) + self.elsewhere < 3:
            self.use.begin_upload()
            self.elsewhere += 1
        elif not begun and self.elsewhere:
            self.use.end_upload()
            self.elsewhere -= 1

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0, 60.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        ended = self.uploads.expire()
        late = {n for n in self.model if self.now - self.active[n] > 60 and n not in self.committing}
        assert {number for number, _ in ended} == late
        for number, error in ended:
            assert error.code == "upload_idle" and error.details["received"] == len(self.model[number][1])
            del self.model[number]

    @rule(number=st.integers(0, 12), shift=st.sampled_from([0, 0, 0, -1, 1, 2**63]), data=st.binary(max_size=20))
    def chunk(self, number: int, shift: int, data: bytes) -> None:
        size, received = self.model.get(number, (0, b""))
        offset = max(0, len(received) + shift)
        try:
            now = self.uploads.chunk(number, offset, data)
        except RealmError as error:
            expected = {"upload_out_of_order", "upload_size"} if number in self.model else {"upload_not_found"}
            assert error.code in expected
            fits = len(data) <= 16 and len(received) + len(data) <= size and offset == len(received)
            assert number not in self.model or number in self.committing or not fits
            return
        assert offset == len(received) and len(received) + len(data) <= size and number not in self.committing
        self.model[number] = (size, received + data)
        if data:
            self.active[number] = self.now
        assert now == len(received) + len(data)

    @rule(number=st.integers(0, 12))
    def commit(self, number: int) -> None:
        size, received = self.model.get(number, (0, b""))
        try:
            _, path = self.uploads.take(number)
        except RealmError:
            assert number not in self.model or number in self.committing or len(received) < size
            return
        assert len(received) == size and number not in self.committing
        assert path is None or path.read_bytes() == received
        self.committing.add(number)

    @precondition(lambda self: self.committing)
    @rule()
    def end(self) -> None:
        number = self.committing.pop()
        self.uploads.end(number)
        del self.model[number]

    @rule(number=st.integers(0, 12))
    def abort(self, number: int) -> None:
        try:
            self.uploads.abort(number)
        except RealmError as error:
            assert error.code == ("upload_out_of_order" if number in self.committing else "upload_not_found")
            return
        del self.model[number]

    @invariant()
    def counted(self) -> None:
        assert len(self.uploads) == len(self.model)
        assert self.use.uploads == len(self.model) + self.elsewhere
        assert len(list(Path(self.folder.name).iterdir())) <= len(self.model)

    def teardown(self) -> None:
        self.uploads.close()
        with pytest.raises(RealmError):
            self.uploads.begin("m", 1, "0" * 64, stored=False)
        for number in self.committing:
            self.uploads.end(number)
        assert len(self.uploads) == 0 and not list(Path(self.folder.name).iterdir())
        assert self.use.uploads == self.elsewhere
        self.folder.cleanup()


TestUploads = UploadMachine.TestCase
TestUploads.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("completes", [False, True])
@pytest.mark.parametrize("size", [0, 1, SMALL_CHUNK - 1, SMALL_CHUNK])
def test_small_chunks_count_as_calls(tmp_path: Path, size: int, completes: bool) -> None:
    limits, now = GatewayLimits(), [0.0]
    use = TenantUse("alice", TenantLimits(requests_per_minute=1), lambda: now[0])
    uploads = Uploads(limits, lambda: tmp_path / "file", use)
    number = uploads.begin("m", SMALL_CHUNK * 2 + (size if completes else 100_000), "0" * 64, stored=False).number
    uploads.chunk(number, 0, bytes(SMALL_CHUNK * 2))
    assert use.requests_used() == 0
    received = uploads.chunk(number, SMALL_CHUNK * 2, bytes(size))
    counts = size == 0 or (size < SMALL_CHUNK and not completes)
    assert use.requests_used() == counts
    if counts:
        with pytest.raises(RealmError) as refused:
            uploads.chunk(number, received, b"")
        assert refused.value.code == "rate_limited" and refused.value.retry_after
        # Nothing is lost: it goes on where it was.
        now[0] += 60.0
        assert uploads.chunk(number, received, b"") == received
    uploads.close()


def test_a_full_disk_ends_the_upload(tmp_path: Path) -> None:
    use = TenantUse("alice", TenantLimits(), lambda: 0.0)
    uploads = Uploads(LIMITS, lambda: tmp_path / "missing" / "x", use, lambda: 0.0)
    with pytest.raises(OSError):
        uploads.begin("m", 10, "0" * 64, stored=False)
    assert use.uploads == 0 and len(uploads) == 0
    # Buffered bytes meet the full disk when the file is closed for the commit.
    uploads = Uploads(LIMITS, lambda: tmp_path / "x", use, lambda: 0.0)
    number = uploads.begin("m", 10, "0" * 64, stored=False).number
    uploads.chunk(number, 0, bytes(10))
    file = uploads._slots[number].file
    assert file is not None
    os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
    with pytest.raises(OSError):
        uploads.take(number)
    assert use.uploads == 0 and len(uploads) == 0 and not (tmp_path / "x").exists()
