"""The linear layers of one decode step, each one launch: norm, product, bias, activation, residual, cache."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._dispatch import call_key, needs_grad, traced, use_kernel
from gptkern.ops._launch import CHECKED, Plans, on_device, repeated
from gptkern.ops._types import HeadNorm, KvScales, Norm, PagedCache, RmsNorm, Rotary
from gptkern.ops.decode_attention import checks as cache_checks
from gptkern.ops.decode_linear import checks, launch, reference
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_linear.launch import Epilogue, Heads, LinearInputs
from gptkern.ops.decode_linear.register import flat_heads, flat_norm, norm_flags

_plans: Plans[Any] = Plans()


def decode_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | RmsNorm | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    normed_out: torch.Tensor | None = None,
    gated: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """``softcap(scale * activation(norm(x) @ weight.T + bias)) + residual`` for few rows.

    Bitwise the same for a row alone and among others. Forward only.

    Args:
        x: ``(rows, width)``, contiguous; fp32, fp16 or bf16 (float64 on a CPU). Meant for up to 64
            rows: weights are read once for every 64.
        weight: ``(outputs, width)`` of x's dtype, rows contiguous; or a ``QuantizedWeight``, which is not
            served under ``torch.compile``.
        bias: ``(outputs,)`` or None.
        norm: ``(weight, bias or None, eps)`` of a layer norm of x, an ``RmsNorm``, or None; its tensors are
            of x's dtype or fp32.
        activation: ``gelu_tanh``, ``gelu``, ``relu``, ``silu`` or ``none``.
        residual: ``(rows, outputs)``, contiguous, or None.
        normed_out: Where ``norm(x)`` is written too: a tensor like x, or None. Needs a norm.
        gated: The weight's first half are the rows of a gate, the others those of up: ``activation(gate) *
            up``, of half as many outputs.
        scale: Factor on the outputs, before the residual is added.
        softcap: Outputs become ``softcap * tanh(outputs / softcap)`` after the scale; None: they stay.

    Returns:
        ``(rows, outputs)``, gated ``(rows, outputs / 2)``.

    Raises:
        TypeError, ValueError: an argument is not as described here, or one requires grad on a GPU or
            under ``torch.compile``.
    """
    op = "decode_linear"
    inputs = LinearInputs(x, weight, bias, norm, normed_out)
    epilogue = Epilogue(activation, residual, gated, scale, softcap)
    tensors, settings = launch.described(inputs, epilogue)
    key = call_key(tensors, op, *settings)
    if _plans.get(key) is None:
        checks.check_inputs(op, inputs)
        checks.check_epilogue(op, inputs, epilogue)
        scale, softcap = float(scale), None if softcap is None else float(softcap)
        compiling = traced(x)
        if compiling:
            checks.check_compiled(op, inputs)
        elif not use_kernel(x):
            form = (gated, scale, softcap)
            return reference.decode_linear(x, weight, bias, norm, activation, residual, normed_out, *form)
        checks.check_no_grad(op, inputs, residual)
        if compiling:
            out: torch.Tensor = torch.ops.gptkern.decode_linear(
                x, weight, bias, *flat_norm(norm), activation, residual, normed_out,
                *norm_flags(norm), gated, scale, softcap,
            )  # fmt: skip
            return out
        _plans.keep(key, CHECKED)
    elif needs_grad(*tensors):
        checks.check_no_grad(op, inputs, residual)

    def make() -> tuple[torch.Tensor | None, ...]:
        cap = None if softcap is None else float(softcap)
        return launch.linear(inputs, epilogue._replace(scale=float(scale), softcap=cap))

    with on_device(x):
        new = repeated(_plans, key, tensors, make)
    out = new[0]
    return out


def decode_qkv(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    norm: Norm | RmsNorm | None = None,
    normed_out: torch.Tensor | None = None,
    scales: KvScales | None = None,
    rotary: Rotary | None = None,
    head_norm: HeadNorm | None = None,
) -> torch.Tensor:
    """``decode_linear`` that returns the queries and writes keys and values into the cache.

    Args:
        x, bias, norm, normed_out: As in ``decode_linear``.
        weight: As in ``decode_linear``; its rows are those of the queries, then of the keys, then of the
            values.
        k_cache, v_cache: ``(pages, page_size, kv_heads, head_dim)`` of x's dtype, changed in place; the
            last two dimensions contiguous.
        slots: ``(rows,)`` int64, as in ``append_kv``.
        scales: (k_scale, v_scale) of an fp8 cache, as in ``decode_attention``.
        rotary: The rotary positions of queries and keys, turned before they are rounded and stored; None:
            they have none. On a GPU, where a check would stall, a position beyond the tables gives NaN.
        head_norm: The RMS norm of each query head and each key head before it is turned, or None.

    Returns:
        The queries, ``(rows, outputs - 2 * kv_heads * head_dim)``.

    Raises:
        TypeError, ValueError: as ``decode_linear``.
    """
    op = "decode_qkv"
    inputs, cache = LinearInputs(x, weight, bias, norm, normed_out), PagedCache(k_cache, v_cache, scales)
    heads = Heads(rotary, head_norm)
    tensors, settings = launch.described(inputs, Epilogue(), cache, slots, heads)
    key = call_key(tensors, op, *settings)
    if _plans.get(key) is None:
        checks.check_inputs(op, inputs)
        checks.check_kv(op, inputs, cache, slots)
        checks.check_heads(op, inputs, cache, heads)
        compiling = traced(x)
        if compiling:
            checks.check_compiled(op, inputs)
        elif not use_kernel(x):
            return reference.decode_qkv(
                x, weight, bias, norm, k_cache, v_cache, slots, normed_out, scales, *heads
            )
        checks.check_no_grad(op, inputs)
        if compiling:
            out: torch.Tensor = torch.ops.gptkern.decode_qkv(
                x, weight, bias, *flat_norm(norm), k_cache, v_cache, slots, normed_out,
                *norm_flags(norm), *flat_heads(heads),
            )  # fmt: skip
            return out
        _plans.keep(key, CHECKED)
    else:
        cache_checks.check_slot_values(op, cache, slots)
        checks.check_positions(op, heads)
        if needs_grad(*tensors):
            checks.check_no_grad(op, inputs)
    with on_device(x):
        new = repeated(
            _plans, key, tensors, lambda: launch.linear(inputs, cache=cache, slots=slots, heads=heads)
        )
    out = new[0]
    return out
