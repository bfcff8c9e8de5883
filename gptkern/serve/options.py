"""Fields of a request as options of the engine: OpenAI's defaults, never a checkpoint's."""

from __future__ import annotations

import secrets
from typing import Any

from gptkern.engine.options import OPTIONS
from gptkern.serve.errors import ApiProblem, bad_field
from gptkern.serve.protocol import GenerationFields

DEFAULT_COMPLETION_TOKENS = 16
# OpenAI's defaults of what shapes a draw.
_DRAWS = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
_PENALTIES = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}


def options_of(
    fields: GenerationFields, *, max_new: int, end_of_text: tuple[int, ...], vocab_size: int
) -> dict[str, Any]:
    """Every option of the engine, so that no default of a checkpoint's shows through.

    Args:
        max_new: Most new tokens.
        end_of_text: The model's own tokens that end a text.

    Raises:
        ApiProblem: A token outside the vocabulary, fewer tokens than the fewest.
    """
    if (fields.min_tokens or 0) > max_new:
        accepted = f"at most max_tokens, {max_new}, is accepted"
        raise bad_field("min_tokens", fields.min_tokens, accepted, code="conflicting_fields")
    chosen: dict[str, Any] = {name: None for name, option in OPTIONS.items() if not option.draws}
    chosen |= {
        "max_new_tokens": max_new,
        "min_new_tokens": fields.min_tokens or 0,
        "eos_token_id": _ends(fields, end_of_text, vocab_size),
        "stop_strings": stops_of(fields) or None,
        "logit_bias": _biases(fields, vocab_size),
        "num_return_sequences": fields.n or 1,
        "seed": secrets.randbits(63) if fields.seed is None else fields.seed,
    }
    chosen |= {name: _or(getattr(fields, name), default) for name, default in _PENALTIES.items()}
    return chosen | _draws(fields)


def stops_of(fields: GenerationFields) -> tuple[str, ...]:
    """The texts that end an answer."""
    if fields.stop is None:
        return ()
    return (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)


def _draws(fields: GenerationFields) -> dict[str, Any]:
    temperature = _or(fields.temperature, _DRAWS["temperature"])
    if temperature == 0:
        # Copies are drawn: from the likeliest token alone they draw what greedy takes.
        return {"do_sample": True, "top_k": 1} if (fields.n or 1) > 1 else {"do_sample": False}
    draws: dict[str, Any] = {name: None for name, option in OPTIONS.items() if option.draws}
    draws |= {name: _or(getattr(fields, name), default) for name, default in _DRAWS.items()}
    return {"do_sample": True, **draws, "top_k": max(fields.top_k or 0, 0)}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _ends(fields: GenerationFields, end_of_text: tuple[int, ...], vocab_size: int) -> list[int] | None:
    own = fields.stop_token_ids or []
    for token in own:
        if token >= vocab_size:
            raise bad_field("stop_token_ids", token, f"token ids up to {vocab_size - 1} are accepted")
    ends = [*own, *(() if fields.ignore_eos else end_of_text)]
    return list(dict.fromkeys(ends)) or None


def _biases(fields: GenerationFields, vocab_size: int) -> dict[int, float] | None:
    biases: dict[int, float] = {}
    for key, bias in (fields.logit_bias or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 10 or int(key) >= vocab_size:
            raise bad_field("logit_bias", key, f"token ids from 0 to {vocab_size - 1} are accepted")
        biases[int(key)] = bias
    return biases or None


def max_new_of(wish: int | None, default: int | None, prompt_tokens: int, context: int) -> int:
    """The most new tokens of an answer.

    Args:
        wish: The request's word; 0 asks for no answer, for which one token is made and left out.
        default: Where it has none; None is the rest of the context.

    Raises:
        ApiProblem: More than the context holds.
    """
    room = context - prompt_tokens
    if room < 1:
        raise ApiProblem(
            400,
            f"the prompt has {prompt_tokens} tokens; the model's context is {context}, "
            f"so at most {context - 1} are accepted",
            param="prompt",
            code="context_length_exceeded",
        )
    if wish is None:
        return min(room, room if default is None else default)
    if wish > room:
        raise ApiProblem(
            400,
            f"max_tokens is {wish}; the prompt has {prompt_tokens} tokens and the context is {context}, "
            f"so at most {room} are accepted",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return max(wish, 1)
