"""``torch.ops.gptkern.decode_linear`` and ``decode_qkv``, for torch.compile and export.

They take weights and caches of 16 and 32 bits: quantised ones are not in their schemas.
"""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._dispatch import use_kernel
from gptkern.ops._register import register
from gptkern.ops._types import Norm, PagedCache
from gptkern.ops.decode_linear import checks, launch, reference
from gptkern.ops.decode_linear.launch import LinearInputs

_NO_NORM = (None, None, 0.0)


def flat_norm(norm: Norm | None) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """A norm as the schemas name it: weight, bias, eps."""
    return _NO_NORM if norm is None else norm


def _norm(weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> Norm | None:
    return None if weight is None else (weight, bias, eps)


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
) -> torch.Tensor:
    norm = _norm(norm_weight, norm_bias, eps)
    inputs = LinearInputs(x, weight, bias, norm, normed_out)
    checks.check_inputs("decode_linear", inputs)
    checks.check_epilogue("decode_linear", inputs, activation, residual)
    if use_kernel(x):
        return launch.linear(inputs, activation, residual)
    return reference.decode_linear(x, weight, bias, norm, activation, residual, normed_out)


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
) -> torch.Tensor:
    norm, cache = _norm(norm_weight, norm_bias, eps), PagedCache(k_cache, v_cache)
    inputs = LinearInputs(x, weight, bias, norm, normed_out)
    checks.check_inputs("decode_qkv", inputs)
    checks.check_kv("decode_qkv", inputs, cache, slots)
    if use_kernel(x):
        return launch.linear(inputs, cache=cache, slots=slots)
    # The reference's queries are a view of all outputs; the fake kernel promises contiguous ones.
    return reference.decode_qkv(x, weight, bias, norm, k_cache, v_cache, slots, normed_out).contiguous()


def _fake_linear(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


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
register(
    f"decode_linear({_INPUTS}, str activation, Tensor? residual, Tensor(a!)? normed_out) -> Tensor",
    _linear,
    fake=_fake_linear,
)
register(
    f"decode_qkv({_INPUTS}, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor(c!)? normed_out) "
    "-> Tensor",
    _qkv,
    fake=_fake_qkv,
)
