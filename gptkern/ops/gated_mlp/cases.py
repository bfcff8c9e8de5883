"""Example calls of the gated perceptron: real models' shapes to compile, small ones to compute."""

from __future__ import annotations

from functools import partial

import torch

from gptkern.ops._cases import Case
from gptkern.ops.gated_mlp.op import gated_mlp
from gptkern.ops.gelu_mlp.cases import inputs

_BOTH = (torch.bfloat16, torch.float32)


_inputs = partial(inputs, gate=2, bias=False)

CASES = [
    *(
        Case(f"SmolLM2 135M, {name}", gated_mlp, _inputs(16384, 576, 1536, activation=name), _BOTH)
        for name in ("silu", "gelu_tanh", "gelu", "relu")
    ),
    Case("SmolLM2 135M, 512 tokens", gated_mlp, _inputs(512, 576, 1536)),
    Case("SmolLM2 135M, 1024 tokens", gated_mlp, _inputs(1024, 576, 1536)),
    Case("Llama 1B, 8192 tokens", gated_mlp, _inputs(8192, 2048, 8192)),
    Case("Qwen3 0.6B, 64 tokens", gated_mlp, _inputs(64, 1024, 3072)),
    Case("recomputed", gated_mlp, _inputs(16384, 576, 1536, recompute=True)),
    Case("biases, weights (in, out)", gated_mlp, _inputs(16384, 576, 1536, bias=True, transposed=True)),
    Case("no descriptors", gated_mlp, _inputs(8192, 1023, 2047, bias=True), _BOTH),
]

CHECKS = [
    Case("no tokens", gated_mlp, _inputs(0, 5, 20)),
    Case("one of each", gated_mlp, _inputs(1, 1, 1, bias=True)),
    *(
        Case(f"{name}, 33 tokens x 24", gated_mlp, _inputs(33, 24, 48, bias=True, activation=name))
        for name in ("silu", "gelu_tanh", "gelu", "relu", "none")
    ),
    Case("recomputed", gated_mlp, _inputs(65, 17, 40, recompute=True)),
    Case("weights (in, out)", gated_mlp, _inputs(9, 16, 64, transposed=True)),
    Case("ragged tiles", gated_mlp, _inputs(70, 9, 75)),
]
