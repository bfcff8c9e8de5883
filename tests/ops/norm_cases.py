"""What the tests of layer norm and of RMS norm share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gptkern.ops import _launch, add_layer_norm, add_rms_norm, layer_norm, rms_norm
from gptkern.ops.layer_norm import launch
from gptkern.testing import DTYPES, Call

# Narrow rows, the two widths beyond which rows are taken in chunks, and no power of two among them.
WIDTHS = (1, 2, 17, 63, 64, 65, 127, 200, 768, 1600, 8192, 8200, 16640)
_QUICK = 1600


def grid() -> list[Any]:
    """Every width in every dtype; of the wide ones, slow to interpret, one dtype in the quick run."""
    return [
        pytest.param(
            width, dtype, marks=pytest.mark.slow if width > _QUICK and dtype != torch.bfloat16 else ()
        )
        for width in WIDTHS
        for dtype in DTYPES
    ]


def leaf(
    *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0
) -> torch.Tensor:
    return (torch.randn(shape) * scale + shift).to(dtype).requires_grad_()


def call(op: Callable[..., Any], *shape: int, dtype: torch.dtype, **values: float) -> Call:
    """Arguments of any of the four norms."""
    tensors = [leaf(*shape, dtype=dtype, **values)]
    if op in (add_layer_norm, add_rms_norm):
        tensors.append(leaf(*shape, dtype=dtype, **values))
    tensors.append(leaf(shape[-1], dtype=dtype))
    if op in (layer_norm, add_layer_norm):
        tensors.append(leaf(shape[-1], dtype=dtype))
    return Call(tuple(tensors))


@contextmanager
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two programs at most, so that they go round more than once over few rows."""
    plan = launch.plan
    with monkeypatch.context() as patch:
        patch.setattr(launch, "plan", lambda *arguments: (2, plan(*arguments)[1]))
        _launch.forget()
        yield
    _launch.forget()


__all__ = [
    "WIDTHS",
    "add_layer_norm",
    "add_rms_norm",
    "call",
    "few_programs",
    "layer_norm",
    "leaf",
    "rms_norm",
]
