"""The loop behind ``generate`` and ``stream``: prompts go to an engine, tokens come back in columns."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from gptkern.engine.cache import PAGE_SIZE
from gptkern.engine.processors import Callbacks
from gptkern.engine.request import TokenEvent
from gptkern.engine.sampling import row_keys
from gptkern.engine.settings import Settings
from gptkern.generate.column import Column
from gptkern.generate.prompt import Prompts

if TYPE_CHECKING:
    from gptkern.gpt import GPT
    from gptkern.tokenizer import Tokenizer


def columns(
    model: GPT,
    prompts: Prompts,
    settings: Settings,
    *,
    tokenizer: Tokenizer | None = None,
    logprobs: int | None = None,
    callbacks: Callbacks | None = None,
) -> Generator[Column, None, None]:
    """Generate until every row has finished; each item is one new token of every running row.

    Rows are the prompts in order, each ``num_return_sequences`` times; all copies of one share its
    prefill. A row that has finished leaves the batch. Rows of a beam search come when it has ended.

    Args:
        tokenizer: For stop strings and text: with one, columns have text.
        logprobs: None for no log-probabilities, 0 for those of the new tokens, n for those of the n most
            likely tokens as well.

    Raises:
        ValueError: A row of logits held NaN or +inf, or left no token.
    """
    copies = settings.num_return_sequences
    count = len(prompts.rows) * copies
    sequences = len(prompts.rows) * max(copies, settings.num_beams)
    # Each counts one page more: a row begins while every running row could still take another page.
    pages = -(-(prompts.longest + settings.max_new) // PAGE_SIZE) + 1
    tokens = sequences * pages * PAGE_SIZE
    with model.engines.engine(model, sequences, tokens, settings.kv_cache_dtype) as engine:
        keys = row_keys(settings, len(prompts.rows))
        first: dict[int, int] = {}
        for place, prompt in enumerate(prompts.rows):
            row = place * copies
            own = keys[row : row + copies]
            request = engine.submit(
                prompt, settings, own, tokenizer=tokenizer, logprobs=logprobs, callbacks=callbacks
            )
            first[request] = row
        queue = _Queue(count)
        while queue.open:
            for event in engine.step():
                row = first[event.request] + event.copy
                if isinstance(event.error, ValueError):
                    raise ValueError(f"generate: row {row}: {event.error}") from event.error
                if isinstance(event.error, RuntimeError):
                    raise RuntimeError(f"generate: {event.error}") from event.error
                if event.error is not None:
                    raise event.error
                queue.push(row, event)
            yield from queue.ready()


class _Queue:
    """A queue of tokens for each row, read when every running row has its next one."""

    def __init__(self, rows: int) -> None:
        self._tokens: dict[int, deque[TokenEvent]] = {row: deque() for row in range(rows)}
        self._drafted = self._accepted = 0

    @property
    def open(self) -> bool:
        """True while a row still runs."""
        return bool(self._tokens)

    def push(self, row: int, event: TokenEvent) -> None:
        """Take a row's next token."""
        self._tokens[row].append(event)
        self._drafted += event.drafted
        self._accepted += event.accepted

    def ready(self) -> Iterator[Column]:
        """The columns that are complete."""
        while self._tokens and all(self._tokens.values()):
            rows = list(self._tokens)
            events = [tokens.popleft() for tokens in self._tokens.values()]
            scores = [event.logprob for event in events if event.logprob is not None]
            column = Column(
                rows,
                [event.token for event in events if event.token is not None],
                scores if len(scores) == len(rows) else None,
                [event.top_logprobs for event in events],
                [event.finish_reason for event in events],
                [event.text for event in events],
                [event.score for event in events],
                self._drafted,
                self._accepted,
            )
            self._drafted = self._accepted = 0
            for row, reason in zip(rows, column.finish_reasons, strict=True):
                if reason is not None:
                    del self._tokens[row]
            yield column
