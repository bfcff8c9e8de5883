"""Text in, text out: ``stream`` and ``generate_text``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gptkern.engine.beam import refuse_beams
from gptkern.engine.option_checks import plain
from gptkern.engine.options import GenerateOptions
from gptkern.engine.processors import Callbacks, LogitsProcessor, StoppingCriterion
from gptkern.engine.request import FinishReason
from gptkern.generate.loop import Column, Continuation, columns
from gptkern.generate.run import logprobs_count, needed_tokenizer, prepare
from gptkern.generate.steering import dealt

if TYPE_CHECKING:
    from typing import Unpack

    from gptkern.gpt import GPT
    from gptkern.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt.

    Attributes:
        text: The new text without the prompt, up to the end-of-text token or stop string.
        token_ids: All new tokens, the one that ended the text included.
        logprobs: The model's log-probability of each token; None from beam search.
        top_logprobs: With ``top_logprobs=n``, for each new token the n most likely ones in its place, as
            pairs (token, log-probability), best first; else None.
        finish_reason: "stop" (end-of-text token or stop string) or "length".
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    top_logprobs: list[list[tuple[int, float]]] | None
    finish_reason: FinishReason


class TextStream(Iterator[str]):
    """The continuation of one prompt, piece by piece, as it is made.

    Attributes:
        completion: The text so far; its ``finish_reason`` is valid once the iterator has ended.
    """

    def __init__(self, items: Iterator[Column], top_logprobs: bool) -> None:
        self._columns, self._top = items, top_logprobs
        self._row = Continuation()

    def __next__(self) -> str:
        piece = ""
        while not piece:
            (event,) = next(self._columns).values()
            self._row.take(event)
            piece = event.text
        return piece

    @property
    def completion(self) -> Completion:
        """The completion so far: see the class."""
        return _completion(self._row, self._top)


def stream(
    model: GPT,
    prompt: Prompt,
    *,
    tokenizer: Tokenizer | None = None,
    top_logprobs: int | None = None,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
    steering: Mapping[int, torch.Tensor] | None = None,
    **options: Unpack[GenerateOptions],
) -> TextStream:
    """Yield the continuation of one prompt as it is made; see ``GPT.stream``."""
    tokenizer = needed_tokenizer(model, tokenizer)
    prompts, settings = prepare(model, *batch(tokenizer, [prompt]), options)
    if settings.num_beams > 1 or settings.num_return_sequences > 1:
        raise ValueError(
            f"stream: num_beams is {settings.num_beams}, num_return_sequences is "
            f"{settings.num_return_sequences}: both must be 1, and be given where the checkpoint says "
            "otherwise; generate_text takes more"
        )
    callbacks = Callbacks.of(logits_processor, stopping_criteria)
    logprobs = logprobs_count(model, True, top_logprobs)
    items = columns(
        model,
        prompts,
        settings,
        tokenizer=tokenizer,
        logprobs=logprobs,
        callbacks=callbacks,
        steering=dealt(steering, model, 1),
    )
    return TextStream(items, top_logprobs is not None)


def generate_text(
    model: GPT,
    prompts: str | Sequence[Prompt],
    *,
    tokenizer: Tokenizer | None = None,
    top_logprobs: int | None = None,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
    steering: Mapping[int, torch.Tensor] | None = None,
    **options: Unpack[GenerateOptions],
) -> list[Completion]:
    """Continue prompts; see ``GPT.generate_text``."""
    tokenizer = needed_tokenizer(model, tokenizer)
    several = [prompts] if isinstance(prompts, str) else plain(prompts)
    if not isinstance(several, list | tuple):
        raise TypeError(
            f"generate_text: prompts is {type(prompts).__name__}; text, or a list of texts or of lists of "
            "token ids, is needed"
        )
    if not several:
        return []
    checked, settings = prepare(model, *batch(tokenizer, several), options)
    callbacks = Callbacks.of(logits_processor, stopping_criteria)
    if settings.num_beams > 1:
        refuse_beams(
            "generate_text",
            top_logprobs=top_logprobs,
            logits_processor=callbacks.processors,
            stopping_criteria=callbacks.criteria,
        )
    count = logprobs_count(model, settings.num_beams == 1, top_logprobs)
    rows = [Continuation() for _ in range(len(checked.rows) * settings.num_return_sequences)]
    items = columns(
        model,
        checked,
        settings,
        tokenizer=tokenizer,
        logprobs=count,
        callbacks=callbacks,
        steering=dealt(steering, model, len(checked.rows)),
    )
    for column in items:
        for row, event in column.items():
            rows[row].take(event)
    return [_completion(row, top_logprobs is not None) for row in rows]


def _completion(row: Continuation, top_logprobs: bool) -> Completion:
    top = [list(pairs) for pairs in row.top_logprobs] if top_logprobs else None
    logprobs = row.logprobs if row.score is None else None
    return Completion("".join(row.texts), row.tokens, logprobs, top, row.finish_reason)


def batch(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """``(input_ids, attention_mask)`` of prompts, padded on the left.

    Empty text becomes the beginning-of-text token.

    Raises:
        TypeError: A prompt that is neither text nor token ids.
        ValueError: An empty prompt, if the tokenizer has no beginning-of-text token.
    """
    rows = [_ids(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device="cpu")
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device="cpu")
    return ids, mask


def _ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    prompt = plain(prompt)
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
    elif isinstance(prompt, Sequence) and all(isinstance(i, int) for i in prompt):
        ids = [int(i) for i in prompt]
    else:
        raise TypeError(
            f"generate: a prompt is {type(prompt).__name__}; text or a list of token ids is needed"
        )
    if not ids:
        raise ValueError("generate: a prompt is empty, and the tokenizer has no beginning-of-text token")
    return ids
