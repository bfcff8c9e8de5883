"""Example calls of the perceptron: GPT-2's shapes to compile, small ones to compute."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
from gptkern.ops.gelu_mlp.op import gelu_mlp

_BOTH = (torch.bfloat16, torch.float32)


def inputs(
    tokens: int,
    width: int,
    hidden: int,
    *,
    gate: int = 1,
    bias: bool = True,
    transposed: bool = False,
    **settings: Any,
) -> Make:
    """Arguments of a perceptron; ``gate`` rows of the first weight for each hidden value."""

    def make(device: torch.device, dtype: torch.dtype) -> Call:
        def weight(rows: int, columns: int) -> torch.Tensor:
            shape = (columns, rows) if transposed else (rows, columns)
            value = tensor(*shape, device=device, dtype=dtype, scale=columns**-0.5)
            return value.t() if transposed else value

        x = tensor(tokens, width, device=device, dtype=dtype)
        b_fc = tensor(gate * hidden, device=device, dtype=dtype) if bias else None
        b_proj = tensor(width, device=device, dtype=dtype) if bias else None
        residual = tensor(tokens, width, device=device, dtype=dtype)
        args = (x, weight(gate * hidden, width), b_fc, weight(width, hidden), b_proj)
        return Call(args, {"residual": residual, **settings})

    return make


CASES = [
    *(
        Case(f"{name}, 16384 tokens x 768", gelu_mlp, inputs(16384, 768, 3072, activation=name), _BOTH)
        for name in ("gelu_tanh", "gelu", "relu", "silu")
    ),
    Case("recomputed", gelu_mlp, inputs(16384, 768, 3072, recompute=True)),
    Case("weights (in, out)", gelu_mlp, inputs(16384, 768, 3072, transposed=True)),
    Case("1600 wide", gelu_mlp, inputs(8192, 1600, 6400)),
    Case("64 tokens", gelu_mlp, inputs(64, 768, 3072)),
    Case("1024 tokens", gelu_mlp, inputs(1024, 768, 3072)),
    Case("no descriptors, no bias", gelu_mlp, inputs(8192, 1023, 4093, bias=False), _BOTH),
    Case("no descriptors", gelu_mlp, inputs(8192, 1023, 4093)),
]

CHECKS = [
    Case("no tokens", gelu_mlp, inputs(0, 5, 20)),
    Case("one of each", gelu_mlp, inputs(1, 1, 1)),
    *(
        Case(f"{name}, 33 tokens x 24", gelu_mlp, inputs(33, 24, 96, activation=name))
        for name in ("gelu_tanh", "gelu", "relu", "silu", "none")
    ),
    Case("recomputed", gelu_mlp, inputs(65, 17, 40, recompute=True)),
    Case("weights (in, out)", gelu_mlp, inputs(9, 16, 64, transposed=True)),
    Case("no bias", gelu_mlp, inputs(7, 16, 24, bias=False)),
]
