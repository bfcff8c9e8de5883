"""The loss without kernels: gradients made in the forward pass, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gptkern
from gptkern.ops import linear_cross_entropy
from gptkern.ops.linear_cross_entropy import chunked, reference

TOKENS, WIDTH, VOCAB, CHUNK = 50, 24, 20, 7
SETTINGS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"z_loss": 1e-2, "label_smoothing": 0.3, "softcap": 3.0},
    {"bias": True, "ce_weight": True, "z_loss": 1e-2},
    {"reduction": "none", "z_loss": 1e-2},
]
IDS = ["mean", "smoothed-sum", "capped", "classes", "per-token"]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reference, "CHUNK_LOGITS", VOCAB * CHUNK)
    with gptkern.backend("reference"):
        yield


def leaves(dtype: torch.dtype, settings: dict[str, Any]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Hidden states, a weight and maybe a bias, all of which need gradients; the other arguments."""
    draw = torch.Generator().manual_seed(0)
    found = [torch.randn(*size, WIDTH, generator=draw) for size in ((5, TOKENS // 5), (VOCAB,))]
    options = dict(settings)
    if options.pop("bias", False):
        found.append(torch.randn(VOCAB, generator=draw))
    if options.pop("ce_weight", False):
        options["ce_weight"] = torch.rand(VOCAB, generator=draw).to(dtype)
    options["targets"] = torch.randint(VOCAB, (5, TOKENS // 5), generator=draw)
    options["targets"].view(-1)[::4] = -100
    return [leaf.to(dtype).requires_grad_() for leaf in found], options


def loss_of(leaves: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    bias = leaves[2] if len(leaves) > 2 else None
    loss = linear_cross_entropy(*leaves[:2], bias=bias, **options)
    assert isinstance(loss, torch.Tensor)
    return loss


def value_and_grads(
    dtype: torch.dtype, settings: dict[str, Any], compute: torch.dtype | None = None
) -> list[torch.Tensor]:
    """The loss and the gradients of inputs that were rounded to ``dtype``, by products in ``compute``."""
    given, options = leaves(dtype, settings)
    given = [leaf.detach().to(compute or dtype).requires_grad_() for leaf in given]
    loss = loss_of(given, options)
    loss.backward(torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape).to(loss.dtype))
    assert all(leaf.grad is not None and leaf.grad.dtype == leaf.dtype for leaf in given)
    return [loss.detach(), *(leaf.grad for leaf in given if leaf.grad is not None)]


def assert_accurate(found: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Within twice the error of one chunk alone, plus one unit in the last place of the scale."""
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        error, allowed = ((value.double() - right).abs().max() for value in (ours, theirs))
        assert error <= 2 * allowed + torch.finfo(ours.dtype).eps * right.abs().max()


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_chunks_give_the_loss_and_gradients_of_the_whole(
    dtype: torch.dtype, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = value_and_grads(dtype, settings)
    monkeypatch.setattr(reference, "CHUNK_LOGITS", VOCAB * TOKENS)
    whole = value_and_grads(dtype, settings)
    exact = value_and_grads(dtype, settings, torch.float64)
    assert_accurate(found, whole, exact)


class Products(TorchDispatchMode):
    """The number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::mm.out")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("reduction", "in_backward"), [("mean", 0), ("sum", 0), ("none", 3)])
def test_each_logit_is_multiplied_out_once(reduction: str, in_backward: int) -> None:
    given, options = leaves(torch.float32, {"reduction": reduction})
    chunks = -(-TOKENS // CHUNK)
    with Products() as products:
        loss = loss_of(given, options)
        assert products.count == (3 - in_backward or 1) * chunks
        before = products.count
        loss.sum().backward()
        assert products.count - before == in_backward * chunks


def test_nothing_is_made_that_nobody_needs() -> None:
    given, options = leaves(torch.float32, {"bias": True})
    both = torch.autograd.grad(loss_of(given, options), given)
    for place, alone in enumerate(given):
        inputs = [leaf if leaf is alone else leaf.detach() for leaf in given]
        with Products() as products:
            (found,) = torch.autograd.grad(loss_of(inputs, options), alone)
        assert torch.equal(found, both[place])
        assert products.count == (2 if place < 2 else 1) * -(-TOKENS // CHUNK)
    with torch.no_grad(), Products() as products:
        assert torch.equal(loss_of(given, options), loss_of(given, options).detach())
    assert products.count == 2 * -(-TOKENS // CHUNK)


def test_the_backward_pass_may_run_twice_and_scales() -> None:
    given, options = leaves(torch.float32, {})
    loss = loss_of(given, options)
    once = torch.autograd.grad(loss, given, torch.tensor(3.0), retain_graph=True)
    loss.backward(torch.tensor(3.0), retain_graph=True)
    loss.backward(torch.tensor(1.5))
    for leaf, grad in zip(given, once, strict=True):
        torch.testing.assert_close(leaf.grad, 1.5 * grad)


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=IDS[:4])
def test_numerical_gradients_of_both_orders(settings: dict[str, Any]) -> None:
    given, options = leaves(torch.float64, settings)
    assert torch.autograd.gradcheck(lambda *t: loss_of(list(t), options), given, fast_mode=True)
    few = [given[0][:1].detach().requires_grad_(), *given[1:]]
    options["targets"] = options["targets"][:1]
    assert torch.autograd.gradgradcheck(lambda *t: loss_of(list(t), options), few, fast_mode=True)


def test_autocast_and_the_dtypes_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def under_autocast() -> list[torch.Tensor]:
        given, options = leaves(torch.float32, {"bias": True})
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(given, options)
        assert loss.dtype == torch.float32
        return [loss.detach(), *torch.autograd.grad(loss, given)]

    found = under_autocast()
    monkeypatch.setattr(chunked, "WIDE_RANGE", ())
    recomputed = under_autocast()
    assert {value.dtype for value in (*found, *recomputed)} == {torch.float32}
    given, options = leaves(torch.float64, {"bias": True})
    loss = loss_of(given, options)
    assert_accurate(found, recomputed, [loss.detach(), *torch.autograd.grad(loss, given)])


def test_a_loss_scale_holds_small_gradients_in_float16() -> None:
    """Without it they round to 0 in float16: it must be in the products before they are rounded."""
    given, options = leaves(torch.float16, {"reduction": "sum"})
    options["ce_weight"] = torch.full((VOCAB,), 2.0**-24)
    wide = [leaf.detach().double().requires_grad_() for leaf in given]
    exact = torch.autograd.grad(loss_of(wide, options), wide)
    scaled = torch.autograd.grad(loss_of(given, options) * 2.0**20, given)
    for found, right in zip(scaled, exact, strict=True):
        error = (found.double() * 2.0**-20 - right).abs().max()
        assert error <= 2**-8 * right.abs().max()


def test_what_is_asked_for_beside_the_loss() -> None:
    given, options = leaves(torch.float32, {"z_loss": 1e-2})
    asked = linear_cross_entropy(*given, **options, return_z_loss=True, return_token_accuracy=True)
    with torch.no_grad():
        plain = linear_cross_entropy(*given, **options, return_z_loss=True, return_token_accuracy=True)
    for ours, theirs in zip(asked, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert asked[0].requires_grad and not asked[1].requires_grad and not asked[2].requires_grad
