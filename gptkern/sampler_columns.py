"""The numbers that the sampler has a column for: what each accepts, and the value at which it does nothing.

It stands below ``ops``, whose sampler is made from it, and below the table of ``generate``'s options, which
takes its ranges from here. It imports nothing, so that the command line can read it at once.
"""

from __future__ import annotations

from dataclasses import dataclass

INF = float("inf")


@dataclass(frozen=True)
class Range:
    """The numbers that an option accepts. NaN is never among them.

    Attributes:
        words: The same in words, for errors and documentation.
        low, high: The bounds.
        open_low, open_high: The bound itself is refused.
    """

    words: str
    low: float = -INF
    high: float = INF
    open_low: bool = False
    open_high: bool = False

    def accepts(self, value: float) -> bool:
        """True if ``value`` lies within the bounds."""
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)


@dataclass(frozen=True)
class Column:
    """A column of ``SamplingParams.values``.

    Attributes:
        neutral: The value that leaves the logits alone, and the default.
        whole: Only whole numbers are accepted.
        within_vocab: At most the size of the vocabulary is accepted.
    """

    name: str
    neutral: float
    range: Range
    whole: bool = False
    within_vocab: bool = False


FINITE = Range("a finite number", open_low=True, open_high=True)
ABOVE_ZERO = Range("a finite number above 0", low=0, open_low=True, open_high=True)

# The extension says in which order it reads them: gptkern._native.PARAMETERS.
COLUMNS = (
    Column("temperature", 1.0, Range("a finite number, 0 (greedy) or more", low=0, open_high=True)),
    Column("top_k", 0.0, Range("0 or more", low=0), whole=True, within_vocab=True),
    Column("top_p", 1.0, Range("0 < top_p <= 1", low=0, high=1, open_low=True)),
    Column("min_p", 0.0, Range("0 <= min_p <= 1", low=0, high=1)),
    Column("typical_p", 1.0, Range("0 < typical_p <= 1", low=0, high=1, open_low=True)),
    Column("epsilon_cutoff", 0.0, Range("0 <= epsilon_cutoff < 1", low=0, high=1, open_high=True)),
    Column("eta_cutoff", 0.0, Range("0 <= eta_cutoff < 1", low=0, high=1, open_high=True)),
    Column("repetition_penalty", 1.0, ABOVE_ZERO),
    Column("presence_penalty", 0.0, FINITE),
    Column("frequency_penalty", 0.0, FINITE),
    Column("min_new_tokens", 0.0, Range("0 or more", low=0, high=2**31 - 1), whole=True),
    Column("n_logprobs", 0.0, Range("0 or more", low=0), whole=True, within_vocab=True),
)
RANGES = {column.name: column.range for column in COLUMNS}
NEUTRAL = {column.name: column.neutral for column in COLUMNS}
