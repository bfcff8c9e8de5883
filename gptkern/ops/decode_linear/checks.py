"""Argument errors of the decode step's linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import needs_grad, traced, use_kernel
from gptkern.ops._types import PagedCache
from gptkern.ops.decode_attention.checks import check_cache, check_slots
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_linear.launch import Epilogue, Heads, LinearInputs, norm_arguments
from gptkern.ops.linear.reference import ACTIVATIONS


def check_inputs(op: str, inputs: LinearInputs) -> None:
    """Raise for an x, weight, bias, norm or normed_out that no decode layer accepts."""
    x, weight, bias, norm, normed_out = inputs
    _checks.tensor(op, "x", x, dim=2)
    _checks.dtype(op, "x", x, _checks.KERNEL_FLOATS if use_kernel(x) else _checks.FLOATS)
    _check_like(op, "x", x, x)
    width = x.shape[1]
    tensors: dict[str, torch.Tensor | None] = {"bias": bias}
    if isinstance(weight, QuantizedWeight):
        _checks.same_device(op, x=x, weight=weight.values, scales=weight.scales, minimums=weight.minimums)
        if weight.format == "fp8":
            _checks.fp8_device(op, "weight", x.device)
    else:
        _checks.tensor(op, "weight", weight, dim=2)
        _checks.last_dim_contiguous(op, "weight", weight)
        tensors["weight"] = weight
    if weight.shape[1] != width:
        raise ValueError(f"{op}: weight has {weight.shape[1]} columns, x {width}: they must be equal")
    if norm is not None:
        norm_weight, norm_bias, eps, _ = norm_arguments(norm)
        _checks.eps(op, eps)
        tensors |= {"norm weight": norm_weight, "norm bias": norm_bias}
    shapes: dict[str, Sequence[int]] = {
        "bias": weight.shape[:1],
        "norm weight": (width,),
        "norm bias": (width,),
    }
    for name, value in tensors.items():
        if value is None:
            continue
        if value.dtype != x.dtype and not (name.startswith("norm") and value.dtype == torch.float32):
            raise TypeError(f"{op}: {name} is {value.dtype}, x {x.dtype}: one dtype is needed")
        _checks.shape(op, name, value, shapes.get(name, value.shape))
    _checks.same_device(op, x=x, **tensors)
    if normed_out is not None:
        if norm is None:
            raise ValueError(f"{op}: normed_out is given without a norm")
        _checks.shape(op, "normed_out", normed_out, x.shape, "the shape of x")
        _check_like(op, "normed_out", normed_out, x)


def check_epilogue(op: str, inputs: LinearInputs, epilogue: Epilogue) -> None:
    """Raise for an activation, a residual or a number that ``decode_linear`` does not accept."""
    activation, residual, gated, scale, softcap = epilogue
    outputs = inputs.weight.shape[0]
    if gated and outputs % 2:
        raise ValueError(
            f"{op}: weight has {outputs} rows; gated needs an even number: the gate's, then as many of up's"
        )
    _checks.finite(op, "scale", scale)
    _checks.positive(op, "softcap", softcap, none=True)
    _checks.choice(op, "activation", activation, dict.fromkeys((*ACTIVATIONS, "none")))
    if residual is not None:
        expected = (inputs.x.shape[0], outputs // 2 if gated else outputs)
        _checks.tensor(op, "residual", residual)
        _checks.shape(op, "residual", residual, expected, "rows and outputs")
        _check_like(op, "residual", residual, inputs.x)


def check_kv(op: str, inputs: LinearInputs, cache: PagedCache, slots: torch.Tensor) -> None:
    """Raise for a cache or slots that ``decode_qkv`` does not accept."""
    x, weight = inputs.x, inputs.weight
    for name, value in (("k_cache", cache.k), ("v_cache", cache.v)):
        _checks.tensor(op, name, value, dim=4)
        _checks.shape(op, name, value, cache.k.shape, "the shape of k_cache")
        if cache.kv_scales is None and value.dtype != x.dtype:
            raise TypeError(f"{op}: {name} is {value.dtype}, x {x.dtype}: one dtype is needed")
        if value.stride()[2:] != (value.shape[3], 1):
            raise ValueError(f"{op}: {name} has strides {value.stride()}; a token's heads must be contiguous")
    check_cache(op, cache)
    width = cache.k.shape[2] * cache.k.shape[3]
    if weight.shape[0] <= 2 * width:
        raise ValueError(
            f"{op}: weight has {weight.shape[0]} rows; keys and values alone are {2 * width} by the cache"
        )
    _checks.same_device(op, x=x, k_cache=cache.k, v_cache=cache.v)
    check_slots(op, cache, slots, x.shape[0])


def check_heads(op: str, inputs: LinearInputs, cache: PagedCache, heads: Heads) -> None:
    """Raise for rotary positions or a norm of heads that ``decode_qkv`` does not accept."""
    x, head_dim = inputs.x, cache.k.shape[3]
    if heads != (None, None) and inputs.weight.shape[0] % head_dim:
        raise ValueError(
            f"{op}: weight has {inputs.weight.shape[0]} rows; a multiple of the cache's head dimension, "
            f"{head_dim}, is needed"
        )
    if heads.rotary is not None:
        _check_rotary(op, x, head_dim, heads)
    if heads.norm is not None:
        _checks.eps(op, heads.norm.eps)
        for name, value in (("q_weight", heads.norm.q_weight), ("k_weight", heads.norm.k_weight)):
            _checks.tensor(op, name, value)
            _checks.dtype(op, name, value, _checks.KERNEL_FLOATS if use_kernel(x) else _checks.FLOATS)
            _checks.shape(op, name, value, (head_dim,), "the head dimension")
            _checks.last_dim_contiguous(op, name, value)
            _checks.same_device(op, x=x, **{name: value})


def _check_rotary(op: str, x: torch.Tensor, head_dim: int, heads: Heads) -> None:
    assert heads.rotary is not None
    cos, sin, seq_lens, pairs = heads.rotary
    _checks.choice(op, "pairs", pairs, ("halves", "interleaved"))
    for name, table in (("cos", cos), ("sin", sin)):
        _checks.tensor(op, name, table, dim=2)
        _checks.dtype(op, name, table, (torch.float32,))
        _checks.shape(op, name, table, cos.shape, "that of cos")
        if not table.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {table.stride()}; a contiguous table is needed")
    # The two elements of a pair are neighbours in a tile, whose places are counted over all heads.
    if head_dim % 2 or not 2 <= 2 * cos.shape[1] <= head_dim:
        raise ValueError(
            f"{op}: cos has {cos.shape[1]} columns, one for each pair; the head dimension is {head_dim}: it "
            "must be even, and hold 1 to half as many pairs"
        )
    _checks.tensor(op, "seq_lens", seq_lens, dim=1)
    _checks.dtype(op, "seq_lens", seq_lens, (torch.int32,))
    _checks.shape(op, "seq_lens", seq_lens, x.shape[:1], "one per row")
    _checks.last_dim_contiguous(op, "seq_lens", seq_lens)
    _checks.same_device(op, x=x, cos=cos, sin=sin, seq_lens=seq_lens)
    check_positions(op, heads)


def check_positions(op: str, heads: Heads) -> None:
    """Raise for a position beyond the rotary tables; on a CPU alone."""
    if heads.rotary is None:
        return
    cos, _, seq_lens, _ = heads.rotary
    if seq_lens.device.type == "cpu" and seq_lens.numel() and not traced(seq_lens):
        longest = int(seq_lens.max())
        if longest > cos.shape[0]:
            raise ValueError(f"{op}: seq_lens holds {longest}; cos has {cos.shape[0]} positions")


def check_compiled(op: str, inputs: LinearInputs) -> None:
    """Raise for a quantised weight under ``torch.compile``."""
    if isinstance(inputs.weight, QuantizedWeight):
        raise ValueError(
            f"{op}: weight is a QuantizedWeight; torch.compile takes tensors: give .dequantize()"
        )


def check_no_grad(op: str, inputs: LinearInputs, residual: torch.Tensor | None = None) -> None:
    """Raise where autograd would have to see the call."""
    weight = None if isinstance(inputs.weight, QuantizedWeight) else inputs.weight
    norm = norm_arguments(inputs.norm)[:2]
    if needs_grad(inputs.x, weight, inputs.bias, residual, *norm):
        raise ValueError(f"{op}: an argument requires grad; it is forward only: use torch.no_grad()")


def _check_like(op: str, name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    if value.dtype != x.dtype or value.device != x.device:
        raise TypeError(
            f"{op}: {name} is {value.dtype} on {value.device}, x {x.dtype} on {x.device}: they must agree"
        )
    if not value.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {value.stride()}; a contiguous tensor is needed")
