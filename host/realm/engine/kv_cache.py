"""Pages of the KV cache: who holds which, and which computed pages can be found again.

Plain bookkeeping without torch: a page is a number; the tensors are the runner's. A page is in
exactly one of three states, so ``free + used + cached == total`` always holds (:meth:`PagePool.check`):

* *free*: holds nothing anyone may read;
* *used*: held by one or more sequences (its reference count);
* *cached*: held by none, but its contents are known under a key, so a later sequence may take it.
  Cached pages are given away, least recently used first, when free ones run out.

Keys are chained BLAKE2b-256 hashes: ``hash(parent key, tokens of the page)``, where the root is a
hash of the tenant's salt, the model and the adapter. So a page is found only by a sequence of the
same tenant with the same tokens from the start on. A hit compares the tokens themselves too: a
collision can then never hand out someone else's keys and values.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

PAGE_SIZE = 16
"""Tokens a page."""


def root_key(salt: bytes, model: str, adapter: str) -> bytes:
    """The parent key of a sequence's first page. ``salt`` is secret and per tenant."""
    return hashlib.blake2b(f"{model}\0{adapter}".encode(), key=salt, digest_size=32).digest()


def child_key(parent: bytes, tokens: bytes) -> bytes:
    """Key of a full page that follows the page with key ``parent``; ``tokens`` are uint32 bytes."""
    return hashlib.blake2b(parent + tokens, digest_size=32).digest()


@dataclass(frozen=True)
class _Sealed:
    key: bytes
    parent: bytes
    tokens: bytes


class PagePool:
    """Reference-counted pages with a prefix cache. Not thread-safe; owned by the scheduler.

    Attributes:
        total: number of pages.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        # Popped from the end: low numbers first, so an idle engine touches little memory.
        self._free = list(range(total - 1, -1, -1))
        self._references = [0] * total
        self._sealed: dict[int, _Sealed] = {}
        self._by_key: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.total - len(self._free) - len(self._cached)

    @property
    def available(self) -> int:
        """Pages that :meth:`allocate` can still give."""
        return len(self._free) + len(self._cached)

    def allocate(self) -> int | None:
        """A page with one reference and unspecified contents, or None when all are used."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self._unseal(page)
        else:
            return None
        self._references[page] = 1
        return page

    def retain(self, page: int) -> None:
        """One more holder of a used or cached page."""
        if not self._references[page]:
            del self._cached[page]
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one leaves the page cached (if sealed) or free."""
        count = self._references[page]
        if count <= 0:
            raise AssertionError(f"page {page} is released more often than it is held")
        self._references[page] = count - 1
        if count == 1:
            if page in self._sealed:
                self._cached[page] = None
            else:
                self._free.append(page)

    def make_writable(self, page: int) -> bool:
        """Whether the only holder may write into the page; if so, it is no longer found by key."""
        if self._references[page] != 1:
            return False
        self._unseal(page)
        return True

    def seal(self, page: int, parent: bytes, tokens: bytes) -> bytes:
        """Make a full page findable; returns its key.

        When another page with the same contents is known already, that one stays the findable one.
        """
        key = child_key(parent, tokens)
        if page not in self._sealed and key not in self._by_key:
            self._sealed[page] = _Sealed(key, parent, tokens)
            self._by_key[key] = page
        return key

    def find(self, parent: bytes, tokens: bytes) -> tuple[int, bytes] | None:
        """The page that holds these tokens after ``parent``, and its key. Takes no reference."""
        key = child_key(parent, tokens)
        page = self._by_key.get(key)
        if page is None:
            return None
        sealed = self._sealed[page]
        if sealed.parent != parent or sealed.tokens != tokens:
            return None
        return page, key

    def _unseal(self, page: int) -> None:
        sealed = self._sealed.pop(page, None)
        if sealed is not None:
            del self._by_key[sealed.key]

    def check(self, held: dict[int, int]) -> None:
        """Verify every invariant. ``held`` counts, for each page, the sequences that list it.

        Raises:
            AssertionError: naming the first page or sum that is wrong.
        """
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free):
            raise AssertionError("a page is twice in the free list")
        if free & cached:
            raise AssertionError(f"pages {sorted(free & cached)} are free and cached")
        for page in range(self.total):
            count = held.get(page, 0)
            if self._references[page] != count:
                raise AssertionError(f"page {page} has {self._references[page]} references and {count} holders")
            if (count == 0) != (page in free or page in cached):
                raise AssertionError(f"page {page} with {count} holders is in the wrong list")
            if page in free and page in self._sealed:
                raise AssertionError(f"free page {page} can be found by key")
            if page in cached and page not in self._sealed:
                raise AssertionError(f"cached page {page} cannot be found")
        for key, page in self._by_key.items():
            if self._sealed[page].key != key:
                raise AssertionError(f"page {page} is found under another page's key")
        if len(self._by_key) != len(self._sealed):
            raise AssertionError("keys and sealed pages differ in number")
        if len(free) + len(cached) + self.used != self.total:
            raise AssertionError("free + used + cached is not the total")
