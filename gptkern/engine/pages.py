"""PagePool: who holds which pages of a cache, and what pages that nobody holds can still be found by.

A page is free, held by one or more sequences, or idle: held by nobody, while a key still leads to what it
holds. Idle pages become free when their memory is wanted, the least recently held first.

Sequences grow a page at a time. A page next to the one before it keeps a sequence's keys in one run of
memory, which can be read in place; so a sequence is given the next page where that is free, and begins at a
region of its own. Every decision is taken on the host, in plain Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_FREE_RUN = re.compile(rb"\x01+")


class CacheFullError(RuntimeError):
    """The cache has no room for what was asked; it is as it was before the call."""


class PagePool:
    """The pages of one cache.

    Args:
        num_pages: How many there are; they are numbered from 0.
        sequences: Most sequences at once. The pool has a region for each, where a sequence's run begins.
    """

    def __init__(self, num_pages: int, sequences: int = 1) -> None:
        self._regions = range(0, num_pages, max(num_pages // sequences, 1))
        self._holders = [0] * num_pages
        # One byte a page, 1 where it is free: runs are found by searching bytes.
        self._free_map = bytearray(b"\x01") * num_pages
        self._free_count = num_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        # The order of insertion is that of use, least recent first.
        self._idle: dict[int, None] = {}

    @property
    def num_pages(self) -> int:
        """Pages, held or not."""
        return len(self._holders)

    @property
    def available(self) -> int:
        """Pages that nobody holds."""
        return self._free_count + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that nobody holds and a key leads to."""
        return len(self._idle)

    def holders(self, page: int) -> int:
        """The number of sequences that hold a page."""
        return self._holders[page]

    def is_own(self, page: int) -> bool:
        """True if one sequence alone holds a page and no key leads to it, so that it may be written."""
        return self._holders[page] == 1 and page not in self._key_of

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Give a sequence ``count`` pages that nobody held, next to each other as far as that is possible.

        Args:
            after: The sequence's last page; None: it has none.

        Raises:
            CacheFullError: Fewer are available.
        """
        if count > self.available:
            raise CacheFullError(
                f"KVCache: {count} pages are needed, {self.available} of {self.num_pages} are free"
            )
        while self._free_count < count:
            self.forget(next(iter(self._idle)))
        pages: list[int] = []
        for _ in range(count):
            page = None if after is None else after + 1
            if page is None or page == self.num_pages or not self._free_map[page]:
                page = self._start()
            self._free_map[page] = 0
            self._free_count -= 1
            self._holders[page] = 1
            pages.append(page)
            after = page
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each of ``pages``, held or idle ones."""
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Count one holder less of each of a sequence's ``pages``."""
        # The last first: without the pages before it a page can be found no more, and so it is to go before.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._set_free(page)

    def remember(self, page: int, key: bytes) -> None:
        """Let ``key`` lead to what a held page holds, which from now on must not change.

        Where it leads to another page already, it goes on to do so.
        """
        if page not in self._key_of and key not in self._page_of:
            self._key_of[page] = key
            self._page_of[key] = page

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages that ``keys`` lead to, in order, up to the first key that leads to none."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def forget(self, page: int) -> None:
        """Let no key lead to a page any more: it is about to change."""
        key = self._key_of.pop(page, None)
        if key is None:
            return
        del self._page_of[key]
        if page in self._idle:
            del self._idle[page]
            self._set_free(page)

    def forget_all(self) -> None:
        """Let no key lead to any page any more."""
        for page in list(self._key_of):
            self.forget(page)

    def _set_free(self, page: int) -> None:
        self._free_map[page] = 1
        self._free_count += 1

    def _start(self) -> int:
        """The first page of a run: in the region with the most free pages in a row, else the longest run."""
        free = [page for page in self._regions if self._free_map[page]]
        if not free:
            runs = [run.span() for run in _FREE_RUN.finditer(self._free_map)]
            return max(runs, key=lambda run: run[1] - run[0])[0]
        return max(free, key=lambda page: self._free_from(page))

    def _free_from(self, page: int) -> int:
        """The number of free pages from ``page`` on, side by side."""
        end = self._free_map.find(0, page)
        return (self.num_pages if end < 0 else end) - page
