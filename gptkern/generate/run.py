"""``generate``: ids in, ids out, as in transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gptkern.engine.beam import refuse_beams
from gptkern.engine.options import GenerateOptions
from gptkern.engine.processors import Callbacks, LogitsProcessor, StoppingCriterion
from gptkern.engine.request import FinishReason
from gptkern.engine.settings import Settings, merged, settle
from gptkern.generate.loop import Column, Continuation, TopTokens, columns
from gptkern.generate.prompt import Prompts, prompts
from gptkern.generate.steering import dealt
from gptkern.ops.sample import TopLogprobs

if TYPE_CHECKING:
    from typing import Unpack

    from gptkern.gpt import GPT
    from gptkern.tokenizer import Tokenizer


class Streamer(Protocol):
    """A streamer of transformers: ``put`` gets the prompt ``(batch, width)``, then new tokens ``(rows,)``."""

    def put(self, value: torch.Tensor) -> Any: ...

    def end(self) -> Any: ...


@dataclass(frozen=True)
class GenerateOutput:
    """The result of ``generate`` with ``return_dict_in_generate`` or ``output_logprobs``.

    Attributes:
        sequences: ``(batch * num_return_sequences, width + new)`` int64: prompts and new tokens,
            filled up with ``pad_token_id``.
        finish_reasons: "stop" (end-of-text token or stop string) or "length", one a sequence.
        logprobs: With ``output_logprobs=True`` or ``top_logprobs``, ``(sequences, new)`` fp32: the model's
            log-probability of each new token, before any processing; 0 past a sequence's end.
        top_logprobs: With ``top_logprobs=n``, the n most likely tokens in the place of each new token, best
            first, and their log-probabilities: (tokens int64, logprobs fp32), each of shape
            ``(sequences, new, n)``; -1 and -inf past a sequence's end.
        sequences_scores: ``(sequences,)`` fp32, beam search alone: sum of log-probabilities divided by
            the length to the power of ``length_penalty``.
        draft_tokens, accepted_tokens: With ``speculate``, the number of drafted tokens and of those that
            were accepted, over all rows.
    """

    sequences: torch.Tensor
    finish_reasons: list[FinishReason]
    logprobs: torch.Tensor | None = None
    top_logprobs: TopLogprobs | None = None
    sequences_scores: torch.Tensor | None = None
    draft_tokens: int = 0
    accepted_tokens: int = 0


def generate(
    model: GPT,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    streamer: Streamer | None = None,
    tokenizer: Tokenizer | None = None,
    output_logprobs: bool = False,
    top_logprobs: int | None = None,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
    return_dict_in_generate: bool | None = None,
    steering: Mapping[int, torch.Tensor] | None = None,
    **options: Unpack[GenerateOptions],
) -> torch.Tensor | GenerateOutput:
    """Continue prompts; see ``GPT.generate``."""
    detailed = _is_detailed(model, output_logprobs, return_dict_in_generate) or top_logprobs is not None
    prompt, settings = prepare(model, input_ids, attention_mask, options)
    callbacks = Callbacks.of(logits_processor, stopping_criteria)
    logprobs = logprobs_count(model, output_logprobs, top_logprobs)
    if settings.num_beams > 1:
        refuse_beams(
            "generate",
            output_logprobs=output_logprobs,
            top_logprobs=top_logprobs,
            logits_processor=callbacks.processors,
            stopping_criteria=callbacks.criteria,
            streamer=streamer is not None,
        )
    several = len(prompt.rows) * settings.num_return_sequences > 1
    if several and (settings.stop_strings or callbacks.criteria) and settings.pad is None:
        raise ValueError(
            "generate: rows may end before others, and there is nothing to fill them with: give pad_token_id"
        )
    if settings.stop_strings:
        tokenizer = needed_tokenizer(model, tokenizer)
    items = columns(
        model,
        prompt,
        settings,
        tokenizer=tokenizer,
        logprobs=logprobs,
        callbacks=callbacks,
        steering=dealt(steering, model, len(prompt.rows)),
    )
    output = _collect(prompt, settings, items, streamer, logprobs)
    return output if detailed else output.sequences


def _is_detailed(model: GPT, output_logprobs: bool, return_dict_in_generate: bool | None) -> bool:
    """True if the result is a ``GenerateOutput``."""
    if return_dict_in_generate is None:
        return_dict_in_generate = bool(model.generation_config.get("return_dict_in_generate"))
    for name, value in (
        ("output_logprobs", output_logprobs),
        ("return_dict_in_generate", return_dict_in_generate),
    ):
        if not isinstance(value, bool):
            raise TypeError(f"generate: {name} is {value!r}; True or False is needed")
    return output_logprobs or return_dict_in_generate


def logprobs_count(model: GPT, output_logprobs: bool, top_logprobs: int | None) -> int | None:
    """None for no log-probabilities, 0 for those of the new tokens, n for the n most likely ones as well."""
    if top_logprobs is None:
        return 0 if output_logprobs else None
    if not isinstance(top_logprobs, int) or isinstance(top_logprobs, bool):
        raise TypeError(f"generate: top_logprobs is {top_logprobs!r}; a whole number is needed")
    most = model.spec.vocab_size
    if not 1 <= top_logprobs <= most:
        raise ValueError(f"generate: top_logprobs is {top_logprobs}; 1 to the vocabulary's {most} is needed")
    return top_logprobs


def prepare(
    model: GPT, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, options: GenerateOptions
) -> tuple[Prompts, Settings]:
    """Check prompts and options; return both in the forms that the loop needs."""
    values = merged(options, model.generation_config)
    prompt = prompts(
        input_ids,
        attention_mask,
        device=model.device,
        vocab_size=model.spec.vocab_size,
        pad=values.get("pad_token_id"),
        eos=values["eos_token_id"],
    )
    settings = settle(
        values,
        model.config,
        width=prompt.width,
        longest=prompt.longest,
        lengths_given=any(options.get(name) is not None for name in ("max_length", "max_new_tokens")),
    )
    return prompt, settings


def needed_tokenizer(model: GPT, tokenizer: Tokenizer | None) -> Tokenizer:
    """The caller's tokenizer, or else the model's own."""
    from gptkern.tokenizer import Tokenizer

    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"generate: tokenizer is {type(tokenizer).__name__}; a gptkern Tokenizer is needed")
    tokenizer = tokenizer or model.tokenizer
    if tokenizer is None:
        raise ValueError("generate: the model came without a tokenizer: give one as tokenizer=")
    return tokenizer


def _collect(
    prompt: Prompts,
    settings: Settings,
    items: Iterable[Column],
    streamer: Streamer | None,
    logprobs_count: int | None,
) -> GenerateOutput:
    """The output made of all columns, each handed to the streamer as it comes."""
    ids, pad = prompt.ids.repeat_interleave(settings.num_return_sequences, 0), settings.pad or 0
    rows = [Continuation() for _ in ids]
    if streamer is not None:
        streamer.put(ids.cpu())
    for column in items:
        for row, event in column.items():
            rows[row].take(event)
        if streamer is not None:
            tokens = [rows[row].tokens[-1] if row in column else pad for row in range(len(rows))]
            streamer.put(torch.tensor(tokens, device="cpu"))
    if streamer is not None:
        streamer.end()
    new = max(len(row.tokens) for row in rows)
    scores = [row.score for row in rows if row.score is not None]
    return GenerateOutput(
        torch.cat([ids, _filled([row.tokens for row in rows], new, pad).to(ids.device)], dim=1),
        [row.finish_reason for row in rows],
        None if logprobs_count is None else _filled([row.logprobs for row in rows], new, 0.0),
        _top([row.top_logprobs for row in rows], new, logprobs_count) if logprobs_count else None,
        torch.tensor(scores, device="cpu") if scores else None,
        sum(row.drafted for row in rows),
        sum(row.accepted for row in rows),
    )


def _filled(rows: Sequence[Sequence[float]], new: int, filling: float) -> torch.Tensor:
    """Rows of numbers as a tensor ``(rows, new)``, filled up."""
    return torch.tensor([[*row, *[filling] * (new - len(row))] for row in rows], device="cpu")


def _top(rows: Sequence[Sequence[TopTokens]], new: int, count: int) -> TopLogprobs:
    """The ``count`` most likely tokens in each place as tensors, filled up to ``new`` places."""
    filling = [(-1, -math.inf)] * count
    filled = [[[*pairs, *filling][:count] for pairs in [*row, *[()] * (new - len(row))]] for row in rows]
    tokens = [[[token for token, _ in pairs] for pairs in row] for row in filled]
    logprobs = [[[logprob for _, logprob in pairs] for pairs in row] for row in filled]
    return TopLogprobs(torch.tensor(tokens, device="cpu"), torch.tensor(logprobs, device="cpu"))
