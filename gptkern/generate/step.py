"""What generation gives its readers: one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptkern.engine.sampling import RowDraw
from gptkern.engine.settings import Settings
from gptkern.engine.stop_strings import RowText

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Step:
    """One new token of every row that was running.

    Attributes:
        rows: Which rows, of ``batch * num_return_sequences``.
        tokens: Their tokens.
        logprobs: The model's log-probabilities of those, where asked for.
        finished: Why each row ends with this token; None where it goes on.
        drafted, accepted: Tokens drafted since the step before, and those of them that held.
    """

    rows: list[int]
    tokens: list[int]
    logprobs: list[float] | None
    finished: list[FinishReason | None]
    drafted: int = 0
    accepted: int = 0


def finish(
    token: int, row: int, settings: Settings, texts: Sequence[RowText] | None, last: bool
) -> FinishReason | None:
    """Why a row ends with its new ``token``, which its text is told of; None where it goes on."""
    ended = token in settings.eos
    if texts is not None:
        texts[row].push(token, hidden=ended)
        ended |= texts[row].stopped
    if ended:
        return "stop"
    return "length" if last else None


def refuse_failures(rows: Sequence[int], draws: Sequence[RowDraw]) -> None:
    """Refuse rows whose next token could not be drawn.

    Raises:
        ValueError: A row of logits held NaN or +inf, or left no token.
    """
    for row, draw in zip(rows, draws, strict=True):
        if draw.failure is not None:
            raise ValueError(f"generate: row {row}: {draw.failure}")
