"""Repeat: the last pass again, of the same rows, each a token on.

While no row joins, leaves or fills a page, there is nothing to decide: which rows run, with which pages, and
how the sampler draws is as it was. What the pass reads and writes is laid out once, so that Python has little
to do between two tokens. That counts on a CPU, whose caches the weights of every pass empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gptkern.engine.copies import Copy
from gptkern.engine.executors.base import Executor
from gptkern.engine.sampling import Drawn, Sampler
from gptkern.engine.scheduler import Row, Scheduler


@dataclass
class Repeat:
    """A pass of rows that have their prompt behind them, to be run some more times.

    Attributes:
        rows, copies: The rows, and the copies that they are, in the order of the pass.
        decode: The executor that runs it.
        passes: How often it may still be run.
        deadline: When the first of the rows is to end, on the engine's clock.
    """

    rows: Sequence[Row]
    copies: Sequence[Copy]
    decode: Executor
    passes: int
    deadline: float
    _sequences: Sequence[int]
    _scheduler: Scheduler
    _compute: Callable[[], torch.Tensor | None]
    _draw: Callable[[], Drawn]

    @classmethod
    def after(
        cls,
        rows: Sequence[Row],
        copies: Sequence[Copy],
        decode: Executor,
        sampler: Sampler,
        scheduler: Scheduler,
    ) -> Repeat | None:
        """The repetition of a pass of one token each, its next ones drawn; None where it has none."""
        passes = scheduler.repeatable(rows)
        own = any(copy.lookup is not None or copy.callbacks.criteria for copy in copies)
        if passes < 1 or own or len(copies) != len(rows):
            return None
        tokens = sampler.tokens_of(len(rows))
        launch = None if tokens is None else decode.repeated(tokens)
        if launch is None:
            return None
        logits, compute = launch
        draw = sampler.repeated(logits)
        if draw is None:
            return None
        sequences = [row.sequence for row in rows if row.sequence is not None]
        deadline = min((row.deadline for row in rows if row.deadline is not None), default=float("inf"))
        return cls(rows, copies, decode, passes, deadline, sequences, scheduler, compute, draw)

    def run(self) -> Drawn | None:
        """Compute and draw the next token of each row; None, with nothing done, if weights have moved."""
        if self._compute() is None:
            return None
        self.passes -= 1
        self._scheduler.repeated(self.rows, self._sequences)
        return self._draw()
