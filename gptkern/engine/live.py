"""Live requests: those that an engine has taken and that have not ended, and the events they give."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptkern.engine.beam import BeamSearch, advance
from gptkern.engine.copies import Copy, draft_tokens
from gptkern.engine.launch import Launch
from gptkern.engine.lookup import Lookup
from gptkern.engine.request import FinishReason, Request, TokenEvent
from gptkern.engine.sampling import RowDraw, RowParams, SamplerRow
from gptkern.engine.scheduler import Row, Scheduler
from gptkern.engine.settings import Settings
from gptkern.engine.steering import Steering
from gptkern.engine.stop_strings import PlainText, RowText
from gptkern.model.decoder import Decoder

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer


@dataclass(eq=False)
class LiveRequest:
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


def live_request(
    number: int,
    request: Request,
    settings: Settings,
    keys: Sequence[tuple[int, int]],
    tokenizer: Tokenizer | None,
    model: Decoder,
) -> LiveRequest:
    """A request as the engine runs it; the arguments are those of ``Engine.submit``, checked.

    Args:
        number: By which events name it.
    """
    prompt, constraint, beams = list(request.prompt), request.constraint, settings.num_beams
    params, callbacks = RowParams(settings, model.spec.vocab_size, request.logprobs), request.callbacks
    deadline = None if request.deadline is None else time.monotonic() + request.deadline
    steering = None if request.steering is None else Steering.of(request.steering, model)
    rows = [
        Row(
            number,
            place,
            request.priority,
            number,
            prompt,
            settings.max_new,
            deadline,
            steering=steering,
        )
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
            request.prompt_logprobs,
            callbacks,
        )
        for row, (seed, draws) in zip(rows, keys, strict=False)
    ]
    if beams == 1:
        return LiveRequest(rows, copies)
    for row in rows:
        row.beams = rows
    return LiveRequest(rows, copies, BeamSearch(prompt, settings, params, model.device, tokenizer))


def _text(
    tokenizer: Tokenizer | None, stop_strings: Sequence[str], prompt: Sequence[int]
) -> RowText | PlainText | None:
    """A row's text, where anybody asks for it."""
    if tokenizer is None:
        return None
    return RowText(tokenizer, stop_strings, prompt) if stop_strings else PlainText(tokenizer, prompt)


@dataclass
class Inbox:
    """The requests and cancellations of other threads since the last step."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    added: list[LiveRequest] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def take(self) -> tuple[list[LiveRequest], list[int]]:
        """All of it; nothing is left."""
        with self.lock:
            taken = self.added, self.cancelled
            self.added, self.cancelled = [], []
        return taken


class LiveRequests:
    """The requests that an engine has taken, by number, until each has had its last event.

    Attributes:
        events: Those that nobody has read yet.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._requests: dict[int, LiveRequest] = {}
        self._copies: dict[Row, Copy] = {}
        self.events: list[TokenEvent] = []

    def __contains__(self, number: int) -> bool:
        return number in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, number: int) -> LiveRequest:
        return self._requests[number]

    @property
    def rows(self) -> list[Row]:
        """The rows of which the last event is still to come."""
        live = self._requests.values()
        return [row for request in live for row in request.rows if row.beams or row in self._copies]

    def copies(self, rows: Iterable[Row]) -> list[Copy]:
        """The copies that rows are, those of them that have not ended."""
        return [self._copies[row] for row in rows if row in self._copies]

    def add(self, request: LiveRequest) -> None:
        """Take a request, and let it wait."""
        self._requests[request.number] = request
        self._copies.update((copy.row, copy) for copy in request.copies)
        self._scheduler.add(request.rows)

    def cancel(self, number: int) -> None:
        """End a request; nothing where there is none of the number."""
        rows = self._requests[number].rows if number in self._requests else []
        self.ended([member for row in rows for member in self._scheduler.finish(row)], "cancelled")

    def ended(self, rows: Iterable[Row], reason: FinishReason, error: BaseException | None = None) -> None:
        """Tell of rows that have ended without one more token."""
        for copy in self.copies(rows):
            self.events.append(copy.ended(reason, error))
            self._forget(copy.row)

    def take(self, copy: Copy, draw: RowDraw, drafted: int, model: Decoder) -> bool:
        """Give a copy what was drawn for it; True if it goes on."""
        self.events += copy.take(draw, drafted, model)
        if self.events[-1].finish_reason is None:
            return True
        self._scheduler.finish(copy.row)
        self._forget(copy.row)
        return False

    def search(self, launch: Launch, model: Decoder) -> None:
        """Take searches one token on, by the logits after each of their beams."""
        numbers = dict.fromkeys(row.request for row in launch.rows)
        requests = [self._requests[number] for number in numbers]
        searches = [request.search for request in requests if request.search is not None]
        for request, search in zip(requests, searches, strict=True):
            if not request.rows[0].generated:
                search.restart()
        for request, search, outcome in zip(
            requests, searches, advance(searches, launch.logits), strict=True
        ):
            if isinstance(outcome, Exception):
                self.ended(self._scheduler.finish(request.rows[0]), "error", outcome)
            elif outcome:
                self._scheduler.branch(request.rows, outcome, [beam.tokens for beam in search.running])
            else:
                ended = self._scheduler.finish(request.rows[0])
                self.events += request.settled(model)
                for row in ended:
                    self._forget(row)

    def draft(self, most: int) -> None:
        """Draft tokens for the next pass, of at most ``most`` tokens."""
        if any(copy.lookup is not None for copy in self._copies.values()):
            beams = sum(
                len(live.search.running) for live in self._requests.values() if live.search is not None
            )
            draft_tokens([copy for copy in self._copies.values() if not copy.row.beams], most - beams)

    def end_drafting(self, error: BaseException) -> None:
        """End with an error the rows that have drafted."""
        drafting = [copy.row for copy in self._copies.values() if copy.lookup and copy.row.generated]
        for row in drafting:
            self._scheduler.finish(row)
        self.ended(drafting, "error", error)

    def clear(self) -> None:
        """End every request, without an event."""
        for row in self.rows:
            self._scheduler.finish(row)
        self._copies.clear()
        while self._requests:
            self._drop(self._requests.popitem()[1])
        self.events.clear()

    def _forget(self, row: Row) -> None:
        self._copies.pop(row, None)
        request = self._requests.get(row.request)
        if request is not None and not self.copies(copy.row for copy in request.copies):
            self._drop(self._requests.pop(row.request))

    def _drop(self, request: LiveRequest) -> None:
        """Part the rows of a search, which would else wait for the garbage collector in a circle."""
        for row in request.rows:
            row.beams = ()
