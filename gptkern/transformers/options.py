"""The options of a request for the library's logits processors and stopping criteria of one call."""

from __future__ import annotations

from typing import Any

from transformers.generation import logits_process as library
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from gptkern.generate.prompt import Prompts

# The criteria that the engine follows; any other is called after every token.
ENDS = (MaxLengthCriteria, EosTokenCriteria)
_LEAST = (library.MinLengthLogitsProcessor, library.MinNewTokensLengthLogitsProcessor)
# The option for each of the library's processors and the attribute that holds its value, in the order in
# which both apply them.
_OPTIONS: dict[type, tuple[str, str]] = {
    library.SequenceBiasLogitsProcessor: ("sequence_bias", "sequence_bias"),
    library.RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    library.NoRepeatNGramLogitsProcessor: ("no_repeat_ngram_size", "ngram_size"),
    library.NoBadWordsLogitsProcessor: ("bad_words_ids", "bad_word_ids"),
    **dict.fromkeys(_LEAST, ("min_new_tokens", "")),
    library.SuppressTokensLogitsProcessor: ("suppress_tokens", "suppress_tokens"),
    library.TemperatureLogitsWarper: ("temperature", "temperature"),
    library.TopKLogitsWarper: ("top_k", "top_k"),
    library.TopPLogitsWarper: ("top_p", "top_p"),
    library.MinPLogitsWarper: ("min_p", "min_p"),
    library.TypicalLogitsWarper: ("typical_p", "mass"),
    library.EpsilonLogitsWarper: ("epsilon_cutoff", "epsilon"),
    library.EtaLogitsWarper: ("eta_cutoff", "epsilon"),
}
KINDS = frozenset(_OPTIONS)
# They look at all of a row's tokens, and the library counts padding among these.
_OF_TEXT = ("sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids")


def request_options(processors: Any, criteria: Any, config: Any, prompts: Prompts) -> dict[str, Any] | str:
    """The options that say what a call's processors and criteria do; a reason where none say the same."""
    kinds, order = [type(processor) for processor in processors], list(_OPTIONS)
    unknown = next((kind for kind in kinds if kind not in KINDS), None)
    if unknown is not None:
        return f"the engine has no {unknown.__name__}"
    if kinds != sorted(set(kinds), key=order.index):
        return "the logits processors come in another order than the engine's"
    eos = {token for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.tolist()}
    lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
    options: dict[str, Any] = {
        "do_sample": config.do_sample,
        "num_return_sequences": config.num_return_sequences,
        "eos_token_id": sorted(eos),
        "max_new_tokens": max(min(lengths, default=config.max_length) - prompts.width, 1),
    }
    if config.do_sample:
        options["top_k"] = 0  # none, unless a warper says so
    if (config.num_beams or 1) > 1:
        other = next((type(criterion) for criterion in criteria if type(criterion) not in ENDS), None)
        if other is not None:
            return f"the engine's beam search has no {other.__name__}"
        options |= {"num_beams": config.num_beams, "early_stopping": config.early_stopping or False}
        options["length_penalty"] = 1.0 if config.length_penalty is None else config.length_penalty
    for processor in processors:
        reason = _difference(processor, eos, prompts)
        if reason is not None:
            return reason
        name, attribute = _OPTIONS[type(processor)]
        if attribute:
            options[name] = getattr(processor, attribute)
        else:  # two kinds of processor set a least length
            options[name] = max(_least(processor, prompts.width), options.get(name, 0))
    return options


def _least(processor: Any, width: int) -> int:
    """The fewest new tokens after a prompt ``width`` wide."""
    if type(processor) is library.MinLengthLogitsProcessor:
        return int(processor.min_length) - width
    return int(processor.min_new_tokens + processor.prompt_length_to_skip) - width


def _difference(processor: Any, eos: set[int], prompts: Prompts) -> str | None:
    """The reason why a processor of a kind that the engine has is not the same there; None if it is."""
    name = type(processor).__name__
    if getattr(processor, "min_tokens_to_keep", 1) != 1:
        return f"{name} has min_tokens_to_keep"
    if getattr(processor, "prompt_ignore_length", None) is not None:
        return f"{name} has prompt_ignore_length"
    if _OPTIONS[type(processor)][0] in _OF_TEXT and prompts.mask is not None:
        return f"{name} of the library counts padding as text"
    if type(processor) in _LEAST and set(processor.eos_token_id.tolist()) != eos:
        return "a least length is of other tokens than those that end a text"
    return None
