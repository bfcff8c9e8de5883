"""One call of ``generate`` and its like: its prompts put to an engine, its tokens in steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gptkern.engine.cache import PAGE_SIZE
from gptkern.engine.processors import Callbacks
from gptkern.engine.request import TokenEvent
from gptkern.engine.sampling import row_keys
from gptkern.engine.settings import Settings
from gptkern.engine.stop_strings import RowText
from gptkern.generate.prompt import Prompts
from gptkern.generate.step import Step

if TYPE_CHECKING:
    from gptkern.gpt import GPT
    from gptkern.tokenizer import Tokenizer


def steps(
    model: GPT,
    prompts: Prompts,
    settings: Settings,
    *,
    tokenizer: Tokenizer | None = None,
    texts: Sequence[RowText] | None = None,
    logprobs: int | None = None,
    callbacks: Callbacks | None = None,
) -> Iterator[Step]:
    """Generate, one step an item, until every row has finished.

    Rows are the prompts in order, each ``num_return_sequences`` times; all copies of one share its
    prefill. A row that has finished leaves the batch.

    Args:
        tokenizer: For stop strings.
        texts: One a row, told of every token as its step is given.
        logprobs: None: no log-probabilities; 0: those of the tokens; n: also the n most likely tokens'.

    Raises:
        ValueError: A row of logits held NaN or +inf, or left no token.
    """
    copies = settings.num_return_sequences
    count = len(prompts.rows) * copies
    tokens = pool_tokens(prompts, settings, count)
    with model.engines.engine(model, count, tokens, settings.kv_cache_dtype) as engine:
        keys = row_keys(settings, len(prompts.rows))
        first: dict[int, int] = {}
        for place, prompt in enumerate(prompts.rows):
            row = place * copies
            own = keys[row : row + copies]
            request = engine.submit(
                prompt, settings, own, tokenizer=tokenizer, logprobs=logprobs, callbacks=callbacks
            )
            first[request] = row
        line = _Line(count)
        while line.open:
            for event in engine.step():
                row = first[event.request] + event.copy
                if isinstance(event.error, ValueError):
                    raise ValueError(f"generate: row {row}: {event.error}") from event.error
                if isinstance(event.error, RuntimeError):
                    raise RuntimeError(f"generate: {event.error}") from event.error
                if event.error is not None:
                    raise event.error
                line.push(row, event)
            for step in line.ready():
                for row, token in zip(step.rows, step.tokens, strict=True):
                    if texts is not None:
                        texts[row].push(token, hidden=token in settings.eos)
                yield step


def pool_tokens(prompts: Prompts, settings: Settings, rows: int) -> int:
    """Tokens that a cache has to have room for, so that each of ``rows`` can be as long as the longest.

    A page more each: a row is begun while every running one could still take another.
    """
    return rows * (-(-(prompts.longest + settings.max_new) // PAGE_SIZE) + 1) * PAGE_SIZE


class _Line:
    """Rows' tokens, waiting until every running row has its next one."""

    def __init__(self, rows: int) -> None:
        self._waiting: dict[int, deque[TokenEvent]] = {row: deque() for row in range(rows)}
        self._drafted = self._accepted = 0

    @property
    def open(self) -> bool:
        """Whether a row still runs."""
        return bool(self._waiting)

    def push(self, row: int, event: TokenEvent) -> None:
        """Take a row's next token."""
        self._waiting[row].append(event)
        self._drafted += event.drafted
        self._accepted += event.accepted

    def ready(self) -> Iterator[Step]:
        """The steps that are whole."""
        while self._waiting and all(self._waiting.values()):
            rows = list(self._waiting)
            events = [waiting.popleft() for waiting in self._waiting.values()]
            scores = [event.logprob for event in events if event.logprob is not None]
            step = Step(
                rows,
                [event.token for event in events if event.token is not None],
                scores if len(scores) == len(rows) else None,
                [event.top_logprobs for event in events],
                [event.finish_reason for event in events],
                self._drafted,
                self._accepted,
            )
            self._drafted = self._accepted = 0
            for row, reason in zip(rows, step.finished, strict=True):
                if reason is not None:
                    del self._waiting[row]
            yield step
