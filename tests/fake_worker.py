"""``-m tests.fake_worker``: see :mod:`tests.fake_children`."""

from __future__ import annotations

import sys

from tests.fake_children import worker

sys.exit(worker())
