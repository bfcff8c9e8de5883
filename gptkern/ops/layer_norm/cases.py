"""Example calls of layer norm: the width of every launch row to compile, small ones to compute."""

from __future__ import annotations

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
from gptkern.ops.layer_norm.op import add_layer_norm, layer_norm

_HALF = (torch.bfloat16,)
_ALL = (torch.bfloat16, torch.float32)


def _norm(*shape: int, bias: bool = True) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        x = tensor(*shape, device=device, dtype=dtype)
        weight = tensor(shape[-1], device=device, dtype=dtype)
        return Call((x, weight, tensor(shape[-1], device=device, dtype=dtype) if bias else None))

    return make


def _add(*shape: int, dropout_p: float = 0.0, fp32_residual: bool = False) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        residual_dtype = torch.float32 if fp32_residual else dtype
        x = tensor(*shape, device=device, dtype=dtype)
        residual = tensor(*shape, device=device, dtype=residual_dtype)
        weight, bias = (tensor(shape[-1], device=device, dtype=residual_dtype) for _ in range(2))
        return Call((x, residual, weight, bias), {"dropout_p": dropout_p})

    return make


_WIDTHS = (64, 384, 768, 1600, 4096, 8192, 16384, 65536)
_ROWS = 16384

CASES = [
    *(Case(f"layer_norm {_ROWS} x {width}", layer_norm, _norm(_ROWS, width), _ALL) for width in _WIDTHS),
    *(
        Case(f"add_layer_norm {_ROWS} x {width}", add_layer_norm, _add(_ROWS, width), _HALF)
        for width in _WIDTHS
    ),
    *(
        Case(
            f"add_layer_norm {_ROWS} x {width}, dropout",
            add_layer_norm,
            _add(_ROWS, width, dropout_p=0.1),
            _HALF,
        )
        for width in _WIDTHS
    ),
    Case("layer_norm 1 x 768, no bias", layer_norm, _norm(1, 768, bias=False), _HALF),
    Case("add_layer_norm 64 x 768, fp32 residual", add_layer_norm, _add(64, 768, fp32_residual=True), _HALF),
]

CHECKS = [
    *(
        Case(f"layer_norm {shape}", layer_norm, _norm(*shape))
        for shape in ((3, 17), (2, 3, 64), (5, 1), (0, 8))
    ),
    Case("layer_norm without bias", layer_norm, _norm(4, 200, bias=False)),
    Case("add_layer_norm", add_layer_norm, _add(2, 3, 65)),
    Case("add_layer_norm, fp32 residual", add_layer_norm, _add(4, 127, fp32_residual=True)),
]
