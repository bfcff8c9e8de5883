"""Example calls of the linear layers: GPT-2's shapes to compile, small ones to compute."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
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


CASES = [
    *(
        Case(f"{name}, 16384 tokens, 768 to 3072", linear_act, _act(16384, 768, 3072, name), _BOTH)
        for name in ("gelu_tanh", "gelu", "relu", "silu")
    ),
    Case("weights (in, out)", linear_act, _act(16384, 768, 3072, "gelu_tanh", True)),
    Case("1600 wide", linear_act, _act(8192, 1600, 6400, "gelu_tanh")),
    Case("64 tokens", linear_act, _act(64, 768, 3072, "gelu_tanh")),
    Case("1024 tokens", linear_act, _act(1024, 768, 3072, "gelu_tanh")),
    Case("1023 features, no descriptors", linear_act, _act(8192, 1023, 4093, "gelu_tanh"), _BOTH),
    Case("1023 features of 64 tokens", linear_act, _act(64, 1023, 253, "gelu_tanh")),
    Case("residual, 16384 tokens, 3072 to 768", linear_residual, _residual(16384, 3072, 768), _BOTH),
    Case("residual in fp32", linear_residual, _residual(16384, 3072, 768, wide=True)),
    Case("residual, weights (in, out)", linear_residual, _residual(16384, 3072, 768, True)),
    Case("residual, 1024 tokens", linear_residual, _residual(1024, 3072, 768)),
    Case("residual, 4096 tokens", linear_residual, _residual(4096, 3072, 768)),
    Case("residual, no descriptors", linear_residual, _residual(8192, 3071, 1021)),
    Case("qkv without a bias", linear, _plain(65536, 768, 2304)),
    Case("small layer", linear, _plain(512, 128, 384)),
    Case("4096 tokens, 128 to 384", linear, _plain(4096, 128, 384)),
]

CHECKS = [
    Case("one of each", linear_act, _act(1, 1, 1, "gelu_tanh")),
    Case("no tokens", linear_act, _act(0, 5, 7, "silu")),
    *(
        Case(f"{name}, 65 tokens, 17 to 33", linear_act, _act(65, 17, 33, name))
        for name in ("gelu_tanh", "gelu", "relu", "silu", "none")
    ),
    Case("weights (in, out)", linear_act, _act(9, 24, 40, "gelu_tanh", True)),
    Case("residual", linear_residual, _residual(33, 40, 24)),
    Case("residual, weights (in, out)", linear_residual, _residual(7, 16, 72, True)),
    Case("plain", linear, _plain(5, 72, 3)),
]
