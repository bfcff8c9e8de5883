"""The linear layers of one decode step, each one launch: norm, product, bias, activation, residual, cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import needs_grad, traced, use_kernel
from gptkern.ops._types import KvScales, Norm
from gptkern.ops.decode_attention.op import check_cache, check_slots
from gptkern.ops.decode_linear import launcher, reference
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.linear.reference import ACTIVATIONS


def decode_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    normed_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(norm(x) @ weight.T + bias) + residual`` for few rows.

    Bitwise the same for a row alone and among others. Forward only.

    Args:
        x: ``(rows, width)``, contiguous; fp32, fp16 or bf16 (float64 on a CPU). Meant for up to 64
            rows: weights are read once for every 64.
        weight: ``(outputs, width)`` of x's dtype, rows contiguous; or a ``QuantizedWeight``, which is not
            served under ``torch.compile``.
        bias: ``(outputs,)`` or None.
        norm: ``(weight, bias or None, eps)`` of a layer norm of x, or None.
        activation: ``gelu_tanh``, ``gelu``, ``relu``, ``silu`` or ``none``.
        residual: ``(rows, outputs)``, contiguous, or None.
        normed_out: Like x: ``norm(x)`` is also written there. Needs a norm.

    Returns:
        ``(rows, outputs)``.

    Raises:
        TypeError, ValueError: an argument is not as described here, or one requires grad on a GPU or
            under ``torch.compile``.
    """
    op = "decode_linear"
    _check(op, x, weight, bias, norm, normed_out)
    _check_epilogue(op, x, weight, activation, residual)
    compiling = _compiling(op, x, weight)
    if not (compiling or use_kernel(x)):
        return reference.decode_linear(x, weight, bias, norm, activation, residual, normed_out)
    _check_no_grad(op, x, weight, bias, residual, norm)
    if compiling:
        out: torch.Tensor = torch.ops.gptkern.decode_linear(
            x, weight, bias, *(norm or _NO_NORM), activation, residual, normed_out
        )
        return out
    return launcher.decode_linear(x, weight, bias, norm, activation, residual, normed_out, None)


def decode_qkv(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    norm: Norm | None = None,
    normed_out: torch.Tensor | None = None,
    scales: KvScales | None = None,
) -> torch.Tensor:
    """``decode_linear`` whose outputs are queries, keys and values, the latter written into the cache.

    Args:
        x, weight, bias, norm, normed_out: As of ``decode_linear``; weight's rows are those of the
            queries, then of the keys, then of the values.
        k_cache, v_cache: ``(pages, page_size, kv_heads, head_dim)`` of x's dtype, changed in place; the
            last two dimensions contiguous.
        slots: ``(rows,)`` int64, as of ``append_kv``.
        scales: Of an fp8 cache, as of ``decode_attention``.

    Returns:
        The queries, ``(rows, outputs - 2 * kv_heads * head_dim)``.

    Raises:
        TypeError, ValueError: As of ``decode_linear``.
    """
    op = "decode_qkv"
    _check(op, x, weight, bias, norm, normed_out)
    _check_kv(op, x, weight, k_cache, v_cache, slots, scales)
    compiling = _compiling(op, x, weight)
    if not (compiling or use_kernel(x)):
        return reference.decode_qkv(x, weight, bias, norm, k_cache, v_cache, slots, normed_out, scales)
    _check_no_grad(op, x, weight, bias, None, norm)
    if compiling:
        out: torch.Tensor = torch.ops.gptkern.decode_qkv(
            x, weight, bias, *(norm or _NO_NORM), k_cache, v_cache, slots, normed_out
        )
        return out
    cache = (k_cache, v_cache, slots)
    return launcher.decode_linear(x, weight, bias, norm, "none", None, normed_out, cache, scales)


def _check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    norm: Norm | None,
    normed_out: torch.Tensor | None,
) -> None:
    _checks.tensor(op, "x", x, dim=2)
    _checks.dtype(op, "x", x, _checks.KERNEL_FLOATS if use_kernel(x) else _checks.FLOATS)
    _check_like(op, "x", x, x)
    width = x.shape[1]
    given: dict[str, torch.Tensor | None] = {"bias": bias}
    if isinstance(weight, QuantizedWeight):
        _checks.same_device(op, x=x, weight=weight.values, scales=weight.scales, zeros=weight.zeros)
        if weight.format == "fp8":
            _checks.fp8_device(op, "weight", x.device)
    else:
        _checks.tensor(op, "weight", weight, dim=2)
        _checks.last_dim_contiguous(op, "weight", weight)
        given["weight"] = weight
    if weight.shape[1] != width:
        raise ValueError(f"{op}: weight has {weight.shape[1]} columns, x {width}: they must be equal")
    if norm is not None:
        given |= {"norm weight": norm[0], "norm bias": norm[1]}
    shapes: dict[str, Sequence[int]] = {
        "bias": weight.shape[:1],
        "norm weight": (width,),
        "norm bias": (width,),
    }
    for name, value in given.items():
        if value is None:
            continue
        if value.dtype != x.dtype:
            raise TypeError(f"{op}: {name} is {value.dtype}, x {x.dtype}: one dtype is needed")
        _checks.shape(op, name, value, shapes.get(name, value.shape))
    _checks.same_device(op, x=x, **given)
    if normed_out is not None:
        if norm is None:
            raise ValueError(f"{op}: normed_out is given without a norm")
        _checks.shape(op, "normed_out", normed_out, x.shape, "the shape of x")
        _check_like(op, "normed_out", normed_out, x)


def _check_epilogue(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    activation: str,
    residual: torch.Tensor | None,
) -> None:
    if activation != "none" and activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; accepted are {', '.join(ACTIVATIONS)}, none")
    if residual is not None:
        _checks.tensor(op, "residual", residual)
        _checks.shape(op, "residual", residual, (x.shape[0], weight.shape[0]), "rows and outputs")
        _check_like(op, "residual", residual, x)


def _check_kv(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    scales: KvScales | None,
) -> None:
    for name, kept in (("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.tensor(op, name, kept, dim=4)
        _checks.shape(op, name, kept, k_cache.shape, "the shape of k_cache")
        if scales is None and kept.dtype != x.dtype:
            raise TypeError(f"{op}: {name} is {kept.dtype}, x {x.dtype}: one dtype is needed")
        if kept.stride()[2:] != (kept.shape[3], 1):
            raise ValueError(f"{op}: {name} has strides {kept.stride()}; a token's heads must be contiguous")
    check_cache(op, k_cache, v_cache, scales)
    width = k_cache.shape[2] * k_cache.shape[3]
    if weight.shape[0] <= 2 * width:
        raise ValueError(
            f"{op}: weight has {weight.shape[0]} rows; keys and values alone are {2 * width} by the cache"
        )
    _checks.tensor(op, "slots", slots, dim=1)
    _checks.dtype(op, "slots", slots, (torch.int64,))
    _checks.shape(op, "slots", slots, x.shape[:1], "one per row")
    _checks.same_device(op, x=x, k_cache=k_cache, v_cache=v_cache, slots=slots)
    check_slots(op, k_cache, slots)


def _compiling(op: str, x: torch.Tensor, weight: torch.Tensor | QuantizedWeight) -> bool:
    compiling = traced(x)
    if compiling and isinstance(weight, QuantizedWeight):
        raise ValueError(
            f"{op}: weight is a QuantizedWeight; torch.compile takes tensors: give .dequantize()"
        )
    return compiling


def _check_like(op: str, name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    if value.dtype != x.dtype or value.device != x.device:
        raise TypeError(
            f"{op}: {name} is {value.dtype} on {value.device}, x {x.dtype} on {x.device}: they must agree"
        )
    if not value.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {value.stride()}; a contiguous tensor is needed")


def _check_no_grad(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: Norm | None,
) -> None:
    plain = None if isinstance(weight, QuantizedWeight) else weight
    if needs_grad(x, plain, bias, residual, *(norm or _NO_NORM)[:2]):
        raise ValueError(f"{op}: an argument requires grad; it is forward only: use torch.no_grad()")


_NO_NORM = (None, None, 0.0)


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
    norm = None if norm_weight is None else (norm_weight, norm_bias, eps)
    _check("decode_linear", x, weight, bias, norm, normed_out)
    _check_epilogue("decode_linear", x, weight, activation, residual)
    if use_kernel(x):
        return launcher.decode_linear(x, weight, bias, norm, activation, residual, normed_out, None)
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
    norm = None if norm_weight is None else (norm_weight, norm_bias, eps)
    _check("decode_qkv", x, weight, bias, norm, normed_out)
    _check_kv("decode_qkv", x, weight, k_cache, v_cache, slots, None)
    if use_kernel(x):
        cache = (k_cache, v_cache, slots)
        return launcher.decode_linear(x, weight, bias, norm, "none", None, normed_out, cache)
    # The reference's queries are a view of all outputs; the fake kernel promises contiguous ones.
    return reference.decode_qkv(x, weight, bias, norm, k_cache, v_cache, slots, normed_out).contiguous()


_library = torch.library.Library("gptkern", "FRAGMENT")
_library.define(
    "decode_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "str activation, Tensor? residual, Tensor(a!)? normed_out) -> Tensor"
)
_library.define(
    "decode_qkv(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, float eps, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor(c!)? normed_out) -> Tensor"
)
for _key in ("CUDA", "CPU"):
    _library.impl("decode_linear", _linear, _key)
    _library.impl("decode_qkv", _qkv, _key)


@torch.library.register_fake("gptkern::decode_linear", lib=_library)
def _(
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
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("gptkern::decode_qkv", lib=_library)
def _(
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
    return x.new_empty((x.shape[0], weight.shape[0] - 2 * k_cache.shape[2] * k_cache.shape[3]))
