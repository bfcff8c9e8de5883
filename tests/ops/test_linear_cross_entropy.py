"""The fused head and loss against float64, its gradients, its memory, its refusals."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gptkern
from gptkern.ops import _launch, linear_cross_entropy
from gptkern.ops.linear_cross_entropy import launch, reference
from gptkern.testing import Call, check_values

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SHAPES = [(2, 8, 5), (5, 24, 11), (130, 72, 300), (33, 64, 257)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "z_loss": 1e-2},
    {"reduction": "mean", "z_loss": 1e-3, "label_smoothing": 0.3, "ignore_index": 2},
]
IDS = ["mean", "smoothed-sum", "per-token", "all"]
CAPPED: list[dict[str, Any]] = [
    {"softcap": 3.0},
    {"reduction": "none", "softcap": 5.0, "z_loss": 1e-2, "label_smoothing": 0.2},
]


def inputs(tokens: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * 3 * width**-0.5).to(dtype)
    targets = torch.randint(vocab, (tokens,), device=device)
    targets[::4] = -100
    return hidden, weight, targets


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The unfused expression, as one writes it: logits in the inputs' dtype, the loss in fp32."""
    z_loss, softcap = settings.pop("z_loss", 0.0), settings.pop("softcap", None)
    ignore, reduction = settings.setdefault("ignore_index", -100), settings.pop("reduction", "mean")
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    classes = settings.pop("ce_weight", None)
    classes = classes if classes is None else classes.to(logits.dtype)
    loss = F.cross_entropy(logits, targets, classes, reduction=reduction, **settings)
    squares = z_loss * logits.logsumexp(-1).square() * (targets != ignore)
    if reduction == "mean":
        return loss + squares.sum() / (targets != ignore).sum()
    return loss + (squares.sum() if reduction == "sum" else squares)


def value_and_grads(
    function: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    **settings: Any,
) -> list[torch.Tensor]:
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    loss = function(hidden, weight, targets, **settings)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), device=loss.device).view(loss.shape)
    loss.backward(upstream.to(loss.dtype))
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def assert_accurate(found: torch.Tensor, plain_result: torch.Tensor, exact: torch.Tensor) -> None:
    """Within twice the plain expression's error, plus one unit in the last place of the scale."""
    scale = exact.abs().max().item() if exact.numel() else 0.0
    allowed = 2 * (plain_result.double() - exact).abs().max() + torch.finfo(found.dtype).eps * scale
    error = (found.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_against_float64(
    dtype: torch.dtype, shape: tuple[int, int, int], settings: dict[str, Any], device: torch.device
) -> None:
    hidden, weight, targets = inputs(*shape, dtype, device)
    if settings.get("ignore_index", -100) != -100:
        targets[targets == -100] = 0
    if (targets == settings.get("ignore_index", -100)).all():
        targets[:] = 0
    exact = value_and_grads(plain, hidden.double(), weight.double(), targets, **settings)
    unfused = value_and_grads(plain, hidden, weight, targets, **settings)
    found = value_and_grads(linear_cross_entropy, hidden, weight, targets, **settings)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == found[2].dtype == dtype
    for a, b, c in zip(found, unfused, exact, strict=True):
        assert_accurate(a, b, c)


@pytest.mark.parametrize("settings", CAPPED, ids=["capped", "capped-all"])
@pytest.mark.parametrize("shape", [(5, 24, 11), (130, 72, 300)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.usefixtures("on_device")
def test_soft_cap(
    dtype: torch.dtype, shape: tuple[int, int, int], settings: dict[str, Any], device: torch.device
) -> None:
    hidden, weight, targets = inputs(*shape, dtype, device)
    exact = value_and_grads(plain, hidden.double(), weight.double(), targets, **settings)
    unfused = value_and_grads(plain, hidden, weight, targets, **settings)
    for a, b, c in zip(
        value_and_grads(linear_cross_entropy, hidden, weight, targets, **settings),
        unfused,
        exact,
        strict=True,
    ):
        assert_accurate(a, b, c)


@pytest.mark.usefixtures("on_device")
def test_soft_cap_and_smoothing_where_exponentials_vanish(device: torch.device) -> None:
    """Logits 180 below a tile's highest: exp gives 0, and the cap's derivative is still that of the logit."""
    hidden = torch.tensor([[1.0]], dtype=torch.float16, device=device)
    weight = torch.tensor([[90.0], [-90.0], [-40.0]], dtype=torch.float16, device=device)
    targets = torch.zeros(1, dtype=torch.int64, device=device)
    settings = {"softcap": 100.0, "label_smoothing": 0.5}
    exact = value_and_grads(plain, hidden.double(), weight.double(), targets, **settings)
    found = value_and_grads(linear_cross_entropy, hidden, weight, targets, **settings)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=0)


def test_one_word_one_column(device: torch.device) -> None:
    """A vocabulary of one: softmax is 1, loss and gradients vanish up to the smoothing's rounding."""
    hidden, weight, _ = inputs(1, 1, 1, torch.float32, device)
    targets = torch.zeros(1, dtype=torch.int64, device=device)
    for found in value_and_grads(linear_cross_entropy, hidden, weight, targets, label_smoothing=0.1):
        torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-6, rtol=0)


def test_several_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of three chunks are one's exactly; the weight's gradient is summed over them."""
    hidden, weight, targets = inputs(300, 24, 200, torch.float32, device)
    whole = value_and_grads(linear_cross_entropy, hidden, weight, targets, reduction="none")
    monkeypatch.setattr(launch, "chunk_tokens", lambda tokens, vocab, itemsize: 128)
    parts = value_and_grads(linear_cross_entropy, hidden, weight, targets, reduction="none")
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[2], parts[2], rtol=1e-5, atol=1e-6)


def test_reference_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(50, 24, 20, torch.float64, torch.device("cpu"))
    with gptkern.backend("reference"):
        whole = value_and_grads(linear_cross_entropy, hidden, weight, targets, z_loss=0.1)
        monkeypatch.setattr(reference, "CHUNK_LOGITS", 20 * 7)
        parts = value_and_grads(linear_cross_entropy, hidden, weight, targets, z_loss=0.1)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_chunks_are_bounded() -> None:
    """One chunk's workspace stops growing with the batch and, tile by tile, with the vocabulary."""
    for tokens in (1, 8192, 65536, 1 << 22):
        for vocab in (256, 50304, 262144):
            rows = launch.chunk_tokens(tokens, vocab, 2)
            assert rows % 128 == 0
            assert rows * vocab * 2 <= max(832 << 20, 128 * vocab * 2)
    assert launch.chunk_tokens(65536, 50304, 2) == 8192
    assert launch.chunk_tokens(5, 256, 2) == 128


def test_deterministic_and_leading_dimensions(device: torch.device) -> None:
    hidden, weight, targets = inputs(36, 40, 300, torch.bfloat16, device)
    first = value_and_grads(linear_cross_entropy, hidden, weight, targets)
    again = value_and_grads(linear_cross_entropy, hidden.view(4, 9, 40), weight, targets.view(4, 9))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[2], again[2])
    assert torch.equal(first[1], again[1].flatten(0, 1))


def test_strided_rows(device: torch.device) -> None:
    hidden, weight, targets = inputs(9, 64, 50, torch.float32, device)
    strided = (hidden.repeat(1, 2)[:, :64], weight.repeat(1, 2)[:, :64])
    for a, b in zip(
        value_and_grads(linear_cross_entropy, hidden, weight, targets),
        value_and_grads(linear_cross_entropy, *strided, targets),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_targets(reduction: str, device: torch.device) -> None:
    """One column of a table: a vector whose elements lie apart."""
    hidden, weight, targets = inputs(9, 24, 50, torch.float32, device)
    apart = torch.stack([targets, targets.flip(0)], 1)[:, 0]
    assert apart.stride() == (2,)
    for a, b in zip(
        value_and_grads(linear_cross_entropy, hidden, weight, apart, reduction=reduction),
        value_and_grads(linear_cross_entropy, hidden, weight, targets, reduction=reduction),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_gradient_of_one_input_alone(device: torch.device) -> None:
    hidden, weight, targets = inputs(9, 24, 50, torch.float32, device)
    both = value_and_grads(linear_cross_entropy, hidden, weight, targets, reduction="sum")
    for kept, reduction in ((0, "sum"), (1, "sum"), (0, "none"), (1, "none")):
        leaves = [hidden.clone(), weight.clone()]
        leaves[kept].requires_grad_()
        loss = linear_cross_entropy(leaves[0], leaves[1], targets, reduction=reduction).sum()
        loss.backward(torch.full_like(loss, 0.5))
        assert torch.equal(leaves[kept].grad, both[1 + kept])
        assert leaves[1 - kept].grad is None


def test_backward_twice(device: torch.device) -> None:
    hidden, weight, targets = inputs(9, 24, 50, torch.float32, device)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    (first,) = torch.autograd.grad(loss, hidden, torch.tensor(3.0, device=device), retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden, torch.tensor(3.0, device=device))
    assert torch.equal(first, second)


def test_all_ignored_and_empty(device: torch.device) -> None:
    hidden, weight, targets = inputs(4, 8, 10, torch.float32, device)
    targets[:] = -100
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    loss, dhidden, dweight = value_and_grads(linear_cross_entropy, hidden, weight, targets, reduction="sum")
    assert loss == 0
    assert not dhidden.any()
    assert not dweight.any()
    assert linear_cross_entropy(hidden[:0], weight, targets[:0], reduction="sum") == 0
    assert linear_cross_entropy(hidden[:0], weight, targets[:0], reduction="none").shape == (0,)


def test_nan_stays_in_its_row(device: torch.device) -> None:
    hidden, weight, targets = inputs(40, 24, 300, torch.float32, device)
    clean = linear_cross_entropy(hidden, weight, targets, reduction="none")
    hidden[7] = float("nan")
    targets[7] = 3
    dirty = linear_cross_entropy(hidden, weight, targets, reduction="none")
    others = torch.arange(40) != 7
    assert dirty[7].isnan()
    assert torch.equal(dirty[others], clean[others])


def test_large_logits(device: torch.device) -> None:
    """Logits of several thousand, where exp alone overflows."""
    hidden, weight, targets = inputs(8, 16, 300, torch.float32, device)
    exact = value_and_grads(plain, 1000 * hidden.double(), weight.double(), targets)
    unfused = value_and_grads(plain, 1000 * hidden, weight, targets)
    found = value_and_grads(linear_cross_entropy, 1000 * hidden, weight, targets)
    for a, b, c in zip(found, unfused, exact, strict=True):
        assert_accurate(a, b, c)


def test_autocast(device: torch.device) -> None:
    hidden, weight, targets = inputs(20, 24, 50, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        found = value_and_grads(linear_cross_entropy, hidden, weight, targets)
    assert found[1].dtype == found[2].dtype == torch.float32
    rounded = [t.bfloat16().double() for t in (hidden, weight)]
    for a, b in zip(found, value_and_grads(plain, *rounded, targets), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str, device: torch.device) -> None:
    hidden, weight, targets = inputs(6, 16, 20, torch.float32, device)
    hidden.requires_grad_(), weight.requires_grad_()
    for extras in ((None, None, 0.0), (torch.randn(20, device=device), torch.rand(20, device=device), 5.0)):
        bias, ce_weight, softcap = extras
        settings = (-100, reduction, 0.1, 0.1, softcap, bias is not None, torch.float32, True, True, False)
        arguments = (hidden, weight, targets, bias, ce_weight, *settings)
        torch.library.opcheck(torch.ops.gptkern.linear_cross_entropy, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction: str, device: torch.device) -> None:
    hidden, weight, targets = inputs(6, 16, 20, torch.float32, device)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    eager = value_and_grads(linear_cross_entropy, hidden, weight, targets, reduction=reduction)
    for a, b in zip(
        value_and_grads(compiled, hidden, weight, targets, reduction=reduction), eager, strict=True
    ):
        torch.testing.assert_close(a, b)


class PeakBytes(TorchDispatchMode):
    """The most bytes of storage alive at once among what operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self.alive -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out


def peak_bytes(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> int:
    """Of a training step at 8192 tokens x 50257 words, by shapes alone: nothing is computed."""
    meta = torch.device("meta")
    hidden = torch.empty(8192, 768, device=meta, dtype=dtype, requires_grad=True)
    weight = torch.empty(50257, 768, device=meta, dtype=dtype, requires_grad=True)
    targets = torch.empty(8192, device=meta, dtype=torch.int64)
    tracked = PeakBytes()
    with tracked, _launch.record(90):
        function(hidden, weight, targets).backward()
    return tracked.peak


def test_peak_memory() -> None:
    """Both forms need less than a tenth of the unfused loss, gradients included."""
    unfused = peak_bytes(plain, torch.float32)
    assert unfused > 3 * 8192 * 50257 * 4  # the count sees the logits and two more of their size
    assert peak_bytes(linear_cross_entropy, torch.float32) < 0.1 * unfused
    assert peak_bytes(linear_cross_entropy, torch.bfloat16) < 0.1 * peak_bytes(plain, torch.bfloat16)
    with gptkern.backend("reference"):
        assert peak_bytes(linear_cross_entropy, torch.float32) < 0.1 * unfused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(4, 7)}, ValueError, "hidden has shape"),
        ({"hidden": torch.zeros(8)}, ValueError, "hidden has shape"),
        ({"hidden": torch.zeros(4, 8, dtype=torch.int64)}, TypeError, "hidden is int64"),
        ({"hidden": torch.zeros(4, 8).half()}, TypeError, "weight is torch.float32, hidden torch.float16"),
        ({"hidden": torch.zeros(2, 4, 8)[:, :2]}, ValueError, "targets has shape"),
        ({"hidden": torch.zeros(8, 4).T}, ValueError, "contiguous"),
        (
            {"hidden": torch.zeros(2, 4, 8)[:, :2], "targets": torch.zeros(2, 2, dtype=torch.int64)},
            ValueError,
            "viewable as one",
        ),
        ({"weight": torch.zeros(3)}, ValueError, "weight has shape"),
        ({"weight": torch.zeros(0, 8)}, ValueError, "weight has shape"),
        ({"targets": torch.zeros(4)}, TypeError, "targets is float32"),
        ({"targets": torch.tensor([0, 1, 10, 2])}, ValueError, "targets holds 10"),
        ({"targets": torch.tensor([0, 1, -1, 2])}, ValueError, "targets holds -1"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0"),
        ({"weight": [1]}, TypeError, "weight is list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(10, 8),
        "targets": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(error, match="linear_cross_entropy: .*" + message):
        linear_cross_entropy(**(given | change))


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("shape", [(5, 24, 11), (130, 72, 300)])
@pytest.mark.usefixtures("on_device")
def test_bias(shape: tuple[int, int, int], settings: dict[str, Any], device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets = inputs(*shape, dtype, device)
        targets = targets.masked_fill(targets == -100, settings.get("ignore_index", -100))
        bias = torch.randn(shape[2], device=device)
        leaves = tuple(t.requires_grad_() for t in (hidden, weight))
        check_values(
            linear_cross_entropy, Call((*leaves, targets), {**settings, "bias": bias.requires_grad_()})
        )


@pytest.mark.usefixtures("on_device")
def test_bias_is_registered_and_may_be_all_that_is_trained(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "chunk_tokens", lambda *_: 128)
    hidden, weight, targets = inputs(300, 16, 21, torch.float32, device)
    bias = torch.randn(21, device=device, requires_grad=True)
    for reduction in ("mean", "none"):
        settings = {"reduction": reduction, "bias": bias}

        def gradient(op: Any, settings: dict[str, Any] = settings) -> tuple[torch.Tensor, torch.Tensor]:
            loss = op(hidden, weight, targets, **settings)
            return loss, torch.autograd.grad(loss.sum(), bias)[0]

        with gptkern.backend("reference"):
            expected = gradient(linear_cross_entropy)
        for op in (
            linear_cross_entropy,
            torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager"),
        ):
            for got, right in zip(gradient(op), expected, strict=True):
                torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def test_a_bias_of_another_length_is_named(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"linear_cross_entropy: bias has shape \(4,\); \(5,\) is needed"):
        linear_cross_entropy(
            torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64), bias=torch.zeros(4)
        )


CLASSES: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "label_smoothing": 0.2},
    {"reduction": "none", "z_loss": 0.05},
    {"z_loss": 0.05, "label_smoothing": 0.3, "softcap": 4.0, "ignore_index": 2},
]


@pytest.mark.parametrize("settings", CLASSES, ids=["mean", "smoothed-sum", "per-token", "all"])
@pytest.mark.parametrize("shape", [(5, 24, 11), (130, 72, 300)])
@pytest.mark.usefixtures("on_device")
def test_class_weights(shape: tuple[int, int, int], settings: dict[str, Any], device: torch.device) -> None:
    """As PyTorch's ``weight``, with classes of weight 0 among them; the z-loss's mean is over tokens."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets = inputs(*shape, dtype, device)
        targets = targets.masked_fill(targets == -100, settings.get("ignore_index", -100))
        classes = torch.rand(shape[2], device=device) * 3
        classes[::3] = 0.0
        classes[targets[1:4].clamp(min=0)] = 2.5
        given = {**settings, "ce_weight": classes}
        exact = value_and_grads(plain, hidden.double(), weight.double(), targets, **given)
        unfused = value_and_grads(plain, hidden, weight, targets, **given)
        found = value_and_grads(linear_cross_entropy, hidden, weight, targets, **given)
        with gptkern.backend("reference"):
            reference_loss = linear_cross_entropy(hidden, weight, targets, **given)
        for a, b, c in zip(found, unfused, exact, strict=True):
            assert_accurate(a, b, c)
        torch.testing.assert_close(reference_loss, unfused[0], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.usefixtures("on_device")
def test_z_loss_and_accuracy_apart(reduction: str, device: torch.device) -> None:
    hidden, weight, targets = inputs(140, 24, 300, torch.float32, device)
    logits = F.linear(hidden, weight)
    targets[::3] = logits.argmax(-1)[::3]
    targets[::4] = -100
    counted = targets != -100
    settings = {"reduction": reduction, "z_loss": 0.1}
    alone = linear_cross_entropy(hidden, weight, targets, **settings)
    squares = 0.1 * logits.logsumexp(-1).square() * counted
    hits = ((logits.argmax(-1) == targets) & counted).float()
    expected = {
        "mean": (squares.sum() / counted.sum(), hits.sum() / counted.sum()),
        "sum": (squares.sum(), hits.sum() / counted.sum()),
        "none": (squares, hits),
    }[reduction]
    asked = {**settings, "return_z_loss": True, "return_token_accuracy": True}
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    op = linear_cross_entropy
    for function, backend in ((op, "kernel"), (op, "reference"), (compiled, "kernel")):
        with gptkern.backend(backend):
            found = function(hidden, weight.clone().requires_grad_(), targets, **asked)
        torch.testing.assert_close(found.loss.detach(), alone)
        torch.testing.assert_close(found.z_loss, expected[0])
        assert torch.equal(found.token_accuracy, expected[1])
        assert found.loss.requires_grad
        assert not found.z_loss.requires_grad
        assert not found.token_accuracy.requires_grad
    only = linear_cross_entropy(hidden, weight, targets, return_token_accuracy=True)
    assert only.z_loss is None


@pytest.mark.usefixtures("on_device")
def test_the_first_of_equal_logits_is_the_prediction(device: torch.device) -> None:
    """A head of zeros is right about word 0 alone, and not about everything; words masked by -inf lose."""
    hidden, weight, _ = inputs(6, 8, 300, torch.float32, device)
    targets = torch.tensor([0, 0, 1, 299, 150, 0], device=device)
    found = linear_cross_entropy(hidden, weight * 0, targets, reduction="none", return_token_accuracy=True)
    assert found.token_accuracy.tolist() == [1, 1, 0, 0, 0, 1]
    # More tiles than are merged at once.
    many = torch.zeros(4300, 8, device=device)
    targets = torch.tensor([0, 0, 1, 4299, 4099, 0], device=device)
    found = linear_cross_entropy(hidden, many, targets, reduction="none", return_token_accuracy=True)
    assert found.token_accuracy.tolist() == [1, 1, 0, 0, 0, 1]
    # A bias of -inf over more than a tile of words, and below -100 elsewhere: exp alone would underflow.
    bias = torch.full((300,), -200.0, device=device)
    bias[:200] = float("-inf")
    targets[:] = 299
    bias[299] = -199.0
    found = linear_cross_entropy(hidden, weight * 0, targets, bias=bias, return_token_accuracy=True)
    assert found.token_accuracy == 1.0
    torch.testing.assert_close(found.loss, torch.log1p(99 * torch.exp(torch.tensor(-1.0, device=device))))


@pytest.mark.usefixtures("on_device")
def test_class_weights_of_the_targets_that_are_all_zero(device: torch.device) -> None:
    """The mean is 0 / 0 as in PyTorch, and no gradient comes of it."""
    hidden, weight, targets = inputs(9, 16, 20, torch.float32, device)
    classes = torch.zeros(20, device=device)
    loss, dhidden, dweight = value_and_grads(
        linear_cross_entropy, hidden, weight, targets, ce_weight=classes, label_smoothing=0.1
    )
    assert loss.isnan()
    assert not dhidden.any()
    assert not dweight.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 0.0}, "softcap is 0.0; a positive, finite number is needed, or None"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"return_z_loss": True}, "return_z_loss is True with z_loss 0.0: there is none to return"),
        ({"ce_weight": torch.ones(4)}, r"ce_weight has shape \(4,\); \(5,\) is needed"),
        ({"ce_weight": torch.ones(5, requires_grad=True)}, "ce_weight requires a gradient"),
    ],
    ids=["zero cap", "infinite cap", "no z-loss", "short", "trained"],
)
def test_new_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="linear_cross_entropy: " + message):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), targets, **change)
