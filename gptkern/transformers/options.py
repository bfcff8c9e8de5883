"""The options of a request for the library's logits processors and stopping criteria of one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.generation import logits_process as library
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from gptkern.engine.options import TABLE, Option
from gptkern.generate.prompt import Prompts

Options = dict[str, Any]
# The criteria that the engine follows; any other is called after every token.
ENDS = (MaxLengthCriteria, EosTokenCriteria)
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


def _minimum(length: int, processor: Any) -> Options:
    return {"min_new_tokens": max(length, 0), "minimum_of": frozenset(processor.eos_token_id.tolist())}


# Processors that look at all of a row's tokens, in which the library counts padding as text.
_OF_TEXT: dict[type, Callable[[Any, int], Options]] = {
    library.SequenceBiasLogitsProcessor: lambda p, _: {"sequence_bias": p.sequence_bias},
    library.RepetitionPenaltyLogitsProcessor: lambda p, _: {"repetition_penalty": p.penalty},
    library.NoRepeatNGramLogitsProcessor: lambda p, _: {"no_repeat_ngram_size": p.ngram_size},
    library.NoBadWordsLogitsProcessor: lambda p, _: {"bad_words_ids": list(map(list, p.sequence_bias))},
}
# The options for each of the library's processors, given the width of the prompt, in the order in which both
# apply them.
_OPTIONS: dict[type, Callable[[Any, int], Options]] = {
    **_OF_TEXT,
    library.MinLengthLogitsProcessor: lambda p, width: _minimum(p.min_length - width, p),
    library.MinNewTokensLengthLogitsProcessor: lambda p, width: _minimum(
        p.min_new_tokens + p.prompt_length_to_skip - width, p
    ),
    library.SuppressTokensLogitsProcessor: lambda p, _: {"suppress_tokens": p.suppress_tokens.tolist()},
    **dict(_warper(option) for option in TABLE if option.draws),
}


KINDS = frozenset(_OPTIONS)


def request_options(processors: Any, criteria: Any, config: Any, prompts: Prompts) -> Options | str:
    """The options that say what a call's processors and criteria do; a reason where none say the same."""
    kinds, order = [type(processor) for processor in processors], list(_OPTIONS)
    unknown = next((kind for kind in kinds if kind not in KINDS), None)
    if unknown is not None:
        return f"the engine has no {unknown.__name__}"
    if kinds != sorted(set(kinds), key=order.index):
        return "the logits processors come in another order than the engine's"
    eos = {token for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.tolist()}
    width = prompts.width
    lengths = [criterion.max_length - width for criterion in criteria if type(criterion) is MaxLengthCriteria]
    options: Options = {
        "do_sample": config.do_sample,
        "num_return_sequences": config.num_return_sequences,
        "eos_token_id": sorted(eos),
        "max_new_tokens": max(min(lengths, default=config.max_length - width), 1),
    }
    if (config.num_beams or 1) > 1:
        other = next((type(criterion) for criterion in criteria if type(criterion) not in ENDS), None)
        if other is not None:
            return f"the engine's beam search has no {other.__name__}"
        options |= {"num_beams": config.num_beams, "early_stopping": config.early_stopping or False}
        options["length_penalty"] = 1.0 if config.length_penalty is None else config.length_penalty
    if config.do_sample:
        options["top_k"] = 0  # none, unless a warper says so
    for processor in processors:
        reason = _text_reason(processor, prompts)
        if reason is not None:
            return reason
        own = _OPTIONS[type(processor)](processor, width)
        if own.pop("minimum_of", eos) != eos:
            return "a least length is of other tokens than those that end a text"
        # Two kinds of processor set a least length.
        if "min_new_tokens" in own:
            own["min_new_tokens"] = max(own["min_new_tokens"], options.get("min_new_tokens", 0))
        options |= own
    return options


def _text_reason(processor: Any, prompts: Prompts) -> str | None:
    """The reason why a processor of a kind that the engine has is not the same there; None if it is."""
    name = type(processor).__name__
    if getattr(processor, "min_tokens_to_keep", 1) != 1:
        return f"{name} has min_tokens_to_keep"
    if getattr(processor, "prompt_ignore_length", None) is not None:
        return f"{name} has prompt_ignore_length"
    if type(processor) in _OF_TEXT and prompts.mask is not None:
        return f"{name} of the library counts padding as text"
    return None
