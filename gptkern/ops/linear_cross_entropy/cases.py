"""Example calls of the fused head and loss: GPT-2's shapes to compile, small ones to compute."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
from gptkern.ops.linear_cross_entropy.op import linear_cross_entropy

_BOTH = (torch.bfloat16, torch.float32)


def _inputs(
    tokens: int, width: int, vocab: int, *, bias: bool = False, classes: bool = False, **settings: Any
) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        hidden = tensor(tokens, width, device=device, dtype=dtype)
        weight = tensor(vocab, width, device=device, dtype=dtype, scale=width**-0.5)
        targets = torch.randint(vocab, (tokens,), device=device)
        extras = {"bias": tensor(vocab, device=device, dtype=dtype)} if bias else {}
        if classes:
            extras["ce_weight"] = torch.ones(vocab, device=device)
        return Call((hidden, weight, targets), {**settings, **extras})

    return make


CASES = [
    Case("65536 tokens x 768, GPT-2's vocabulary", linear_cross_entropy, _inputs(65536, 768, 50257), _BOTH),
    Case("8192 tokens x 1600", linear_cross_entropy, _inputs(8192, 1600, 50257)),
    Case("a loss a token", linear_cross_entropy, _inputs(8192, 768, 50257, reduction="none")),
    Case("GPT-J's head, with a bias", linear_cross_entropy, _inputs(8192, 4096, 50400, bias=True)),
    Case(
        "smoothed, with z-loss and a bias",
        linear_cross_entropy,
        _inputs(8192, 1280, 50257, bias=True, z_loss=1e-4, label_smoothing=0.1),
    ),
    Case(
        "class weights, accuracy",
        linear_cross_entropy,
        _inputs(8192, 1280, 50257, classes=True, return_token_accuracy=True),
    ),
    Case(
        "soft cap, class weights, accuracy",
        linear_cross_entropy,
        _inputs(8192, 2304, 256000, classes=True, softcap=30.0, return_token_accuracy=True),
    ),
    Case(
        "all at once",
        linear_cross_entropy,
        _inputs(
            8192,
            1024,
            50257,
            bias=True,
            classes=True,
            softcap=30.0,
            z_loss=1e-4,
            label_smoothing=0.1,
            return_token_accuracy=True,
        ),
        _BOTH,
    ),
]

CHECKS = [
    Case("5 tokens x 24, 11 words", linear_cross_entropy, _inputs(5, 24, 11)),
    Case("133 tokens x 40, 517 words", linear_cross_entropy, _inputs(133, 40, 517)),
    Case("a loss a token", linear_cross_entropy, _inputs(9, 16, 300, reduction="none")),
    Case("soft cap", linear_cross_entropy, _inputs(9, 16, 300, softcap=2.0)),
    Case("class weights", linear_cross_entropy, _inputs(9, 16, 300, classes=True, label_smoothing=0.1)),
    Case("with a bias", linear_cross_entropy, _inputs(9, 16, 300, bias=True)),
    Case(
        "smoothed sum with z-loss",
        linear_cross_entropy,
        _inputs(17, 33, 70, reduction="sum", z_loss=1e-3, label_smoothing=0.1),
    ),
]
