"""Example calls of the persistent step: GPT-2's sizes and every kind of weights, and a small one."""

from __future__ import annotations

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
from gptkern.ops._types import FP8
from gptkern.ops.decode_linear.cases import Packed, packed_matrix
from gptkern.ops.decode_step.op import persistent_step
from gptkern.ops.decode_step.weights import LayerWeights, Linear, StepWeights

# Rows are the narrow side, and narrow layers' tiles of 16 outputs are below wgmma's 64.
_N = frozenset({"persistent_step_kernel"})
_FP32 = (torch.float32,)


def _step(
    rows: int,
    width: int,
    heads: int,
    *,
    vocabulary: int = 50257,
    layers: int = 2,
    weights: Packed = None,
    fp8_cache: bool = False,
    post_norm: bool = False,
) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        def value(*shape: int) -> torch.Tensor:
            return tensor(*shape, device=device, dtype=dtype, requires_grad=False, scale=0.3)

        def linear(outputs: int, inputs: int) -> Linear:
            packed = None if weights is None else packed_matrix(outputs, inputs, device, *weights)
            return Linear(value(outputs, inputs) if packed is None else packed, value(outputs))

        def layer(index: int) -> LayerWeights:
            norms = [(value(width), value(width)) for _ in range(2)]
            qkv, out = linear(3 * width, width), linear(width, width)
            fc, proj = linear(4 * width, width), linear(width, 4 * width)
            first = None if post_norm and index == 0 else norms[0]
            return LayerWeights(first, qkv, out, norms[1], fc, proj, (width // heads) ** -0.5)

        model = StepWeights(
            value(vocabulary, width),
            value(1024, width),
            tuple(layer(index) for index in range(layers)),
            (value(width), value(width)),
            Linear(linear(vocabulary, width).weight),
            heads=heads,
            eps=1e-5,
            activation="gelu_tanh",
        )
        pages = 8
        caches = [value(layers, rows * pages, 128, heads, width // heads) for _ in range(2)]
        scales = None
        if fp8_cache:
            caches = [cache.to(FP8) for cache in caches]
            scales = (torch.ones(layers, heads, device=device), torch.ones(layers, heads, device=device))
        table = torch.arange(rows * pages, dtype=torch.int32, device=device).view(rows, pages)
        lens = torch.arange(rows, dtype=torch.int32, device=device) * 7
        live = torch.ones(1, dtype=torch.int32, device=device)
        tokens = torch.arange(rows, device=device)
        return Call((model, tokens, live, *caches, table, lens, scales))

    return make


CASES = [
    Case("124M", persistent_step, _step(1, 768, 12), mma_sync=_N),
    Case("355M", persistent_step, _step(1, 1024, 16), mma_sync=_N),
    Case("1.5B", persistent_step, _step(8, 1600, 25), mma_sync=_N),
    Case("GPT-1", persistent_step, _step(1, 768, 12, vocabulary=40478, post_norm=True), mma_sync=_N),
    Case("124M, fp32", persistent_step, _step(1, 768, 12), dtypes=_FP32),
    Case("124M, int8", persistent_step, _step(1, 768, 12, weights=("int8", 0, False)), mma_sync=_N),
    Case("124M, int4", persistent_step, _step(1, 768, 12, weights=("int4", 128, True)), mma_sync=_N),
    Case(
        "124M, fp8, fp8 cache",
        persistent_step,
        _step(1, 768, 12, weights=("fp8", 0, False), fp8_cache=True),
        mma_sync=_N,
        archs=(89, 90, 100),
    ),
]
CHECKS: list[Case] = []
