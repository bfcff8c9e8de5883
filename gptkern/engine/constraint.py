"""Constraint: which tokens may come next in one row, as a grammar has it, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

WORD_BITS = 32


@runtime_checkable
class Constraint(Protocol):
    """A language that a row's new tokens have to stay in.

    The engine calls it in its own thread, for one row only. An error that it raises ends that row alone.
    """

    @property
    def complete(self) -> bool:
        """True if no token may follow: the row ends, with the reason "stop"."""
        ...

    def fill(self, bitmask: torch.Tensor) -> None:
        """Write which tokens may come next.

        Args:
            bitmask: ``(ceil(vocab / 32),)`` int32 on the CPU: bit ``i % 32`` of word ``i // 32`` is set where
                token ``i`` may come.
        """
        ...

    def push(self, token: int) -> None:
        """Take the row's next token, one that was allowed."""
        ...

    def fork(self) -> Constraint:
        """A copy that goes on by itself."""
        ...


def bitmask_of(
    constraints: Sequence[Constraint | None], vocab_size: int, failures: dict[int, Exception]
) -> torch.Tensor:
    """The bitmask of some positions, ``(positions, ceil(vocab / 32))`` int32; None allows every token.

    A position whose constraint fails allows none, and its error goes into ``failures``.
    """
    words = -(-vocab_size // WORD_BITS)
    bitmask = torch.full((len(constraints), words), -1, dtype=torch.int32, device="cpu")
    for place, constraint in enumerate(constraints):
        if constraint is None:
            continue
        try:
            constraint.fill(bitmask[place])
        except Exception as error:  # whatever a grammar's library raises is its row's alone
            failures[place] = error
            bitmask[place] = 0
    return bitmask
