"""One column of a generation: the next token of every row that still runs."""

from __future__ import annotations

from dataclasses import dataclass

from gptkern.engine.request import FinishReason

TopTokens = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Column:
    """One new token of every row that was still running.

    Attributes:
        rows: The numbers of these rows, out of ``batch * num_return_sequences``.
        tokens: One token for each row.
        logprobs: The model's log-probabilities of these tokens; None unless the caller wants them.
        top_logprobs: For each row its most likely tokens and their log-probabilities, best first; empty
            unless the caller wants them.
        finish_reasons: The reason why each row ends with this token; None for a row that goes on.
        texts: For each row the new text that is final; "" unless the caller wants text.
        scores: The score of each row that ends here and comes from beam search; None of any other.
        drafted, accepted: The number of tokens drafted since the column before, and of those accepted.
    """

    rows: list[int]
    tokens: list[int]
    logprobs: list[float] | None
    top_logprobs: list[TopTokens]
    finish_reasons: list[FinishReason | None]
    texts: list[str]
    scores: list[float | None]
    drafted: int = 0
    accepted: int = 0
