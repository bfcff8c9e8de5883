"""Prompt lookup: a row's own earlier tokens as drafts of its next ones."""

from __future__ import annotations

from collections.abc import Sequence

# Longest run of tokens that is looked up first.
LONGEST = 3


class Lookup:
    """One row's tokens, and where each run of up to ``LONGEST`` of them was last followed by another."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Take the row's next token."""
        end = len(self._tokens)
        for length in range(1, min(LONGEST, end) + 1):
            self._follows[tuple(self._tokens[end - length :])] = end
        self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may come next: what followed the latest tokens when they last came.

        A repetition that reaches the end goes on: the draft is copied from itself there.
        """
        for length in range(min(LONGEST, len(self._tokens)), 0, -1):
            at = self._follows.get(tuple(self._tokens[-length:]))
            if at is not None:
                end = len(self._tokens)
                drafted: list[int] = []
                for place in range(at, at + most):
                    drafted.append(self._tokens[place] if place < end else drafted[place - end])
                return drafted
        return []
