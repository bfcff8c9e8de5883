"""Sample calls of the linear layers: GPT-2's shapes to compile, small ones to compute."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._samples import Call, Make, Sample, tensor
from gptkern.ops.linear.op import linear, linear_act, linear_residual

_BOTH = (torch.bfloat16, torch.float32)


def _act(tokens: int, width: int, features: int, activation: str, transposed: bool = False) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        x = tensor(tokens, width, device=device, dtype=dtype)
        weight = _weight(features, width, device, dtype, transposed)
        bias = tensor(features, device=device, dtype=dtype)
        return Call((x, weight, bias), {"activation": activation})

    return make


def _residual(tokens: int, width: int, features: int, transposed: bool = False, wide: bool = False) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        x = tensor(tokens, width, device=device, dtype=dtype)
        weight = _weight(features, width, device, dtype, transposed)
        bias = tensor(features, device=device, dtype=dtype)
        residual = tensor(tokens, features, device=device, dtype=torch.float32 if wide else dtype)
        return Call((x, weight, bias, residual))

    return make


def _plain(tokens: int, width: int, features: int, **settings: Any) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        x = tensor(tokens, width, device=device, dtype=dtype)
        return Call((x, _weight(features, width, device, dtype, **settings)))

    return make


def _weight(
    features: int, width: int, device: torch.device, dtype: torch.dtype, transposed: bool = False
) -> torch.Tensor:
    """(features, width), by columns in memory where ``transposed``: GPT-2's checkpoints."""
    shape = (width, features) if transposed else (features, width)
    weight = tensor(*shape, device=device, dtype=dtype, scale=width**-0.5)
    return weight.t() if transposed else weight


SAMPLES = [
    *(
        Sample(f"{name}, 16384 tokens, 768 to 3072", linear_act, _act(16384, 768, 3072, name), _BOTH)
        for name in ("gelu_tanh", "gelu", "relu", "silu")
    ),
    Sample("weights (in, out)", linear_act, _act(16384, 768, 3072, "gelu_tanh", True)),
    Sample("1600 wide", linear_act, _act(8192, 1600, 6400, "gelu_tanh")),
    Sample("64 tokens", linear_act, _act(64, 768, 3072, "gelu_tanh")),
    Sample("1024 tokens", linear_act, _act(1024, 768, 3072, "gelu_tanh")),
    Sample("1023 features, no descriptors", linear_act, _act(8192, 1023, 4093, "gelu_tanh"), _BOTH),
    Sample("1023 features of 64 tokens", linear_act, _act(64, 1023, 253, "gelu_tanh")),
    Sample("residual, 16384 tokens, 3072 to 768", linear_residual, _residual(16384, 3072, 768), _BOTH),
    Sample("residual in fp32", linear_residual, _residual(16384, 3072, 768, wide=True)),
    Sample("residual, weights (in, out)", linear_residual, _residual(16384, 3072, 768, True)),
    Sample("residual, 1024 tokens", linear_residual, _residual(1024, 3072, 768)),
    Sample("residual, 4096 tokens", linear_residual, _residual(4096, 3072, 768)),
    Sample("residual, no descriptors", linear_residual, _residual(8192, 3071, 1021)),
    Sample("qkv without a bias", linear, _plain(65536, 768, 2304)),
    Sample("small layer", linear, _plain(512, 128, 384)),
]

CHECKS = [
    Sample("one of each", linear_act, _act(1, 1, 1, "gelu_tanh")),
    Sample("no tokens", linear_act, _act(0, 5, 7, "silu")),
    *(
        Sample(f"{name}, 65 tokens, 17 to 33", linear_act, _act(65, 17, 33, name))
        for name in ("gelu_tanh", "gelu", "relu", "silu", "none")
    ),
    Sample("weights (in, out)", linear_act, _act(9, 24, 40, "gelu_tanh", True)),
    Sample("residual", linear_residual, _residual(33, 40, 24)),
    Sample("residual, weights (in, out)", linear_residual, _residual(7, 16, 72, True)),
    Sample("plain", linear, _plain(5, 72, 3)),
]
