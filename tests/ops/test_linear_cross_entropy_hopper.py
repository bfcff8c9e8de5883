"""The loss's kernels for Hopper as they are launched; tests/ptx/test_ptx_loss_hopper.py executes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptkern.ops._launch import Launch, record
from gptkern.ops.linear_cross_entropy import linear_cross_entropy

HOPPER = ["logits_hopper", "loss_kernel", "dhidden_hopper", "dweight_hopper"]
OTHER = ["logits_kernel", "loss_kernel", "dhidden_kernel", "dweight_kernel"]


def launched(
    arch: int, tokens: int = 65536, width: int = 768, vocab: int = 50257, *, room: int = 0,
    dtype: torch.dtype = torch.bfloat16, bias: bool = False, classes: bool = False, **settings: Any,
) -> list[Launch]:  # fmt: skip
    """A chunk's launches, forward and backward."""

    def matrix(rows: int) -> torch.Tensor:
        whole = torch.empty(rows, width + room, device="meta", dtype=dtype)
        return whole[:, :width].requires_grad_()

    targets = torch.empty(tokens, device="meta", dtype=torch.int64)
    if bias:
        settings["bias"] = torch.empty(vocab, device="meta", dtype=torch.float32)
    if classes:
        settings["ce_weight"] = torch.empty(vocab, device="meta")
    with record(arch) as launches:
        loss = linear_cross_entropy(matrix(tokens), matrix(vocab), targets, **settings)
        found = loss if isinstance(loss, torch.Tensor) else loss.loss
        found.sum().backward()
    return launches[-4:]


def names(launches: list[Launch]) -> list[str]:
    return [launch.name for launch in launches]


SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp16": {"dtype": torch.float16},
    "bias": {"bias": True},
    "smoothed, with z-loss": {"label_smoothing": 0.1, "z_loss": 1e-4},
    "rows apart": {"room": 8},
    "a sum": {"reduction": "sum"},
}  # fmt: skip
NOT_SERVED: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "soft cap": {"softcap": 30.0},
    "class weights": {"classes": True},
    "accuracy": {"return_token_accuracy": True},
    "short sums": {"width": 192},
    "width no multiple of 16 bytes": {"width": 770},
    "rows 2 bytes from a whole 16": {"room": 1},
    "few words": {"vocab": 255},
}


@pytest.mark.parametrize("spec", SERVED.values(), ids=SERVED)
def test_calls_that_they_serve(spec: dict[str, Any]) -> None:
    assert [names(launched(arch, **spec)) for arch in (80, 90, 100)] == [OTHER, HOPPER, OTHER]


@pytest.mark.parametrize("spec", NOT_SERVED.values(), ids=NOT_SERVED)
def test_calls_that_they_leave_to_the_other_kernels(spec: dict[str, Any]) -> None:
    assert names(launched(90, **spec)) == OTHER


@pytest.mark.parametrize("tokens", [1, 127, 4096])
def test_a_loss_does_not_ask_for_the_number_of_tokens(tokens: int) -> None:
    assert names(launched(90, tokens))[0] == "logits_hopper"


def test_weight_gradients_that_are_the_other_kernel_s() -> None:
    """A sum that is shorter than the ring, and an upstream gradient of each token."""
    assert names(launched(90, 255)) == [*HOPPER[:3], "dweight_kernel"]
    assert names(launched(90, 256)) == HOPPER
    assert names(launched(90, reduction="none")) == [*HOPPER[:3], "dweight_kernel"]


def test_tiles_and_grid() -> None:
    logits, loss, dhidden, dweight = launched(90)
    assert all(launch.grid == (132,) for launch in (logits, dhidden, dweight))
    hidden, weight = logits.args[:2]
    assert (hidden.shape, hidden.block_shape) == ([8192, 768], [64, 64])
    assert (weight.shape, weight.block_shape) == ([50257, 768], [256, 64])
    for launch, blocks in ((dhidden, ([64, 64], [64, 256])), (dweight, ([64, 64], [64, 256]))):
        exp, right = launch.args[:2]
        assert (exp.shape, exp.block_shape, right.block_shape) == ([8192, 197 * 256], *blocks)
    assert loss.arguments["factor_ptr"].shape == (197, 8192)
    # The kernel for all GPUs reads tiles of 256 words as well.
    assert launched(90, 200)[3].arguments["TILE"] == 256


def test_without_gradients_nothing_of_a_tile_is_stored() -> None:
    hidden, weight = (torch.empty(rows, 768, device="meta", dtype=torch.float16) for rows in (4096, 50257))
    with record(90) as launches:
        linear_cross_entropy(hidden, weight, torch.empty(4096, device="meta", dtype=torch.int64))
    assert names(launches)[0] == "logits_hopper"
    assert not launches[0].arguments["KEEP_EXP"] and launches[0].arguments["exp_ptr"].numel() == 0
