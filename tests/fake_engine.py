"""``-m tests.fake_engine``: see :mod:`tests.fake_children`."""

from __future__ import annotations

import sys

from tests.fake_children import engine

sys.exit(engine())
