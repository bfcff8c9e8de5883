"""The loop behind ``generate`` and ``stream``: prompts go to an engine, tokens come back in columns."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptkern.engine.cache import PAGE_SIZE
from gptkern.engine.processors import Callbacks
from gptkern.engine.request import FinishReason, Request, TokenEvent
from gptkern.engine.sampling import row_keys
from gptkern.engine.settings import Settings
from gptkern.generate.prompt import Prompts
from gptkern.generate.steering import Vectors

if TYPE_CHECKING:
    from gptkern.gpt import GPT
    from gptkern.tokenizer import Tokenizer


# The next event of every row that was still running, by the row's number.
Column = dict[int, TokenEvent]
# Some of the likeliest tokens, best first, with their log-probabilities.
TopTokens = tuple[tuple[int, float], ...]


@dataclass
class Continuation:
    """The events of one row, brought together.

    Attributes:
        tokens: New tokens, in order.
        logprobs, top_logprobs: Of each token, where the caller wants them.
        texts: Pieces of text, "" among them.
        finish_reason: Valid once the row has ended.
        score: Of a row from beam search.
        drafted, accepted: Tokens that were drafted, and those of them that held.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopTokens] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    score: float | None = None
    drafted: int = 0
    accepted: int = 0

    def take(self, event: TokenEvent) -> None:
        """Take the row's next event."""
        assert event.token is not None
        self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        self.top_logprobs.append(event.top_logprobs)
        self.texts.append(event.text)
        self.finish_reason, self.score = event.finish_reason or "length", event.score
        self.drafted, self.accepted = self.drafted + event.drafted, self.accepted + event.accepted


def columns(
    model: GPT,
    prompts: Prompts,
    settings: Settings,
    *,
    tokenizer: Tokenizer | None = None,
    logprobs: int | None = None,
    callbacks: Callbacks | None = None,
    steering: Sequence[Vectors | None] = (),
) -> Generator[Column, None, None]:
    """Generate until every row has finished; each item is the next event of every running row.

    Rows are the prompts in order, each ``num_return_sequences`` times; all copies of one share its
    prefill. A row that has finished leaves the batch. Rows of a beam search come when it has ended.

    Args:
        tokenizer: For stop strings and text: with one, events have text.
        logprobs: None for no log-probabilities, 0 for those of the new tokens, n for those of the n most
            likely tokens as well.
        steering: What is added between the layers for each prompt; empty where nothing is.

    Raises:
        ValueError: A row of logits held NaN or +inf, or left no token.
    """
    copies, callbacks = settings.num_return_sequences, callbacks or Callbacks()
    count = len(prompts.rows) * copies
    sequences = len(prompts.rows) * max(copies, settings.num_beams)
    # Each counts one page more: a row begins while every running row could still take another page.
    pages = -(-(prompts.longest + settings.max_new) // PAGE_SIZE) + 1
    tokens = sequences * pages * PAGE_SIZE
    cache, steered = settings.kv_cache_dtype, bool(steering)
    with model.engines.engine(model, sequences, tokens, cache, steered) as engine:
        keys = row_keys(settings, len(prompts.rows))
        first: dict[int, int] = {}
        for place, prompt in enumerate(prompts.rows):
            row = place * copies
            own = keys[row : row + copies]
            request = Request(
                prompt=prompt,
                logprobs=logprobs,
                logits_processor=callbacks.processors,
                stopping_criteria=callbacks.criteria,
                steering=steering[place] if steering else None,
            )
            first[engine.submit(request, settings, own, tokenizer)] = row
        queues: dict[int, deque[TokenEvent]] = {row: deque() for row in range(count)}
        while queues:
            for event in engine.step():
                row = first[event.request] + event.copy
                _raise(event, row)
                queues[row].append(event)
            while queues and all(queues.values()):
                column = {row: queue.popleft() for row, queue in queues.items()}
                queues = {row: queues[row] for row, event in column.items() if event.finish_reason is None}
                yield column


def _raise(event: TokenEvent, row: int) -> None:
    """Raise the error with which a row ended; nothing where there is none."""
    if isinstance(event.error, ValueError):
        raise ValueError(f"generate: row {row}: {event.error}") from event.error
    if isinstance(event.error, RuntimeError):
        raise RuntimeError(f"generate: {event.error}") from event.error
    if event.error is not None:
        raise event.error
