"""``generate`` of an accelerated model: a front of the engine, which takes a call in one of two ways.

As requests, where the engine's sampler computes each of the library's logits processors and nothing but
tokens is returned: the engine makes the tokens, as for ``GPT.generate``. Any other call that the
engine can compute keeps the library's loop, which gets its logits from the engine's passes (``EngineCache``):
every processor, draw, beam and field of the result is the library's own. What the engine cannot compute is
the library's alone, and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from gptkern.as_built import Watch
from gptkern.engine.settings import Settings, merged, settle
from gptkern.environment import fallback
from gptkern.generate.loop import columns
from gptkern.generate.prompt import Prompts, prompts
from gptkern.gpt import GPT
from gptkern.routes import LIBRARY
from gptkern.transformers.engine import on_passes
from gptkern.transformers.options import ENDS, request_options
from gptkern.transformers.parts import CACHE
from gptkern.transformers.refusals import (
    call_refusal,
    config_refusal,
    model_refusal,
    refuse_changes,
)
from gptkern.transformers.view import view

_LOOP_ARGUMENTS = {
    "logits_processor",
    "stopping_criteria",
    "generation_config",
    "synced_gpus",
    "streamer",
    "tokenizer",
}
_log = logging.getLogger("gptkern")


def generate(model: Any, loop: Callable[..., Any], input_ids: torch.Tensor, kwargs: dict[str, Any]) -> Any:
    """Run a call of ``_sample`` or ``_beam_search`` on the engine where it can, else the library's ``loop``.

    Args:
        input_ids: Whole sequences, or the new tokens alone if there is a cache and the mask is longer.
        kwargs: The other arguments of the library's method.
    """
    if model._gptkern_generation == "library":
        return loop(input_ids, **kwargs)
    config = kwargs["generation_config"]
    inputs = {name: value for name, value in kwargs.items() if name not in _LOOP_ARGUMENTS}
    reason = (
        model_refusal(model)
        or config_refusal(model, config)
        or call_refusal(model, input_ids, config, inputs)
    )
    if kwargs.get("synced_gpus"):
        reason = "several processes generate in step"
    if reason is not None:
        fallback("generate", LIBRARY, reason)
        return loop(input_ids, **kwargs)
    # The library, too, returns int64 whatever integers the prompt has.
    input_ids, gpt = input_ids.long(), view(model)
    reason = loop_reason(model, config) or _cache_reason(input_ids, inputs)
    if reason is None:
        requests = _requests(gpt, input_ids, kwargs)
        if not isinstance(requests, str):
            return _as_requests(model, gpt, *requests, kwargs)
        reason = requests
    _log.debug("generate: transformers' loop chooses the tokens: %s", reason)
    return on_passes(model, gpt, loop, input_ids, kwargs)


def loop_reason(model: Any, config: Any) -> str | None:
    """The reason why calls with this config keep the library's loop on the engine's passes.

    None: the call's processors decide.
    """
    if (config.num_beams or 1) > 1 and config.do_sample:
        return "the engine's beam search does not sample"
    if config.do_sample and model._gptkern_rng == "torch":
        return "the library draws its very tokens from torch's generator: rng='philox' is faster"
    if config.return_dict_in_generate:
        return "the library's cache, and what else it returns beside tokens, is asked for"
    return None


def _cache_reason(input_ids: torch.Tensor, inputs: dict[str, Any]) -> str | None:
    past, mask = inputs.get(CACHE), inputs.get("attention_mask")
    if getattr(past, "_is_user_defined", False) or (past is not None and int(past.get_seq_length())):
        return f"{CACHE} is the caller's"
    if mask is not None and mask.shape != input_ids.shape:
        return "attention_mask has another shape than the tokens"
    return None


def _requests(gpt: GPT, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> tuple[Prompts, Settings] | str:
    """The prompts and settings of a call; a reason where the engine's own do not say the same."""
    config, mask = kwargs["generation_config"], kwargs.get("attention_mask")
    # The library has repeated each row, as often as there are beams or continuations of it.
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    mask = None if mask is None else mask[::copies]
    try:
        prompt = prompts(
            input_ids[::copies], mask, device=gpt.device, vocab_size=gpt.spec.vocab_size, pad=None, eos=()
        )
        options = request_options(kwargs["logits_processor"], kwargs["stopping_criteria"], config, prompt)
        if isinstance(options, str):
            return options
        asked = merged(options, {})
        width, longest = prompt.width, prompt.longest
        return prompt, settle(asked, gpt.config, width=width, longest=longest, lengths_given=True)
    except (TypeError, ValueError) as error:
        return str(error)


@torch.no_grad()
def _as_requests(
    model: Any, gpt: GPT, prompt: Prompts, settings: Settings, kwargs: dict[str, Any]
) -> torch.Tensor:
    """The library's result, ``(rows, width + new)`` int64, of tokens that the engine makes and chooses."""
    criteria, streamer = kwargs["stopping_criteria"], kwargs.get("streamer")
    ids = prompt.ids.repeat_interleave(settings.num_return_sequences, 0)
    # As in the library, rows that have ended are filled up only where there is an end-of-text token.
    filled = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    pad = int(kwargs["generation_config"]._pad_token_tensor) if filled else 0
    if settings.num_beams > 1 and not pad and settings.eos:
        # The library's beam search takes a padding token of 0 for none.
        pad = int(kwargs["generation_config"]._eos_token_tensor[0])
    watched = any(type(criterion) not in ENDS for criterion in criteria)
    running, new = [True] * len(ids), []
    watch = Watch(model)
    with closing(columns(gpt, prompt, settings)) as items:
        while any(running):
            refuse_changes(model, watch)
            column = next(items)
            tokens = [pad] * len(running)
            for row, event in column.items():
                if event.token is not None and (running[row] or not filled):
                    tokens[row] = event.token
                running[row] = running[row] and event.finish_reason is None
            new.append(tokens)
            if streamer is not None:
                streamer.put(torch.tensor(tokens))
            if watched:
                so_far = torch.cat([ids, torch.tensor(new, device=ids.device).t()], 1)
                ended = criteria(so_far, None).tolist()
                running = [runs and not ends for runs, ends in zip(running, ended, strict=True)]
    if streamer is not None:
        streamer.end()
    return torch.cat([ids, torch.tensor(new, device=ids.device).t()], 1)
