"""What a caller may ask of generation, under transformers' names, and how that is settled for one call."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from gptkern.checkpoint.generation import UNSUPPORTED
from gptkern.config import GPTConfig
from gptkern.generate.rules import bad_words, biased, suppressed

if TYPE_CHECKING:
    from gptkern.gpt import GPT

DEFAULT_NEW_TOKENS = 20
EarlyStopping = bool | Literal["never"]


class GenerateOptions(TypedDict, total=False):
    """Options of ``generate``, ``stream`` and ``generate_text``: names, meaning, defaults of transformers 5.

    One that is not given is what the checkpoint's ``generation_config`` says, else the default below; one
    that is given as None is the default. Tensors, arrays and NumPy's numbers are taken as what they hold.

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
        eos_token_id: The end-of-text token or tokens; None for none.
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
        seed: 64 bits, signed or not. A draw depends on the seed, the number of the copy among its prompt's
            ``num_return_sequences``, and the number of the new token alone. So a prompt's tokens are the same
            alone, in any batch and in any place of it, up to rounding of the model's logits; copies of a
            prompt differ, and equal prompts in one call do not. Without a seed one is drawn from PyTorch's
            global generator, and all rows differ.
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


def merged(options: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one call, checked: what is given, and else what the checkpoint says.

    Only what is asked for is in it. ``eos_token_id`` is always there, a tuple, and so is ``top_k``.

    Args:
        options: As given; None asks for gptkern's own default, whatever the checkpoint says.
        said: The model's ``generation_config``.

    Raises:
        TypeError, ValueError: An unknown option, or one of the wrong type or out of range.
    """
    _check_names(options)
    said = _meant(said)
    _tell_unsupported(said)
    given, defaults = _checked("generate", options), _checked("generation_config", _defaults(options, said))
    asked = defaults | given
    asked.setdefault("eos_token_id", ())
    asked.setdefault("top_k", 0 if "top_k" in options else 50)
    return asked


def options_over(fallback: Mapping[str, Any], model: GPT, options: Mapping[str, Any]) -> dict[str, Any]:
    """What to give ``generate`` so that options win, then the checkpoint's word, then ``fallback``.

    For a caller that has defaults of its own. One of them stands where neither options nor checkpoint have a
    word for it; a longest length where they name neither, sampling where they ask for no beams.
    """
    said = {name: value for name, value in model.generation_config.items() if value is not None}
    idle = set(said)
    if idle & _LONGEST:
        idle |= _LONGEST
    if (options.get("num_beams") or said.get("num_beams", 1)) != 1:
        idle.add("do_sample")
    own = _defaults(options, {n: v for n, v in fallback.items() if n not in idle} | said)
    return {name: value for name, value in own.items() if name not in said} | dict(options)


def _meant(said: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's word without token ids below 0, by which some mean that there is none."""

    def real(value: Any) -> bool:
        return not isinstance(value, int) or value >= 0

    kept = {name: value for name, value in said.items() if name not in _TOKENS or real(value)}
    if isinstance(eos := kept.get("eos_token_id"), list):
        kept["eos_token_id"] = [token for token in eos if real(token)] or None
    return kept


def _defaults(options: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``said`` stands beside the options of a call."""
    names = GenerateOptions.__annotations__
    found = {n: v for n, v in said.items() if n in names and n not in options and v is not None}
    # Of two options that mean the same, the one that was given counts.
    for alike in (_LONGEST, _SHORTEST):
        if any(options.get(name) is not None for name in alike):
            found = {name: value for name, value in found.items() if name not in alike}
    if plain(options.get("do_sample", found.get("do_sample"))) is not True:
        found = {name: value for name, value in found.items() if name not in _SAMPLING_ALONE}
    return found


def _tell_unsupported(said: Mapping[str, Any]) -> None:
    asked = [
        f"{name}={said[name]!r}"
        for name, neutral in UNSUPPORTED.items()
        if said.get(name) is not None and said[name] not in neutral
    ]
    if asked:
        warnings.warn(
            f"generate: the checkpoint's generation_config asks for {', '.join(asked)}, "
            "which gptkern does not support: it is left out",
            UserWarning,
            stacklevel=5,
        )


def settle(
    asked: Mapping[str, Any], config: GPTConfig, *, width: int, longest: int, lengths_given: bool
) -> Settings:
    """Check options against each other and the model, and fill in the defaults.

    Args:
        asked: What ``merged`` gives.
        width: Tokens of a prompt row, padding included.
        longest: Tokens of the longest prompt, without padding.
        lengths_given: Whether the caller named the longest length; any other gives way to the context.

    Raises:
        ValueError: Options that contradict each other, a prompt or a length that the context cannot hold.
    """
    beams, returned = asked.get("num_beams", 1), asked.get("num_return_sequences", 1)
    sampling = asked.get("do_sample", False)
    _check_modes(asked, beams, returned, sampling)
    eos = asked["eos_token_id"]
    if asked.get("speculate", 0) >= config.n_positions:
        raise ValueError(
            f"generate: speculate is {asked['speculate']}; "
            f"less than the model's context of {config.n_positions} is needed"
        )
    max_new = _max_new(asked, config.n_positions, width, longest, lengths_given)
    return Settings(
        max_new=max_new,
        min_new=min(asked.get("min_new_tokens", max(asked.get("min_length", 0) - width, 0)), max_new),
        do_sample=sampling,
        temperature=float(asked.get("temperature", 1.0)),
        top_k=asked["top_k"],
        top_p=float(asked.get("top_p", 1.0)),
        min_p=float(asked.get("min_p", 0.0)),
        typical_p=float(asked.get("typical_p", 1.0)),
        epsilon_cutoff=float(asked.get("epsilon_cutoff", 0.0)),
        eta_cutoff=float(asked.get("eta_cutoff", 0.0)),
        repetition_penalty=float(asked.get("repetition_penalty", 1.0)),
        presence_penalty=float(asked.get("presence_penalty", 0.0)),
        frequency_penalty=float(asked.get("frequency_penalty", 0.0)),
        no_repeat_ngram_size=asked.get("no_repeat_ngram_size", 0),
        bad_words_ids=bad_words(asked, eos, config.vocab_size),
        suppress_tokens=suppressed(asked, config.vocab_size),
        sequence_bias=biased(asked, config.vocab_size),
        num_return_sequences=returned,
        num_beams=beams,
        length_penalty=float(asked.get("length_penalty", 1.0)),
        early_stopping=asked.get("early_stopping", False),
        eos=eos,
        pad=asked.get("pad_token_id", eos[0] if eos else None),
        stop_strings=_stop_strings(asked),
        speculate=asked.get("speculate", 0),
        kv_cache_dtype=asked.get("kv_cache_dtype", "auto"),
        seed=asked.get("seed"),
    )


_TOKENS = {"eos_token_id", "pad_token_id"}
_LONGEST = {"max_length", "max_new_tokens"}
_SHORTEST = {"min_length", "min_new_tokens"}


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
    "seed": -(2**63),
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


def _checked(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None, as Python's own numbers and lists; errors begin with ``source``."""
    given = {name: plain(value) for name, value in options.items() if value is not None}
    _check_types(source, given)
    _check_ranges(source, given)
    if "eos_token_id" in given:
        given["eos_token_id"] = _eos(source, given["eos_token_id"])
    return given


def plain(value: Any) -> Any:
    """Tensors, arrays and NumPy's numbers as Python's own, in lists and mappings too."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {_key(plain(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return value


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_types(source: str, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _WHOLE and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"{source}: {name} is {value!r}; a whole number is needed")
        if name in _REAL and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise TypeError(f"{source}: {name} is {value!r}; a number is needed")
        if name in _REAL and isinstance(value, int) and abs(value) > 2**1000:
            raise ValueError(f"{source}: {name} is a number of {value.bit_length()} bits, beyond a float's")
    if not isinstance(given.get("do_sample", False), bool):
        raise TypeError(f"{source}: do_sample is {given['do_sample']!r}; True or False is needed")
    if given.get("kv_cache_dtype", "auto") not in ("auto", "fp8"):
        raise ValueError(
            f"{source}: kv_cache_dtype is {given['kv_cache_dtype']!r}; 'auto' or 'fp8' is needed"
        )
    stopping = given.get("early_stopping", False)
    if not isinstance(stopping, bool) and stopping != "never":
        raise ValueError(f"{source}: early_stopping is {stopping!r}; True, False or 'never' is needed")


def _check_ranges(source: str, given: Mapping[str, Any]) -> None:
    for name, least in _WHOLE.items():
        if given.get(name, least) < least:
            raise ValueError(f"{source}: {name} is {given[name]}; {least} or more is needed")
    if given.get("pad_token_id", 0) >= 2**63:
        raise ValueError(f"{source}: pad_token_id is {given['pad_token_id']}; less than 2**63 is needed")
    if not -(2**63) <= given.get("seed", 0) < 2**64:
        raise ValueError(f"{source}: seed is {given['seed']}; 64 bits, from -2**63 to 2**64 - 1, are needed")
    for name in ("temperature", "repetition_penalty"):
        if not 0 < given.get(name, 1.0) < float("inf"):
            hint = "; do_sample=False takes the likeliest token" if name == "temperature" else ""
            raise ValueError(f"{source}: {name} is {given[name]}; a number above 0 is needed{hint}")
    for name in ("top_p", "typical_p"):
        if not 0 < given.get(name, 1.0) <= 1:
            raise ValueError(f"{source}: {name} is {given[name]}; 0 < {name} <= 1 is needed")
    for name in ("epsilon_cutoff", "eta_cutoff"):
        if not 0 <= given.get(name, 0.0) < 1:
            raise ValueError(f"{source}: {name} is {given[name]}; 0 <= {name} < 1 is needed")
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(given.get(name, 0.0)) < float("inf"):
            raise ValueError(f"{source}: {name} is {given[name]}; a finite number is needed")
    # A length to a greater power may pass what a float holds.
    if not abs(given.get("length_penalty", 0.0)) <= 50:
        raise ValueError(f"{source}: length_penalty is {given['length_penalty']}; -50 to 50 is needed")
    if not 0 <= given.get("min_p", 0.0) <= 1:
        raise ValueError(f"{source}: min_p is {given['min_p']}; 0 <= min_p <= 1 is needed")


def _check_modes(given: Mapping[str, Any], beams: int, returned: int, sampling: bool) -> None:
    if returned > beams and not sampling:
        raise ValueError(
            f"generate: num_return_sequences is {returned}, num_beams {beams}: "
            "more than one sequence needs do_sample=True, or at least as many beams"
        )
    if beams > 1 and sampling:
        raise ValueError(
            f"generate: num_beams is {beams} with do_sample=True; beam search does not sample: "
            "give do_sample=False, also where the checkpoint says True"
        )
    if beams > 1 and "speculate" in given:
        raise ValueError(f"generate: speculate with num_beams {beams}; beam search does not speculate")
    if not sampling:
        idle = [name for name, default in _SAMPLING_ALONE.items() if given.get(name, default) != default]
        if idle:
            warnings.warn(
                f"generate: {', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect "
                "without do_sample=True",
                UserWarning,
                stacklevel=4,
            )


def _max_new(given: Mapping[str, Any], context: int, width: int, longest: int, lengths_given: bool) -> int:
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
    if asked > room and lengths_given:
        raise ValueError(
            f"generate: {named}, the prompt has {longest} tokens, the model's context is {context}: "
            f"at most {largest} is possible here"
        )
    return int(min(asked, room))


def _eos(source: str, value: Any) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**63 for i in ids):
        raise TypeError(f"{source}: eos_token_id is {value!r}; token ids, 0 or more, are needed")
    return ids


def _stop_strings(given: Mapping[str, Any]) -> tuple[str, ...]:
    value = given.get("stop_strings", ())
    several = isinstance(value, Iterable) and not isinstance(value, str)
    strings = tuple(value) if several else (value,)
    if not all(isinstance(s, str) and s for s in strings):
        raise ValueError(
            f"generate: stop_strings is {value!r}; one string or several, none empty, are needed"
        )
    return strings
