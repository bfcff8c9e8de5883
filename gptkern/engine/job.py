"""Job: a request while it runs, and the inbox in which other threads leave what they want."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from gptkern.engine.beam import BeamSearch
from gptkern.engine.copies import Copy
from gptkern.engine.request import TokenEvent
from gptkern.engine.sampling import RowDraw
from gptkern.engine.scheduler import Row
from gptkern.model.decoder import Decoder


@dataclass(eq=False)
class Job:
    """A request while it runs.

    Attributes:
        rows: Its sequences as the scheduler has them: one a copy, or one a beam.
        copies: Its results: of a search the first, as many as it returns.
        search: Its beam search; None where tokens are drawn.
    """

    rows: list[Row]
    copies: list[Copy]
    search: BeamSearch | None = None

    def settled(self, model: Decoder) -> list[TokenEvent]:
        """The events of a search that has ended, whose rows have: all tokens of every sequence it returns.

        Args:
            model: For log-probabilities of the prompt.
        """
        assert self.search is not None
        found, events = self.search.complete, []
        for beam, copy in zip(found, self.copies, strict=False):
            own = copy.take(RowDraw(beam.tokens, None, None, None), 0, model)
            events += [*own[:-1], own[-1]._replace(score=beam.score)]
        few = ValueError(
            f"num_return_sequences is {len(self.copies)}; the search found {len(found)} sequences"
        )
        events += [copy.ended("error", few) for copy in self.copies[len(found) :]]
        return events


@dataclass
class Inbox:
    """The requests and cancellations of other threads since the last step."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    added: list[Job] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def take(self) -> tuple[list[Job], list[int]]:
        """All of it; nothing is left."""
        with self.lock:
            taken = self.added, self.cancelled
            self.added, self.cancelled = [], []
        return taken
