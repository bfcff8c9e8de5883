"""Job: a request while it runs, and the inbox in which other threads leave what they want."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gptkern.engine.beam import BeamSearch
from gptkern.engine.constraint import Constraint
from gptkern.engine.copies import Copy
from gptkern.engine.lookup import Lookup
from gptkern.engine.processors import Callbacks
from gptkern.engine.request import TokenEvent
from gptkern.engine.sampling import RowDraw, RowParams, SamplerRow
from gptkern.engine.scheduler import Row
from gptkern.engine.settings import Settings
from gptkern.engine.stop_strings import RowText
from gptkern.model.decoder import Decoder

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer


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

    @property
    def number(self) -> int:
        """The request's number."""
        return self.rows[0].request

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


def new_job(
    number: int,
    prompt: list[int],
    settings: Settings,
    params: RowParams,
    keys: Sequence[tuple[int, int]],
    *,
    tokenizer: Tokenizer | None,
    priority: int,
    deadline: float | None,
    prompt_logprobs: int | None,
    callbacks: Callbacks,
    constraint: Constraint | None,
    device: torch.device,
) -> Job:
    """A request as the engine runs it; the arguments are those of ``Engine.submit``, checked.

    Args:
        number: By which events name it.
        deadline: On the engine's clock.
        device: Of the logits.
    """
    beams = settings.num_beams
    rows = [
        Row(number, place, priority, number, prompt, settings.max_new, deadline)
        for place in range(max(len(keys), beams))
    ]
    copies = [
        Copy(
            row,
            settings,
            SamplerRow(
                params,
                prompt,
                seed=seed,
                request=draws,
                processors=callbacks.processors,
                constraint=None if constraint is None else constraint.fork(),
            ),
            None if tokenizer is None else RowText(tokenizer, settings.stop_strings, prompt),
            Lookup(prompt) if settings.speculate and constraint is None else None,
            prompt_logprobs,
            callbacks,
        )
        for row, (seed, draws) in zip(rows, keys, strict=False)
    ]
    if beams == 1:
        return Job(rows, copies)
    for row in rows:
        row.beams = rows
    return Job(rows, copies, BeamSearch(prompt, settings, params, device, tokenizer))


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
