"""``generate`` on the engine alone: gptkern's passes and sampler, with the library's criteria and streamers.

The loop takes a call if ``gptkern.ops.sample`` computes each of its logits processors as the library does
and the scores are not returned. Any other call keeps the library's loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import logits_process as library
from transformers.generation.utils import GenerateDecoderOnlyOutput

from gptkern.engine.options import TABLE, Option
from gptkern.ops.sample import SamplerState, SamplingParams, sample
from gptkern.transformers.engine import EngineCache

Options = dict[str, Any]


def _minimum(length: int, processor: Any) -> Options:
    return {"min_new_tokens": max(length, 0), "eos_token_id": processor.eos_token_id.tolist()}


# The library's warper of each option that shapes the draw, and the attribute that holds the option's value.
_WARPERS: dict[str, tuple[type, str]] = {
    "temperature": (library.TemperatureLogitsWarper, "temperature"),
    "top_k": (library.TopKLogitsWarper, "top_k"),
    "top_p": (library.TopPLogitsWarper, "top_p"),
    "min_p": (library.MinPLogitsWarper, "min_p"),
    "typical_p": (library.TypicalLogitsWarper, "mass"),
    "epsilon_cutoff": (library.EpsilonLogitsWarper, "epsilon"),
    "eta_cutoff": (library.EtaLogitsWarper, "epsilon"),
}


def _warper(option: Option) -> tuple[type, Callable[[Any, int], Options]]:
    warper, attribute = _WARPERS[option.name]
    number = type(option.default)
    return warper, lambda processor, _: {option.name: number(getattr(processor, attribute))}


# The sampler's arguments for each of the library's processors, given the width of the prompt, in the order in
# which both apply them.
_OPTIONS: dict[type, Callable[[Any, int], Options]] = {
    library.RepetitionPenaltyLogitsProcessor: lambda p, _: {
        "repetition_penalty": p.penalty,
        "prompt_ignore_length": getattr(p, "prompt_ignore_length", None),
    },
    library.MinLengthLogitsProcessor: lambda p, width: _minimum(p.min_length - width, p),
    library.MinNewTokensLengthLogitsProcessor: lambda p, width: _minimum(
        p.min_new_tokens + p.prompt_length_to_skip - width, p
    ),
    library.SuppressTokensLogitsProcessor: lambda p, _: {"banned": p.suppress_tokens.tolist()},
    **dict(_warper(option) for option in TABLE if option.draws),
}


def sampler_options(processors: Any, config: Any, width: int, vocab: int) -> Options | None:
    """``SamplingParams.make``'s arguments for a call of ``generate``; None if the sampler lacks something.

    With a repetition penalty the options also have ``prompt_ignore_length``, the number of tokens at the
    beginning that the penalty passes over: None, a number, or one for each row.
    """
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return None
    kinds = [type(processor) for processor in processors]
    order = list(_OPTIONS)
    if not set(kinds) <= set(order) or kinds != sorted(set(kinds), key=order.index):
        return None
    options: Options = {} if config.do_sample else {"temperature": 0.0}
    for processor in processors:
        own = _OPTIONS[type(processor)](processor, width)
        if getattr(processor, "min_tokens_to_keep", 1) != 1:
            return None
        # Two kinds of processor set a least length.
        if "min_new_tokens" in options and "min_new_tokens" in own:
            own["min_new_tokens"] = max(own["min_new_tokens"], options["min_new_tokens"])
        options |= own
    return options | {"top_k": min(options.get("top_k", 0), vocab)}


@torch.no_grad()
def run(
    engine: EngineCache,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    options: Options,
    criteria: Any,
    config: Any,
    streamer: Any,
) -> torch.Tensor:
    """The result of the library's loop, ``(rows, width + new)``, with the engine's sampler.

    Args:
        input_ids: Whole sequences, or the new tokens alone if there is a cache and ``mask`` is longer.
        criteria: The stopping criteria, called after every token with the ids so far.
    """
    rows, width = input_ids.shape
    device = input_ids.device
    penalised = "repetition_penalty" in options
    state = SamplerState.make(rows, engine.vocab_size, history=penalised, device=device)
    if penalised:
        ignored = options.pop("prompt_ignore_length")
        ignored = torch.as_tensor(0 if ignored is None else ignored, device=device)
        places = torch.arange(width, device=device)
        state.add_prompt(input_ids, (places >= ignored.reshape(-1, 1)).expand(rows, width))
    params = SamplingParams.make(rows, engine.vocab_size, **options, device=device)
    ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    pad = config._pad_token_tensor
    ids = torch.empty(rows, max(config.max_length, width) + 1, dtype=input_ids.dtype, device=device)
    ids[:, :width] = input_ids
    running = torch.ones(rows, dtype=torch.bool, device=device)
    logits = engine.run(_new_tokens(engine, input_ids, mask))
    while True:
        # The library, too, rounds float64 logits.
        last = logits[:, -1].float() if logits.dtype == torch.float64 else logits[:, -1]
        tokens = sample(last, params, state=state).tokens
        if ends:
            tokens = torch.where(running, tokens, pad)
        ids[:, width] = tokens
        width += 1
        if streamer is not None:
            streamer.put(tokens.cpu())
        running &= ~criteria(ids[:, :width], None)
        if not running.any():
            break
        logits = engine.run(ids[:, :width] if engine.whole_ids else tokens[:, None])
    if streamer is not None:
        streamer.end()
    return ids[:, :width].clone()


def _new_tokens(engine: EngineCache, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The prompt's tokens that are not in the cache yet."""
    if engine.whole_ids or (mask is not None and mask.shape[1] != input_ids.shape[1]):
        return input_ids
    return input_ids[:, engine.get_seq_length() :]


def result(ids: torch.Tensor, config: Any) -> Any:
    """The tokens in the form that the library returns."""
    return GenerateDecoderOnlyOutput(sequences=ids) if config.return_dict_in_generate else ids
