"""Faults that a tolerance of 1e-5 hides, as their terms are small in the numbers at hand: each is seen."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from exact_faults import planted

from gptkern import backend, ops
from gptkern.ops._device import online_softmax, row_statistics
from gptkern.ops.decode_attention.kernels import combine_splits
from gptkern.ops.decode_linear.kernels import row_moments, sum_splits
from gptkern.ops.flash_attention.kernels import flash_attention_forward
from gptkern.ops.flash_attention.kernels_backward import flash_attention_dq
from gptkern.ops.layer_norm.kernels import norm_backward_kernel
from gptkern.ops.linear.kernels import column_sum, linear_dw, product_tile
from gptkern.ops.linear_cross_entropy.kernels import loss_kernel
from gptkern.testing import exact

pytestmark = pytest.mark.kernels


@pytest.fixture(autouse=True)
def interpreted(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("kernels are compiled here, not interpreted")


Draw = Callable[..., torch.Tensor]
Run = Callable[[Draw, bool], list[torch.Tensor]]


def _attention(draw: Draw, real: bool) -> list[torch.Tensor]:
    """Queries that in effect see the last keys alone, unless the numbers are elements."""
    q, k, v = (draw(1, n, 1, 16, seed=seed) for seed, n in ((1, 8), (2, 140), (3, 140)))
    if real:
        q.abs_()
        k[:, :136] -= 12.0
        k[:, 136:] += 1.0
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with nullcontext() if real else exact.algebra():
        out = ops.flash_attention(*inputs, causal=False, scale=0.25)
        return [out, *torch.autograd.grad([out], inputs, [draw(1, 8, 1, 16, seed=4)])]


def _reversed_attention(draw: Draw, real: bool) -> list[torch.Tensor]:
    """The largest scores come first, so that the maximum never moves again."""
    q, k, v = (draw(1, n, 1, 16, seed=seed) for seed, n in ((1, 8), (2, 140), (3, 140)))
    if real:
        q = q.abs()
        k[:, 0] += 4.0
    with nullcontext() if real else exact.algebra():
        return [ops.flash_attention(q, k, v, causal=False, scale=0.25)]


def _rms(draw: Draw, real: bool) -> list[torch.Tensor]:
    x, weight = draw(5, 20, seed=1), draw(20, seed=2)
    with nullcontext() if real else exact.algebra():
        return [ops.rms_norm(x, weight, 1e-9)]


def _layer_norm_grads(draw: Draw, real: bool) -> list[torch.Tensor]:
    x, weight, bias = (
        draw(*shape, seed=seed).requires_grad_() for seed, shape in ((1, (9, 24)), (2, (24,)), (3, (24,)))
    )
    grad = draw(9, 24, seed=4)
    if real:
        grad -= (grad * weight.detach()).mean(-1, keepdim=True) / weight.detach()
    with nullcontext() if real else exact.algebra():
        out = ops.layer_norm(x, weight, bias)
        return list(torch.autograd.grad([out], [x, weight, bias], [grad]))


def _linear_grads(draw: Draw, real: bool) -> list[torch.Tensor]:
    """The last tokens are next to nothing."""
    x, weight, bias, grad = (
        draw(300, 20, seed=1),
        draw(24, 20, seed=2),
        draw(24, seed=3),
        draw(300, 24, seed=4),
    )
    if real:
        grad[256:] *= 1e-9
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    with nullcontext() if real else exact.algebra():
        out = ops.linear(*inputs)
        return [out, *torch.autograd.grad([out], inputs, [grad])]


def _linear(draw: Draw, real: bool) -> list[torch.Tensor]:
    x, weight = draw(30, 40, seed=1), draw(24, 40, seed=2)
    if real:
        x[:, 32:] *= 1e-9
    with nullcontext() if real else exact.algebra():
        return [ops.linear(x, weight)]


def _decode_linear(draw: Draw, real: bool) -> list[torch.Tensor]:
    x, weight = draw(2, 160, seed=1), draw(20, 160, seed=2)
    if real:
        weight[:, :128] *= 1e-9  # the first part
        x[:, ::2] = -x[:, 1::2]  # sums that are next to nothing
        x = (64 * x).round() / 64
    norm = (draw(160, seed=3), draw(160, seed=4), 1e-5)
    with nullcontext() if real else exact.algebra():
        return [ops.decode_linear(x, weight, norm=norm)]


def _decode_attention(draw: Draw, real: bool) -> list[torch.Tensor]:
    q, k, v = draw(1, 1, 16, seed=1), draw(19, 16, 1, 16, seed=2), draw(19, 16, 1, 16, seed=3)
    if real:
        q = q.abs()
        k[:16] -= 12.0
    with nullcontext() if real else exact.algebra():
        table, lens = torch.arange(19, dtype=torch.int32)[None], torch.tensor([300], dtype=torch.int32)
        return [ops.decode_attention(q, k, v, table, lens, scale=0.25)]


def _cross_entropy(draw: Draw, real: bool) -> list[torch.Tensor]:
    hidden, weight = draw(5, 20, seed=1), draw(140, 20, seed=2)
    if real:
        hidden = hidden.abs()
        weight[:128] -= 4.0
    with nullcontext() if real else exact.algebra():
        return [
            ops.linear_cross_entropy(
                hidden, weight, torch.tensor([130, 131, 132, 139, 138]), reduction="none"
            )
        ]


class Fault(NamedTuple):
    """One fault: where, what for what, and the call that meets it."""

    kernel: Any
    old: str
    new: str
    run: Run


FAULTS = {
    # A lost tile.
    "attention: the first keys": Fault(
        flash_attention_forward,
        "tl.range(first, end, BLOCK_N)",
        "tl.range(first + BLOCK_N, end, BLOCK_N)",
        _attention,
    ),
    "dq: the first keys": Fault(
        flash_attention_dq,
        "tl.range(first, end, BLOCK_N)",
        "tl.range(first + BLOCK_N, end, BLOCK_N)",
        _attention,
    ),
    "linear: the last inputs": Fault(
        product_tile,
        "(offs_m < M)[:, None] & inside[None, :]",
        "(offs_m < M)[:, None] & inside[None, :] & (k < k_end - 1)",
        _linear,
    ),
    "weight gradient: the last tokens": Fault(
        linear_dw,
        "tl.minimum(split * share + share, k_tiles)",
        "tl.minimum(split * share + share, k_tiles - 1)",
        _linear_grads,
    ),
    "bias gradient: the last rows": Fault(
        column_sum, "(offs_m < last)", "(offs_m < last - tl.where(last > 64, last % 64, 0))", _linear_grads
    ),
    "decode attention: the first split": Fault(
        combine_splits,
        "total += tl.sum(rounded_product(weights, sums), 0)",
        "total += tl.sum(tl.where(splits > first, rounded_product(weights, sums), 0.0), 0)",
        _decode_attention,
    ),
    # A term twice.
    "RMS norm: eps": Fault(
        row_statistics, "tl.rsqrt(variance + eps)", "tl.rsqrt(variance + eps + eps)", _rms
    ),
    "decode product: the first part": Fault(
        sum_splits, "for part in range(SPLIT_K):", "for part in (0, *range(SPLIT_K)):", _decode_linear
    ),
    "cross-entropy: a tile's sum": Fault(
        loss_kernel,
        "tl.sum(rounded_product(sums, tl.exp(maxima - shift[:, None])), 1)",
        "tl.sum(sums * tl.exp(maxima - shift[:, None]) * tl.where(tiles == 0, 2.0, 1.0)[None, :], 1)",
        _cross_entropy,
    ),
    # A scale left out.
    "attention: the rescale": Fault(
        flash_attention_forward, "acc * rescale[:, None]", "acc", _reversed_attention
    ),
    "attention: the sum's rescale": Fault(
        online_softmax, "row_sum * rescale", "row_sum", _reversed_attention
    ),
    "layer norm: the mean of the gradient": Fault(
        norm_backward_kernel, "(tl.sum(grad, axis=1) / WIDTH)", "tl.sum(grad, axis=1)", _layer_norm_grads
    ),
    "moments: the mean of a row's sum": Fault(
        row_moments, "mean = tl.sum(sums, 1) / K", "mean = tl.sum(sums, 1)", _decode_linear
    ),
}


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_that_tolerance_hides(name):
    kernel, old, new, run = FAULTS[name]
    right = run(exact.numbers, False)
    with backend("reference"):
        plain = run(numbers, True)
    with planted(kernel, old, new):
        for a, b in zip(run(numbers, True), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        wrong = run(exact.numbers, False)
    with pytest.raises(AssertionError, match="elements differ"):
        for a, b in zip(wrong, right, strict=True):
            exact.assert_same(a, b)
    for a, b in zip(run(exact.numbers, False), right, strict=True):
        exact.assert_same(a, b)
