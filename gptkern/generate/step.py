"""What generation gives its readers: one step at a time."""

from __future__ import annotations

from dataclasses import dataclass

from gptkern.engine.request import FinishReason

TopTokens = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Step:
    """One new token of every row that was running.

    Attributes:
        rows: Which rows, of ``batch * num_return_sequences``.
        tokens: Their tokens.
        logprobs: The model's log-probabilities of those, where asked for.
        top_logprobs: For each the most likely tokens with theirs, best first, where asked for.
        finished: Why each row ends with this token; None where it goes on.
        drafted, accepted: Tokens drafted since the step before, and those of them that held.
    """

    rows: list[int]
    tokens: list[int]
    logprobs: list[float] | None
    top_logprobs: list[TopTokens]
    finished: list[FinishReason | None]
    drafted: int = 0
    accepted: int = 0
