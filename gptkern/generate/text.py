"""Text in, text out: ``stream`` and ``generate_text``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gptkern.engine.beam import refuse_beams
from gptkern.engine.option_checks import plain
from gptkern.engine.options import GenerateOptions
from gptkern.engine.processors import Callbacks, LogitsProcessor, StoppingCriterion
from gptkern.engine.request import FinishReason
from gptkern.generate.column import Column
from gptkern.generate.loop import columns
from gptkern.generate.run import logprobs_count, needed_tokenizer, prepare

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
        self._columns = items
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[list[tuple[int, float]]] | None = [] if top_logprobs else None
        self._reason: FinishReason = "length"

    def __next__(self) -> str:
        piece = ""
        while not piece:
            column = next(self._columns)
            (piece,) = column.texts
            assert column.logprobs is not None
            self._tokens += column.tokens
            self._logprobs += column.logprobs
            if self._top is not None:
                self._top.append(list(column.top_logprobs[0]))
            if column.finish_reasons[0]:
                self._reason = column.finish_reasons[0]
        self._pieces.append(piece)
        return piece

    @property
    def completion(self) -> Completion:
        """The completion so far: see the class."""
        return Completion("".join(self._pieces), self._tokens, self._logprobs, self._top, self._reason)


def stream(
    model: GPT,
    prompt: Prompt,
    *,
    tokenizer: Tokenizer | None = None,
    top_logprobs: int | None = None,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
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
    items = columns(model, prompts, settings, tokenizer=tokenizer, logprobs=logprobs, callbacks=callbacks)
    return TextStream(items, top_logprobs is not None)


def generate_text(
    model: GPT,
    prompts: str | Sequence[Prompt],
    *,
    tokenizer: Tokenizer | None = None,
    top_logprobs: int | None = None,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
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
    drawn = settings.num_beams == 1
    if not drawn:
        refuse_beams(
            "generate_text",
            top_logprobs=top_logprobs,
            logits_processor=callbacks.processors,
            stopping_criteria=callbacks.criteria,
        )
    count = logprobs_count(model, drawn, top_logprobs)
    rows = len(checked.rows) * settings.num_return_sequences
    texts: list[list[str]] = [[] for _ in range(rows)]
    tokens: list[list[int]] = [[] for _ in texts]
    logprobs: list[list[float]] = [[] for _ in texts]
    top: list[list[list[tuple[int, float]]]] = [[] for _ in texts]
    reasons: list[FinishReason] = ["length"] * len(texts)
    for column in columns(model, checked, settings, tokenizer=tokenizer, logprobs=count, callbacks=callbacks):
        for place, row in enumerate(column.rows):
            texts[row].append(column.texts[place])
            tokens[row].append(column.tokens[place])
            if column.logprobs is not None:
                logprobs[row].append(column.logprobs[place])
            top[row].append(list(column.top_logprobs[place]))
            reasons[row] = column.finish_reasons[place] or "length"
    return [
        Completion("".join(text), ids, scores if drawn else None, best if count else None, reason)
        for text, ids, scores, best, reason in zip(texts, tokens, logprobs, top, reasons, strict=True)
    ]


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
