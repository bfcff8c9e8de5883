"""The keys by which full pages are found again: a page's own tokens, all before them, and the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


class PageKeys:
    """The keys of one sequence's full pages, made as its tokens become known.

    A key is a hash of the page's tokens and of the key before it, so that equal keys mean equal tokens from
    the sequence's first on. The first begins from the weights' version and the steering vectors: other
    weights, or others added, other keys.

    Args:
        version: Of the model's weights, see ``WeightsVersion``.
        page_size: Tokens a page.
        steering: ``Steering.key`` of a sequence that has vectors added; empty of others.
    """

    def __init__(self, version: int, page_size: int, steering: bytes = b"") -> None:
        self.version = version
        self._first = version.to_bytes(16, "little") + steering
        self._page_size = page_size
        self._keys: list[bytes] = []

    def first(self, pages: int, tokens: Sequence[int]) -> list[bytes]:
        """The keys of the first ``pages`` pages.

        Args:
            tokens: The sequence's, from its first on; those that were given before must be the same again.

        Raises:
            ValueError: Fewer tokens than fill so many pages.
        """
        size = self._page_size
        if len(tokens) < pages * size:
            raise ValueError(f"PageKeys: {len(tokens)} tokens do not fill {pages} pages of {size}")
        for page in range(len(self._keys), pages):
            before = self._keys[-1] if self._keys else self._first
            # Eight bytes a token: no two lists of tokens give the same bytes.
            own = b"".join(token.to_bytes(8, "little") for token in tokens[page * size : (page + 1) * size])
            self._keys.append(hashlib.blake2b(before + own, digest_size=16).digest())
        return self._keys[:pages]
