"""The checks of one option's value, chosen by its type in the table, and of values that hold token ids."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from gptkern.engine.library_names import answer
from gptkern.engine.options import OPTIONS, Option

Tokens = tuple[int, ...]


def checked(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None, as Python's own numbers and lists; errors begin with ``source``.

    Lists of token ids are checked by ``suppressed``, ``bad_words`` and ``biased``, which know the vocabulary.

    Raises:
        TypeError, ValueError: An unknown option, or one of the wrong type or out of range.
    """
    given = {}
    for name, value in options.items():
        option = _known(name)
        if value is not None:
            given[name] = _CHECKS.get(name, _number)(source, option, plain(value))
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


def _known(name: str) -> Option:
    if (known := answer(name)) is not None:
        raise TypeError(known)
    if name not in OPTIONS:
        near = difflib.get_close_matches(name, OPTIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"generate: {name!r} is no option{hint}")
    return OPTIONS[name]


def _number(source: str, option: Option, value: Any) -> Any:
    """A number or a flag; a value of any other type is looked at where the vocabulary is known."""
    kinds = {option.type, *get_args(option.type)}
    name = option.name
    if bool in kinds:
        if not isinstance(value, bool):
            raise TypeError(f"{source}: {name} is {value!r}; True or False is needed")
    elif float in kinds:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{source}: {name} is {value!r}; a number is needed")
        if isinstance(value, int) and abs(value) > 2**1000:
            raise ValueError(f"{source}: {name} is a number of {value.bit_length()} bits, beyond a float's")
    elif int in kinds and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError(f"{source}: {name} is {value!r}; a whole number is needed")
    if option.range is not None and not option.range.accepts(value):
        raise ValueError(f"{source}: {name} is {value}; {option.range.words} is needed")
    return value


def _choice(source: str, option: Option, value: Any) -> Any:
    accepted = get_args(option.type)
    if value not in accepted:
        raise ValueError(
            f"{source}: {option.name} is {value!r}; {' or '.join(map(repr, accepted))} is needed"
        )
    return value


def _early_stopping(source: str, option: Option, value: Any) -> Any:
    if not isinstance(value, bool) and value != "never":
        raise ValueError(f"{source}: {option.name} is {value!r}; True, False or 'never' is needed")
    return value


def _eos(source: str, option: Option, value: Any) -> Tokens:
    ids = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**63 for i in ids):
        raise TypeError(f"{source}: {option.name} is {value!r}; token ids, 0 or more, are needed")
    return ids


def _stop_strings(source: str, option: Option, value: Any) -> tuple[str, ...]:
    several = isinstance(value, Iterable) and not isinstance(value, str)
    strings = tuple(value) if several else (value,)
    if not all(isinstance(s, str) and s for s in strings):
        raise ValueError(
            f"{source}: {option.name} is {value!r}; one string or several, none empty, are needed"
        )
    return strings


def _later(source: str, option: Option, value: Any) -> Any:
    return value


_CHECKS: dict[str, Callable[[str, Option, Any], Any]] = {
    "kv_cache_dtype": _choice,
    "early_stopping": _early_stopping,
    "eos_token_id": _eos,
    "stop_strings": _stop_strings,
    "bad_words_ids": _later,
    "suppress_tokens": _later,
    "sequence_bias": _later,
    "logit_bias": _later,
}


def suppressed(given: Mapping[str, Any], vocab_size: int) -> Tokens:
    """The option ``suppress_tokens``, checked."""
    value = _sequence("suppress_tokens", given.get("suppress_tokens", ()))
    return _ids("suppress_tokens", value, vocab_size) if value else ()


def bad_words(given: Mapping[str, Any], eos: Sequence[int], vocab_size: int) -> tuple[Tokens, ...]:
    """The option ``bad_words_ids``, checked; as in transformers, an end-of-text token is no word."""
    name = "bad_words_ids"
    words = [_ids(name, word, vocab_size, eos) for word in _sequence(name, given.get(name, ()))]
    return tuple(word for word in words if len(word) > 1 or word[0] not in eos)


def biased(given: Mapping[str, Any], vocab_size: int) -> tuple[tuple[Tokens, float], ...]:
    """The options ``sequence_bias`` and ``logit_bias``, checked and joined."""
    joined: dict[Tokens, float] = {}
    value = given.get("sequence_bias", {})
    pairs = value.items() if isinstance(value, Mapping) else _sequence("sequence_bias", value)
    for pair in pairs:
        if len(_sequence("sequence_bias", pair)) != 2:
            raise ValueError(f"generate: sequence_bias holds {pair!r}; token ids and a bias are needed")
        ids = _ids("sequence_bias", pair[0], vocab_size)
        joined[ids] = _bias("sequence_bias", ids, pair[1])
    by_token = given.get("logit_bias", {})
    if not isinstance(by_token, Mapping):
        raise TypeError(
            f"generate: logit_bias is {type(by_token).__name__}; a mapping of token ids to biases is needed"
        )
    for token, bias in by_token.items():
        ids = _ids("logit_bias", (token,), vocab_size)
        joined[ids] = joined.get(ids, 0.0) + _bias("logit_bias", token, bias)
    return tuple(joined.items())


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"generate: {name} is or holds {value!r}; a list is needed")
    return value


def _ids(name: str, value: Any, vocab_size: int, beyond: Sequence[int] = ()) -> Tokens:
    ids = tuple(_sequence(name, value))
    if not ids:
        raise ValueError(f"generate: {name} holds an empty list; one token id or more is needed")
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise TypeError(f"generate: {name} holds {token!r}; token ids are needed")
        if not 0 <= token < vocab_size and token not in beyond:
            raise ValueError(
                f"generate: {name} holds {token}; token ids from 0 to {vocab_size - 1} are accepted"
            )
    return ids


def _bias(name: str, ids: Any, bias: Any) -> float:
    if not isinstance(bias, int | float) or isinstance(bias, bool):
        raise TypeError(f"generate: {name} gives {ids!r} {bias!r}; a number is needed")
    # Logits are fp32 when it is added.
    if bias != -float("inf") and not abs(bias) < 3e38:
        raise ValueError(f"generate: {name} gives {ids!r} {bias}; a finite number or -inf is needed")
    return float(bias)
