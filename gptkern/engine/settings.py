"""The settings of one call: options, then the checkpoint's word, then defaults, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptkern._warn import warn
from gptkern.checkpoint.generation import UNSUPPORTED
from gptkern.config import Config
from gptkern.engine.option_checks import bad_words, biased, checked, plain, suppressed
from gptkern.engine.options import OPTIONS, EarlyStopping, KVCacheDType, Option

DEFAULT_NEW_TOKENS = 20


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
    kv_cache_dtype: KVCacheDType
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
    said = _meant(said)
    _tell_unsupported(said)
    given, defaults = checked("generate", options), checked("generation_config", _defaults(options, said))
    asked = defaults | given
    asked.setdefault("eos_token_id", ())
    asked.setdefault("top_k", 0 if "top_k" in options else OPTIONS["top_k"].default)
    return asked


def options_over(
    fallback: Mapping[str, Any], said: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options for ``generate``: the caller's, else the checkpoint's, else ``fallback``.

    For a caller that has defaults of its own. One of them stands where neither options nor checkpoint have a
    word for it; a longest length where they name neither, sampling where they ask for no beams.

    Args:
        said: The model's ``generation_config``.
    """
    said = {name: value for name, value in said.items() if value is not None}
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
    """The defaults in ``said`` that apply beside the options of a call."""
    found = {n: v for n, v in said.items() if n in OPTIONS and n not in options and v is not None}
    # Of two options that mean the same, the one that was given counts.
    for alike in (_LONGEST, _SHORTEST):
        if any(options.get(name) is not None for name in alike):
            found = {name: value for name, value in found.items() if name not in alike}
    if plain(options.get("do_sample", found.get("do_sample"))) is not True:
        found = {name: value for name, value in found.items() if not OPTIONS[name].draws}
    return found


def _tell_unsupported(said: Mapping[str, Any]) -> None:
    asked = [
        f"{name}={said[name]!r}"
        for name, neutral in UNSUPPORTED.items()
        if said.get(name) is not None and said[name] not in neutral
    ]
    if asked:
        warn(
            f"generate: the checkpoint's generation_config asks for {', '.join(asked)}, "
            "which gptkern does not support: it is left out"
        )


def settle(
    asked: Mapping[str, Any], config: Config, *, width: int, longest: int, lengths_given: bool
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
    if asked.get("speculate", 0) >= config.spec.context:
        raise ValueError(
            f"generate: speculate is {asked['speculate']}; "
            f"less than the model's context of {config.spec.context} is needed"
        )
    max_new = _max_new(asked, config.spec.context, width, longest, lengths_given)
    asked = {
        **asked,
        "speculate": asked.get("speculate", 0),
        "bad_words_ids": bad_words(asked, eos, config.spec.vocab_size),
        "suppress_tokens": suppressed(asked, config.spec.vocab_size),
        "sequence_bias": biased(asked, config.spec.vocab_size),
    }
    return Settings(
        max_new=max_new,
        min_new=min(asked.get("min_new_tokens", max(asked.get("min_length", 0) - width, 0)), max_new),
        eos=eos,
        pad=asked.get("pad_token_id", eos[0] if eos else None),
        **{name: _settled(asked, option) for name, option in OPTIONS.items() if name in _FIELDS},
    )


def _settled(asked: Mapping[str, Any], option: Option) -> Any:
    value = asked.get(option.name, option.default)
    return float(value) if isinstance(option.default, float) else value


_FIELDS = Settings.__dataclass_fields__
_TOKENS = {"eos_token_id", "pad_token_id"}
_LONGEST = {"max_length", "max_new_tokens"}
_SHORTEST = {"min_length", "min_new_tokens"}


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
        idle = [
            name
            for name, option in OPTIONS.items()
            if option.draws and given.get(name, option.default) != option.default
        ]
        if idle:
            warn(
                f"generate: {', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect "
                "without do_sample=True"
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
