"""Example calls of RMS norm: the widths of every launch row to compile, small ones to compute."""

from __future__ import annotations

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
from gptkern.ops.rms_norm.op import add_rms_norm, rms_norm


def _norm(*shape: int) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        x = tensor(*shape, device=device, dtype=dtype)
        return Call((x, tensor(shape[-1], device=device, dtype=dtype)))

    return make


def _add(*shape: int, dropout_p: float = 0.0) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        x, residual = (tensor(*shape, device=device, dtype=dtype) for _ in range(2))
        return Call((x, residual, tensor(shape[-1], device=device, dtype=dtype)), {"dropout_p": dropout_p})

    return make


_WIDTHS = (768, 2048, 4096, 65536)

CASES = [
    *(Case(f"rms_norm 16384 x {width}", rms_norm, _norm(16384, width)) for width in _WIDTHS),
    *(Case(f"add_rms_norm 16384 x {width}", add_rms_norm, _add(16384, width)) for width in _WIDTHS),
    Case("add_rms_norm 16384 x 4096, dropout", add_rms_norm, _add(16384, 4096, dropout_p=0.1)),
]

CHECKS = [
    *(Case(f"rms_norm {shape}", rms_norm, _norm(*shape)) for shape in ((3, 17), (2, 3, 64), (5, 1), (0, 8))),
    Case("add_rms_norm", add_rms_norm, _add(2, 3, 65)),
]
