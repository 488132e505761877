"""Uploads as a state machine: whatever is sent in whatever order, files and bytes are accounted for."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from realm.errors import RealmError
from realm.gateway.uploads import Uploads
from realm.settings import GatewayLimits

LIMITS = GatewayLimits(uploads=3, module_bytes=64, chunk_bytes=16)


class UploadMachine(RuleBasedStateMachine):
    """A model of what each upload has received, beside the real thing with real files."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        names = itertools.count()
        root = Path(self.folder.name)
        self.uploads = Uploads(LIMITS, lambda: root / str(next(names)))
        self.model: dict[int, tuple[int, bytes]] = {}
        self.committing: set[int] = set()

    @rule(size=st.integers(0, 80), stored=st.booleans())
    def begin(self, size: int, stored: bool) -> None:
        try:
            upload = self.uploads.begin("m", size, "0" * 64, stored=stored)
        except RealmError as error:
            assert error.code == ("module_too_large" if size > 64 else "busy")
            assert size > 64 or len(self.model) == 3
            return
        assert size <= 64 and len(self.model) < 3 and upload.number not in self.model
        self.model[upload.number] = (size, bytes(size) if stored else b"")

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
        assert len(list(Path(self.folder.name).iterdir())) <= len(self.model)

    def teardown(self) -> None:
        self.uploads.close()
        for number in self.committing:
            self.uploads.end(number)
        assert len(self.uploads) == 0 and not list(Path(self.folder.name).iterdir())
        self.folder.cleanup()


TestUploads = UploadMachine.TestCase
TestUploads.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
