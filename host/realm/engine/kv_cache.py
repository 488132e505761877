"""Pages of the KV cache: who holds which, and which computed pages can be found again.

Plain bookkeeping without torch: a page is a number; the tensors are the runner's. A page is in
exactly one of three states, so ``free + used + cached == total`` always holds (:meth:`PagePool.check`):

* *free*: holds nothing anyone may read;
* *used*: held by one or more sequences (its reference count);
* *cached*: held by none, but its contents are known under a key, so a later sequence may take it.
  Cached pages are given away when free ones run out.

Each used or cached page belongs to one tenant (:class:`PageHolder`): keys are salted, so no page is
ever shared by two. The pages that a tenant holds are thus counted exactly, at once, however many of
its sequences share them. Cached pages do not count against a tenant's limit, because they can be taken
at any time; what bounds them is whose are taken: those of the tenant that holds most pages. So a
tenant that cycles through prompts replaces its own cached pages, and another keeps its cache as long as
it holds no more than its share of the pool. Pages in use go before cached ones: what a tenant's open
sequences may displace of others' caches is bounded by its limit. A tenant that has not called for
:data:`PROTECTED_SECONDS` loses its cached pages first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

PAGE_SIZE = 16
"""Tokens a page."""


PROTECTED_SECONDS = 600.0
"""How long the cached pages of a tenant that makes no call are worth as much as another's."""


class PageHolder:
    """A tenant's pages.

    Attributes:
        used: pages that its sequences hold, each counted once. cached: its cached pages, least
            recently used first. seen: when it last made a call, in seconds of the scheduler's clock.
    """

    __slots__ = ("cached", "seen", "used")

    def __init__(self) -> None:
        self.used = 0
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.seen = 0.0

    @property
    def pages(self) -> int:
        """Used and cached pages."""
        return self.used + len(self.cached)


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
        holders: tenants that hold any page.
        now: the scheduler's clock, in seconds; it tells whose cached pages are out of use.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        # Popped from the end: low numbers first, so an idle engine touches little memory.
        self._free = list(range(total - 1, -1, -1))
        self._references = [0] * total
        self._sealed: dict[int, _Sealed] = {}
        self._by_key: dict[bytes, int] = {}
        self._owners: list[PageHolder | None] = [None] * total
        self._cached = 0
        self.now = 0.0
        self.holders: dict[PageHolder, None] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return self._cached

    @property
    def used(self) -> int:
        return self.total - len(self._free) - self._cached

    def allocate(self, holder: PageHolder) -> int | None:
        """A page with one reference and unspecified contents, or None when all are used."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            loser = self._loser()
            page, _ = loser.cached.popitem(last=False)
            self._cached -= 1
            self._unseal(page)
            if not loser.pages:
                del self.holders[loser]
        else:
            return None
        self._references[page] = 1
        self._owners[page] = holder
        if not holder.pages:
            self.holders[holder] = None
        holder.used += 1
        return page

    def _loser(self) -> PageHolder:
        """Whose cached page is given away. There is at least one cached page."""
        gone: PageHolder | None = None
        most: PageHolder | None = None
        for other in self.holders:
            if other.cached:
                if other.seen < self.now - PROTECTED_SECONDS:
                    gone = other
                if most is None or other.pages > most.pages:
                    most = other
        loser = gone or most
        assert loser is not None
        return loser

    def is_cached(self, page: int) -> bool:
        """Whether no sequence holds the page: taking it makes it one more that its tenant uses."""
        return not self._references[page]

    def retain(self, page: int) -> None:
        """One more holder of a used or cached page."""
        if not self._references[page]:
            owner = self._owner(page)
            del owner.cached[page]
            owner.used += 1
            self._cached -= 1
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one leaves the page cached (if sealed) or free."""
        count = self._references[page]
        if count <= 0:
            raise AssertionError(f"page {page} is released more often than it is held")
        self._references[page] = count - 1
        if count == 1:
            owner = self._owner(page)
            owner.used -= 1
            if page in self._sealed:
                owner.cached[page] = None
                self._cached += 1
            else:
                self._owners[page] = None
                self._free.append(page)
                if not owner.pages:
                    del self.holders[owner]

    def _owner(self, page: int) -> PageHolder:
        owner = self._owners[page]
        if owner is None:
            raise AssertionError(f"page {page} has no owner")
        return owner

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

    def check(self, held: dict[int, int], owned: dict[int, PageHolder]) -> None:
        """Verify every invariant.

        Args:
            held: for each page, how many sequences list it. owned: whose those are.

        Raises:
            AssertionError: naming the first page or sum that is wrong.
        """
        free = set(self._free)
        cached = {page: holder for holder in self.holders for page in holder.cached}
        if len(free) != len(self._free):
            raise AssertionError("a page is twice in the free list")
        # Each page is in one of the three; of the free ones, which are most, nothing is looked at one by one.
        for one, other in ((free, cached.keys()), (free, held.keys()), (cached.keys(), held.keys())):
            if both := one & other:
                raise AssertionError(f"pages {sorted(both)} are in two states at once")
        if len(free) + len(cached) + len(held) != self.total:
            raise AssertionError("a page is in no state")
        if any(map(self._references.__getitem__, free)) or not free.isdisjoint(self._sealed):
            raise AssertionError("a free page is held, or can be found by key")
        if set(map(self._owners.__getitem__, free)) - {None}:
            raise AssertionError("a free page is counted for a tenant")
        for page, holder in cached.items():
            if self._references[page] or page not in self._sealed or self._owners[page] is not holder:
                raise AssertionError(f"cached page {page} is held, cannot be found, or is another tenant's")
        used: dict[PageHolder, int] = {}
        for page, count in held.items():
            if self._references[page] != count:
                raise AssertionError(f"page {page} has {self._references[page]} references and {count} holders")
            owner = self._owners[page]
            if owner is not owned[page]:
                raise AssertionError(f"page {page} is counted for the wrong tenant")
            used[owner] = used.get(owner, 0) + 1
        for holder in self.holders:
            if holder.used != used.pop(holder, 0):
                raise AssertionError(f"a tenant's count of used pages is wrong: {holder.used}")
            if not holder.pages:
                raise AssertionError("a tenant without pages is listed as a holder")
        if used:
            raise AssertionError("a tenant with pages is not listed as a holder")
        for key, page in self._by_key.items():
            if self._sealed[page].key != key:
                raise AssertionError(f"page {page} is found under another page's key")
        if len(self._by_key) != len(self._sealed):
            raise AssertionError("keys and sealed pages differ in number")
        if len(cached) != self._cached or len(free) + len(cached) + self.used != self.total:
            raise AssertionError("free + used + cached is not the total")
