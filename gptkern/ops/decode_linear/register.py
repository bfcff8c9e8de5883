"""``torch.ops.gptkern.decode_linear`` and ``decode_qkv``, for torch.compile and export.

They take weights and caches of 16 and 32 bits: quantised ones are not in their schemas.
"""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._dispatch import use_kernel
from gptkern.ops._register import register
from gptkern.ops._types import HeadNorm, Norm, PagedCache, RmsNorm, Rotary
from gptkern.ops.decode_linear import checks, launch, reference
from gptkern.ops.decode_linear.launch import Epilogue, Heads, LinearInputs, norm_arguments

Maybe = torch.Tensor | None


def flat_norm(norm: Norm | RmsNorm | None) -> tuple[Maybe, Maybe, float]:
    """A norm as the schemas name it: weight, bias, eps."""
    return norm_arguments(norm)[:3]


def norm_flags(norm: Norm | RmsNorm | None) -> tuple[bool, bool]:
    """(centered, unit_offset) of a norm, in the schemas' order."""
    flags = norm_arguments(norm)[3]
    return flags["CENTERED"], flags["UNIT_OFFSET"]


def flat_heads(heads: Heads) -> tuple[Any, ...]:
    """The changes of queries and keys, in the schema's order."""
    rotary = (None, None, None, "halves") if heads.rotary is None else tuple(heads.rotary)
    norm = (None, None, 0.0, False) if heads.norm is None else tuple(heads.norm)
    return *rotary, *norm


def _norm(weight: Maybe, bias: Maybe, eps: float, centered: bool, unit_offset: bool) -> Norm | RmsNorm | None:
    if weight is None:
        return None
    return (weight, bias, eps) if centered else RmsNorm(weight, eps, unit_offset)


def _heads(
    cos: Maybe = None,
    sin: Maybe = None,
    seq_lens: Maybe = None,
    pairs: str = "halves",
    q_weight: Maybe = None,
    k_weight: Maybe = None,
    eps: float = 0.0,
    unit_offset: bool = False,
) -> Heads:
    rotary = norm = None
    if cos is not None and sin is not None and seq_lens is not None:
        rotary = Rotary(cos, sin, seq_lens, pairs)
    if q_weight is not None and k_weight is not None:
        norm = HeadNorm(q_weight, k_weight, eps, unit_offset)
    return Heads(rotary, norm)


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    activation: str,
    residual: torch.Tensor | None,
    normed_out: torch.Tensor | None,
    centered: bool = True,
    unit_offset: bool = False,
    gated: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    norm = _norm(norm_weight, norm_bias, eps, centered, unit_offset)
    inputs = LinearInputs(x, weight, bias, norm, normed_out)
    checks.check_inputs("decode_linear", inputs)
    epilogue = Epilogue(activation, residual, gated, scale, softcap)
    checks.check_epilogue("decode_linear", inputs, epilogue)
    if use_kernel(x):
        return launch.linear(inputs, epilogue)[0]
    form = (gated, scale, softcap)
    return reference.decode_linear(x, weight, bias, norm, activation, residual, normed_out, *form)


def _qkv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    normed_out: torch.Tensor | None,
    centered: bool = True,
    unit_offset: bool = False,
    *head_arguments: Any,
) -> torch.Tensor:
    norm = _norm(norm_weight, norm_bias, eps, centered, unit_offset)
    cache, heads = PagedCache(k_cache, v_cache), _heads(*head_arguments)
    inputs = LinearInputs(x, weight, bias, norm, normed_out)
    checks.check_inputs("decode_qkv", inputs)
    checks.check_kv("decode_qkv", inputs, cache, slots)
    checks.check_heads("decode_qkv", inputs, cache, heads)
    if use_kernel(x):
        return launch.linear(inputs, cache=cache, slots=slots, heads=heads)[0]
    # The reference's queries are a view of all outputs; the fake kernel promises contiguous ones.
    q = reference.decode_qkv(x, weight, bias, norm, k_cache, v_cache, slots, normed_out, None, *heads)
    return q.contiguous()


def _fake_linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    gated = len(rest) > 9 and rest[9]
    return x.new_empty((x.shape[0], weight.shape[0] // 2 if gated else weight.shape[0]))


def _fake_qkv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    k_cache: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] - 2 * k_cache.shape[2] * k_cache.shape[3]))


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps"
_NORM = "bool centered=True, bool unit_offset=False"
register(
    f"decode_linear({_INPUTS}, str activation, Tensor? residual, Tensor(a!)? normed_out, {_NORM}, "
    "bool gated=False, float scale=1.0, float? softcap=None) -> Tensor",
    _linear,
    fake=_fake_linear,
)
register(
    f"decode_qkv({_INPUTS}, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor(c!)? normed_out, "
    f"{_NORM}, Tensor? cos=None, Tensor? sin=None, Tensor? seq_lens=None, str pairs='halves', "
    "Tensor? q_weight=None, Tensor? k_weight=None, float head_eps=0.0, bool head_unit_offset=False) "
    "-> Tensor",
    _qkv,
    fake=_fake_qkv,
)
