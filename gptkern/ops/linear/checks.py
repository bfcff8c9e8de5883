"""Argument errors of ``linear`` and ``gelu_mlp``."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from gptkern.ops import _checks
from gptkern.ops.linear import reference

# Within a tile of 128 rows, offsets are 32-bit: 128 * 2^24 = 2^31.
_MOST_FEATURES = 2**24
_OPTIONAL = ("bias", "b_fc", "b_proj", "residual")


def activation(op: str, name: str) -> None:
    """``name`` is a known activation."""
    _checks.choice(op, "activation", name, reference.ACTIVATIONS)


def tensors(op: str, **values: torch.Tensor | None) -> None:
    """Tensors of a floating dtype on one device; biases and the residual may be None."""
    for name, value in values.items():
        if value is not None or name not in _OPTIONAL:
            _checks.tensor(op, name, value)
            assert value is not None
            _checks.dtype(op, name, value)
            if value.dim() == 0:
                raise ValueError(f"{op}: {name} has shape (); at least one dimension is needed")
    _checks.same_device(op, **values)


def layer(
    op: str,
    x: torch.Tensor,
    features: int,
    names: tuple[str, str],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """A linear layer's weight and bias, of ``x``'s dtype, for ``features`` inputs."""
    _checks.tensor(op, names[0], weight, dim=2)
    if weight.shape[1] != features:
        raise ValueError(
            f"{op}: {names[0]} has shape {tuple(weight.shape)}; (out, {features}) is needed: for weights "
            f"stored (in, out) pass {names[0]}.t()"
        )
    if bias is not None:
        _checks.shape(op, names[1], bias, (weight.shape[0],), f"{names[0]} has {weight.shape[0]} rows")
    for name, value in zip(names, (weight, bias), strict=True):
        if value is not None:
            _checks.dtype(op, name, value, [x.dtype])


def residual(op: str, x: torch.Tensor, value: torch.Tensor, features: int) -> None:
    """A residual of the shape of a layer's output, of ``x``'s dtype or fp32."""
    _checks.shape(op, "residual", value, (*x.shape[:-1], features))
    accepted = [x.dtype] if x.dtype == torch.float64 else [x.dtype, torch.float32]
    _checks.dtype(op, "residual", value, accepted)


def saved(op: str, x: torch.Tensor, features: int, **values: torch.Tensor | None) -> None:
    """Values saved by a forward pass: matrices of ``features`` columns of ``x``'s dtype, or None."""
    for name, value in values.items():
        if value is not None:
            _checks.shape(op, name, value, (math.prod(x.shape[:-1]), features))
            _checks.dtype(op, name, value, [x.dtype])
            if not value.is_contiguous():
                raise ValueError(f"{op}: {name} has strides {value.stride()}; contiguous is needed")
    _checks.same_device(op, x=x, **values)


def kernel_inputs(op: str, features: int, **values: torch.Tensor | None) -> None:
    """The kernels' own conditions: dtype, and leading dimensions that merge into one."""
    if features >= _MOST_FEATURES:
        raise ValueError(f"{op}: a layer has {features} outputs; fewer than {_MOST_FEATURES} are supported")
    for name, value in values.items():
        if value is None:
            continue
        _checks.dtype(op, name, value, _checks.KERNEL_FLOATS)
        if not _rows_merge(value):
            raise ValueError(
                f"{op}: {name} has shape {tuple(value.shape)} and strides {value.stride()}; its leading "
                f"dimensions must merge into one: call {name}.contiguous() if a copy is acceptable"
            )


def _rows_merge(x: torch.Tensor) -> bool:
    """True if ``x`` is a matrix of its last dimension without a copy."""
    if x.dim() <= 2 or x.is_contiguous() or x.numel() == 0:
        return True
    lead = [(size, step) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    return all(outer == size * inner for (_, outer), (size, inner) in pairwise(lead))
