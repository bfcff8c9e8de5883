"""Sample calls of the decode step's linear layers, at GPT-2's shapes and at small ones."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._samples import Call, Make, Sample, tensor
from gptkern.ops.decode_linear.op import decode_linear, decode_qkv

# Rows are the narrow side, and narrow layers' tiles of 16 outputs are below wgmma's 64.
_N = frozenset({"decode_linear_kernel"})
_FP32 = (torch.float32,)


def _linear(rows: int, width: int, outputs: int, *, norm: bool = True, activation: str = "none") -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        def value(*shape: int) -> torch.Tensor:
            return tensor(*shape, device=device, dtype=dtype, requires_grad=False, scale=0.3)

        options: dict[str, Any] = {"activation": activation}
        if norm:
            options["norm"] = (value(width), value(width), 1e-5)
        else:
            options["residual"] = value(rows, outputs)
        return Call((value(rows, width), value(outputs, width), value(outputs)), options)

    return make


def _qkv(rows: int, width: int, heads: int, *, post_norm: bool = False) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        def value(*shape: int) -> torch.Tensor:
            return tensor(*shape, device=device, dtype=dtype, requires_grad=False, scale=0.3)

        options: dict[str, Any] = {"norm": (value(width), value(width), 1e-5)}
        if post_norm:
            options["normed_out"] = value(rows, width)
        caches = [value(rows, 16, heads, width // heads) for _ in range(2)]
        slots = torch.arange(rows, device=device) * 5
        return Call((value(rows, width), value(3 * width, width), value(3 * width), *caches, slots), options)

    return make


_SIZES = {"124M": (768, 12), "355M": (1024, 16), "774M": (1280, 20), "1.5B": (1600, 25)}
SAMPLES = [
    sample
    for size, (width, heads) in _SIZES.items()
    for sample in (
        Sample(f"{size} qkv", decode_qkv, _qkv(1, width, heads), mma_sync=_N),
        Sample(f"{size} out", decode_linear, _linear(1, width, width, norm=False), mma_sync=_N),
        Sample(
            f"{size} fc", decode_linear, _linear(1, width, 4 * width, activation="gelu_tanh"), mma_sync=_N
        ),
        Sample(f"{size} proj", decode_linear, _linear(1, 4 * width, width, norm=False), mma_sync=_N),
    )
] + [
    Sample("124M head", decode_linear, _linear(1, 768, 50257)),
    Sample("124M head, 64 rows", decode_linear, _linear(64, 768, 50257)),
    Sample("124M qkv, 64 rows, post-norm", decode_qkv, _qkv(64, 768, 12, post_norm=True), mma_sync=_N),
    Sample("1.5B proj, 64 rows", decode_linear, _linear(64, 6400, 1600, norm=False), mma_sync=_N),
    Sample("124M out, fp32", decode_linear, _linear(1, 768, 768, norm=False), dtypes=_FP32),
    Sample("124M fc, fp32, 64 rows", decode_linear, _linear(64, 768, 3072), dtypes=_FP32),
]
CHECKS = [
    Sample("norm, 3 x 40 to 20", decode_linear, _linear(3, 40, 20)),
    Sample("residual, 17 x 100 to 33", decode_linear, _linear(17, 100, 33, norm=False, activation="relu")),
    Sample("qkv, 5 x 40", decode_qkv, _qkv(5, 40, 2)),
]
