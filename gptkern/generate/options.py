"""What a caller may ask of generation, under transformers' names, and how that is settled for one call."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from gptkern.config import GPTConfig
from gptkern.generate.rules import bad_words, biased, suppressed

DEFAULT_NEW_TOKENS = 20
EarlyStopping = bool | Literal["never"]


class GenerateOptions(TypedDict, total=False):
    """Options of ``generate``, ``stream`` and ``generate_text``: names, meaning, defaults of transformers 5.

    ``presence_penalty``, ``frequency_penalty`` and ``logit_bias`` are vLLM's. Biases come first, then the
    penalties, what is barred, the minimum length, and what ``do_sample`` asks for, in the order below.

    Attributes:
        max_length: Longest sequence, prompt (with its padding) included.
        max_new_tokens: Most new tokens; goes before ``max_length``. With neither, 20, or what is left
            of the context where that is less. More than the context holds is an error that names the
            largest value.
        min_length, min_new_tokens: No end-of-text token before the sequence, or its new part, is so
            long; the second goes before the first.
        do_sample: Draw from the distribution; otherwise take the likeliest token.
        temperature: What logits are divided by, above 0; default 1.
        top_k: Keep the k likeliest tokens; default 50, 0 or None keeps all.
        top_p: Keep the likeliest tokens that together reach this probability; default 1 keeps all.
        min_p: Keep tokens at least this fraction as likely as the likeliest.
        typical_p: Locally typical sampling's mass; default 1 keeps all.
        epsilon_cutoff: Keep tokens at least so likely; default 0 keeps all.
        eta_cutoff: Keep tokens at least so likely, or less where the distribution is flat; default 0.
        repetition_penalty: Above 1 discourages tokens that the sequence (prompt included) holds.
        presence_penalty: Subtracted from the logits of tokens among the new ones.
        frequency_penalty: Subtracted from a token's logit for each time that it is among the new ones.
        no_repeat_ngram_size: No n-gram of so many tokens comes twice in a sequence, prompt included
            (without its padding); default 0 is no such rule.
        bad_words_ids: Lists of token ids that never come; ``[[5], [7, 8]]`` bars 5, and 8 after 7.
        suppress_tokens: Tokens that never come.
        sequence_bias: ``{(5,): -2.0, (7, 8): 1.5}``, or a list of such pairs: added to the logit of a
            sequence's last token where the others came just before. -inf bars.
        logit_bias: ``{token: bias}``, added to the token's logit.
        num_return_sequences: Sequences a prompt; needs ``do_sample`` or as many beams.
        num_beams: Beams of beam search; 1 is none.
        length_penalty: Beam scores are divided by the length to this power.
        early_stopping: True ends beam search when ``num_beams`` sequences are complete, False when no
            better one is likely, "never" when no better one is possible.
        eos_token_id: The end-of-text token or tokens; the model's own by default, None for none.
        pad_token_id: Fills sequences that ended before the others; the first end-of-text token by default.
        stop_strings: Text that ends generation when the new tokens complete it.
        speculate: Most tokens a pass that prompt lookup drafts: what followed the latest tokens when they
            last came in the row. Each position is drawn as it would be without, and drafts hold while
            they equal the draws: every token and seed gives what it gives without. Default: none. Drafts
            are made where a row's arithmetic does not depend on its neighbours: with kernels on a GPU
            from 17 new tokens on, and on the CPU for up to 16 rows, drafted ones included; not with
            ``no_repeat_ngram_size`` or bad words and biased sequences of several tokens. Other calls take
            plain steps. Not with ``num_beams``.
        kv_cache_dtype: ``"auto"`` keeps keys and values in the model's dtype, ``"fp8"`` in a byte each
            (e4m3; on GPUs from compute capability 8.9 on), by the model's ``kv_scales``.
        seed: Draws depend on this seed, the row and the step alone. By default drawn from PyTorch's
            global generator.
    """

    max_length: int | None
    max_new_tokens: int | None
    min_length: int
    min_new_tokens: int | None
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float | None
    typical_p: float
    epsilon_cutoff: float
    eta_cutoff: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[tuple[Sequence[int], float]] | None
    logit_bias: Mapping[int, float] | None
    num_return_sequences: int
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    speculate: int | None
    kv_cache_dtype: Literal["auto", "fp8"]
    seed: int | None


@dataclass(frozen=True)
class Settings:
    """The options of one call, checked, with every default filled in.

    Attributes:
        max_new, min_new: New tokens a row.
        eos: End-of-text tokens.
        pad: The filling token, or None where nothing can need one.
        top_k: 0 keeps all.
        min_p: 0 keeps all.
        stop_strings, bad_words_ids, suppress_tokens: Empty for none.
        sequence_bias: ``logit_bias`` included.
        speculate: 0 drafts nothing.
        The others are those of ``GenerateOptions``.
    """

    max_new: int
    min_new: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    epsilon_cutoff: float
    eta_cutoff: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    bad_words_ids: tuple[tuple[int, ...], ...]
    suppress_tokens: tuple[int, ...]
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...]
    num_return_sequences: int
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    eos: tuple[int, ...]
    pad: int | None
    stop_strings: tuple[str, ...]
    speculate: int
    kv_cache_dtype: Literal["auto", "fp8"]
    seed: int | None


def settle(options: Mapping[str, Any], config: GPTConfig, *, width: int, longest: int) -> Settings:
    """Check options against each other and the model, and fill in the defaults.

    Args:
        width: Tokens of a prompt row, padding included.
        longest: Tokens of the longest prompt, without padding.

    Raises:
        TypeError: An unknown option, or one of the wrong type.
        ValueError: One out of range, a prompt or a length that the context cannot hold.
    """
    _check_names(options)
    given = {name: value for name, value in options.items() if value is not None}
    _check_types(given)
    _check_ranges(given)
    beams, returned = given.get("num_beams", 1), given.get("num_return_sequences", 1)
    sampling = given.get("do_sample", False)
    _check_modes(given, beams, returned, sampling)
    eos = _eos(options, config)
    if given.get("speculate", 0) >= config.n_positions:
        raise ValueError(
            f"generate: speculate is {given['speculate']}; "
            f"less than the model's context of {config.n_positions} is needed"
        )
    max_new = _max_new(given, config.n_positions, width, longest)
    return Settings(
        max_new=max_new,
        min_new=given.get("min_new_tokens", max(given.get("min_length", 0) - width, 0)),
        do_sample=sampling,
        temperature=float(given.get("temperature", 1.0)),
        top_k=options.get("top_k", 50) or 0,
        top_p=float(given.get("top_p", 1.0)),
        min_p=float(given.get("min_p", 0.0)),
        typical_p=float(given.get("typical_p", 1.0)),
        epsilon_cutoff=float(given.get("epsilon_cutoff", 0.0)),
        eta_cutoff=float(given.get("eta_cutoff", 0.0)),
        repetition_penalty=float(given.get("repetition_penalty", 1.0)),
        presence_penalty=float(given.get("presence_penalty", 0.0)),
        frequency_penalty=float(given.get("frequency_penalty", 0.0)),
        no_repeat_ngram_size=given.get("no_repeat_ngram_size", 0),
        bad_words_ids=bad_words(given, eos, config.vocab_size),
        suppress_tokens=suppressed(given, config.vocab_size),
        sequence_bias=biased(given, config.vocab_size),
        num_return_sequences=returned,
        num_beams=beams,
        length_penalty=float(given.get("length_penalty", 1.0)),
        early_stopping=given.get("early_stopping", False),
        eos=eos,
        pad=given.get("pad_token_id", eos[0] if eos else None),
        stop_strings=_stop_strings(given),
        speculate=given.get("speculate", 0),
        kv_cache_dtype=given.get("kv_cache_dtype", "auto"),
        seed=given.get("seed"),
    )


def _check_names(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in GenerateOptions.__annotations__:
            near = difflib.get_close_matches(name, GenerateOptions.__annotations__, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"generate: {name!r} is no option{hint}")


_WHOLE = {
    "max_length": 1,
    "max_new_tokens": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "num_beams": 1,
    "pad_token_id": 0,
    "speculate": 1,
    "seed": 0,
}
_SAMPLING_ALONE = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty")
_REAL = (*(name for name in _SAMPLING_ALONE if name != "top_k"), *_PENALTIES)


def _check_types(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _WHOLE and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"generate: {name} is {value!r}; a whole number is needed")
        if name in _REAL and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise TypeError(f"generate: {name} is {value!r}; a number is needed")
    if not isinstance(given.get("do_sample", False), bool):
        raise TypeError(f"generate: do_sample is {given['do_sample']!r}; True or False is needed")
    if given.get("kv_cache_dtype", "auto") not in ("auto", "fp8"):
        raise ValueError(
            f"generate: kv_cache_dtype is {given['kv_cache_dtype']!r}; 'auto' or 'fp8' is needed"
        )
    if given.get("early_stopping", False) not in (True, False, "never"):
        raise ValueError(
            f"generate: early_stopping is {given['early_stopping']!r}; True, False or 'never' is needed"
        )


def _check_ranges(given: Mapping[str, Any]) -> None:
    for name, least in _WHOLE.items():
        if given.get(name, least) < least:
            raise ValueError(f"generate: {name} is {given[name]}; {least} or more is needed")
    if given.get("seed", 0) >= 2**64:
        raise ValueError(f"generate: seed is {given['seed']}; less than 2**64 is needed")
    for name in ("temperature", "repetition_penalty"):
        if not 0 < given.get(name, 1.0) < float("inf"):
            hint = "; do_sample=False takes the likeliest token" if name == "temperature" else ""
            raise ValueError(f"generate: {name} is {given[name]}; a number above 0 is needed{hint}")
    for name in ("top_p", "typical_p"):
        if not 0 < given.get(name, 1.0) <= 1:
            raise ValueError(f"generate: {name} is {given[name]}; 0 < {name} <= 1 is needed")
    for name in ("epsilon_cutoff", "eta_cutoff"):
        if not 0 <= given.get(name, 0.0) < 1:
            raise ValueError(f"generate: {name} is {given[name]}; 0 <= {name} < 1 is needed")
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(given.get(name, 0.0)) < float("inf"):
            raise ValueError(f"generate: {name} is {given[name]}; a finite number is needed")
    if not 0 <= given.get("min_p", 0.0) <= 1:
        raise ValueError(f"generate: min_p is {given['min_p']}; 0 <= min_p <= 1 is needed")


def _check_modes(given: Mapping[str, Any], beams: int, returned: int, sampling: bool) -> None:
    if returned > beams and not sampling:
        raise ValueError(
            f"generate: num_return_sequences is {returned}, num_beams {beams}: "
            "more than one sequence needs do_sample=True, or at least as many beams"
        )
    if beams > 1 and sampling:
        raise ValueError(f"generate: num_beams is {beams} with do_sample=True; beam search does not sample")
    if beams > 1 and "speculate" in given:
        raise ValueError(f"generate: speculate with num_beams {beams}; beam search does not speculate")
    if not sampling:
        idle = [name for name, default in _SAMPLING_ALONE.items() if given.get(name, default) != default]
        if idle:
            warnings.warn(
                f"generate: {', '.join(idle)} have no effect without do_sample=True",
                UserWarning,
                stacklevel=4,
            )


def _max_new(given: Mapping[str, Any], context: int, width: int, longest: int) -> int:
    room = context - longest
    if room < 1:
        raise ValueError(
            f"generate: the prompt has {longest} tokens, the model's context is {context}: "
            f"a prompt of at most {context - 1} tokens leaves room for one more"
        )
    if "max_new_tokens" in given:
        asked, named = given["max_new_tokens"], f"max_new_tokens is {given['max_new_tokens']}"
        largest = room
    elif "max_length" in given:
        asked, named = given["max_length"] - width, f"max_length is {given['max_length']}"
        largest = room + width
        if asked < 1:
            raise ValueError(
                f"generate: {named}, the prompt has {width} tokens already: give max_new_tokens, "
                "which counts new ones alone"
            )
    else:
        return min(DEFAULT_NEW_TOKENS, room)
    if asked > room:
        raise ValueError(
            f"generate: {named}, the prompt has {longest} tokens, the model's context is {context}: "
            f"at most {largest} is possible here"
        )
    return int(asked)


def _eos(options: Mapping[str, Any], config: GPTConfig) -> tuple[int, ...]:
    if "eos_token_id" not in options:
        return config.eos_token_ids
    value = options["eos_token_id"]
    if value is None:
        return ()
    ids = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise TypeError(f"generate: eos_token_id is {value!r}; token ids, 0 or more, are needed")
    return ids


def _stop_strings(given: Mapping[str, Any]) -> tuple[str, ...]:
    value = given.get("stop_strings", ())
    strings = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(s, str) and s for s in strings):
        raise ValueError(
            f"generate: stop_strings is {value!r}; one string or several, none empty, are needed"
        )
    return strings
