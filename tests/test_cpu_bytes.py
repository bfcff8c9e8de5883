"""Products of int8 activations with int8 and int4 weights: against their arithmetic in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cpu_products import PATHS, product

from gptkern import _C
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.cpu import CpuExecutor
from gptkern.engine.executors.cpu_bytes import rounded, scales_of
from gptkern.gpt import GPT
from gptkern.ops.decode_linear.formats import QuantizedWeight, quantize

pytestmark = pytest.mark.skipif(not PATHS, reason="this processor has no AVX2, or gptkern._C is not built")

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    **{
        f"int4, groups of {size}{', zeros' * zeros}": ("int4", {"group_size": size, "zero_point": zeros})
        for size in (32, 64, 128)
        for zeros in (False, True)
    },
}
# Some fill no vector, no panel, or some panels.
WIDTHS = (32, 100, 160, 320, 576, 640, 768, 1000, 1536)
CASES = [
    (name, width)
    for name, (_, options) in FORMATS.items()
    for width in WIDTHS
    if width % options.get("group_size", 1) == 0
]


@pytest.fixture(autouse=True)
def path() -> Iterator[None]:
    """The best path again, whatever a test has chosen."""
    best = _C.decode_path()
    yield
    _C.use_decode_path(best)


def _made(name: str, width: int, rows: int = 21, outs: int = 43) -> tuple[torch.Tensor, QuantizedWeight]:
    draw = torch.Generator().manual_seed(width)
    # Some inputs are much larger than others, as a model's are.
    spread = torch.randn(width, generator=draw).exp()
    x = (torch.randn(rows, width, generator=draw) * spread).bfloat16()
    format, options = FORMATS[name]
    return x, quantize(torch.randn(outs, width, generator=draw), format, **options)


def _slack(exact: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """How much a sum in fp32, rounded to bf16, may differ: no element meets more than 64 roundings."""
    return 2.0**-8 * exact.abs() + 64 * 2.0**-24 * (x.abs() @ matrix.abs().T)


@pytest.mark.parametrize(("name", "width"), CASES)
def test_a_product_is_that_of_the_rounded_activations(name: str, width: int) -> None:
    x, weight = _made(name, width)
    matrix, taken = weight.dequantize(torch.float64), rounded(x.float(), weight)
    exact, found = taken @ matrix.T, product(x, weight).double()
    assert ((found - exact).abs() <= _slack(exact, taken, matrix)).all()


@pytest.mark.parametrize(("name", "width"), CASES)
def test_the_error_is_within_half_a_scale_for_each_weight(name: str, width: int) -> None:
    x, weight = _made(name, width)
    matrix, halves = weight.dequantize(torch.float64), scales_of(x.float(), weight).double() / 2
    exact, found = x.double() @ matrix.T, product(x, weight).double()
    bound = (1 + 2.0**-20) * halves @ matrix.abs().T + _slack(exact, x.double(), matrix)
    assert ((found - exact).abs() <= bound).all()
    # Errors of many inputs cancel: in all, a bound that the worst case does not reach by far.
    assert (found - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize(("name", "width"), CASES)
def test_every_path_gives_the_same_bits(name: str, width: int) -> None:
    x, weight = _made(name, width)
    best = product(x, weight)
    for path in PATHS[1:]:
        _C.use_decode_path(path)
        for rows in (1, 2, 3, 6, len(x)):
            assert torch.equal(product(x[:rows], weight), best[:rows]), (path, rows)


def test_the_largest_numbers_of_all_fit_in_the_sums_of_every_path() -> None:
    # Activations of one magnitude become 127 or -127. Their signs make sums of 16 bits as large as can be.
    width = 256
    signs = torch.ones(8, width)
    signs[1], signs[2, ::2], signs[3, 1::2] = -1, -1, -1
    signs[4, 2::4] = signs[4, 3::4] = -1
    signs[5:] = torch.where(torch.rand(3, width, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    x = signs.bfloat16()
    scales = torch.ones(8, width // 32, dtype=torch.float16)
    codes = torch.tensor([[0, 255, 15 << 4, 15, 8, 136, 7, 1]], dtype=torch.uint8).T.repeat(1, width // 2)
    whole = torch.tensor([[127, -127, -128, 1, 0, -1, 64, -65]], dtype=torch.int8).T.repeat(1, width)
    weights = [
        QuantizedWeight("int8", whole, torch.ones(8), None),
        QuantizedWeight("int4", codes, scales, None),
        QuantizedWeight("int4", codes, scales, -8 * scales),
    ]
    for weight in weights:
        exact = rounded(x.float(), weight) @ weight.dequantize(torch.float64).T
        for path in PATHS:
            _C.use_decode_path(path)
            assert torch.equal(product(x, weight), exact.bfloat16()), (weight.format, path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_bitwise_the_same_in_any_company(name: str) -> None:
    x, weight = _made(name, 1152 if name == "int8" else 1152 + 128, rows=43)
    whole = product(x, weight)
    for rows in range(1, 43):
        assert torch.equal(product(x[:rows], weight, 1 + rows % 3), whole[:rows]), rows
    assert torch.equal(product(x[7:9], weight), whole[7:9])


@pytest.mark.parametrize("name", ["int8", "int4, groups of 32, zeros"])
def test_numbers_that_are_none_stay_in_their_row(name: str) -> None:
    x, weight = _made(name, 640)
    clean = product(x, weight)
    for place, number in ((3, torch.nan), (5, torch.inf), (6, -torch.inf)):
        x[place, 77 * place] = number
    found = product(x, weight)
    assert found[3].isnan().all() and not found[5:7].isfinite().any()
    others = [row for row in range(len(x)) if row not in (3, 5, 6)]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("name", ["int8", "int4, groups of 64, zeros"])
def test_zeros_and_the_smallest_and_largest_numbers(name: str) -> None:
    x, weight = _made(name, 640, rows=3)
    x[0] = 0
    x[1] *= 1e-38
    x[2] *= 1e30
    matrix, taken = weight.dequantize(torch.float64), rounded(x.float(), weight)
    assert taken[:2].count_nonzero() == 0
    exact, found = taken @ matrix.T, product(x, weight).double()
    assert found[:2].count_nonzero() == 0
    assert ((found - exact).abs() <= _slack(exact, taken, matrix)).all()


def test_minimums_far_from_the_codes_are_read_as_they_are() -> None:
    x, weight = _made("int4, groups of 32, zeros", 320)
    assert weight.minimums is not None
    weight.minimums[5, 3], weight.minimums[6], weight.scales[7, 2] = 200, -3, 0
    matrix, taken = weight.dequantize(torch.float64), rounded(x.float(), weight)
    exact = taken @ matrix.T
    for path in PATHS:
        _C.use_decode_path(path)
        assert ((product(x, weight).double() - exact).abs() <= _slack(exact, taken, matrix)).all(), path


@pytest.mark.slow
def test_perplexity_hardly_changes(shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare.txt").read_text()

    def perplexity(loss: Callable[[GPT, torch.Tensor], torch.Tensor], **options: Any) -> float:
        model = GPT.from_pretrained(dtype=torch.bfloat16, **options)
        ids = torch.tensor(model.tokenizer.encode(text[len(text) * 9 // 10 :][:20_000]))
        parts = ids[: len(ids) // 256 * 256].split(256)
        return torch.stack([loss(model, part) for part in parts]).mean().exp().item()

    plain = perplexity(_loss)
    for most, options in ((0.005, {"weights": "int8"}), (0.03, {"weights": "int4", "group_size": 32})):
        found = perplexity(_loss, **options)
        assert abs(found / perplexity(_loss_in_pytorch, **options) - 1) < 0.002
        assert abs(found / plain - 1) < most


def _loss_in_pytorch(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """The mean loss of a text, by the layers in PyTorch, whose activations are in bf16."""
    with torch.inference_mode():
        logits = model(ids[None])[0][0]
    return F.cross_entropy(logits[:-1].float(), ids[1:])


def _loss(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """The mean loss of a text, by the CPU executor."""
    with torch.inference_mode():
        cache = KVCache.for_config(
            model.config, max_seqs=1, max_len=len(ids), page_size=64, dtype=model.dtype
        )
        cache.allocate(1)
        cache.reserve([len(ids)])
        executor = CpuExecutor(model, cache)
        places = torch.arange(len(ids), dtype=torch.int32)
        pages = cache.page_table[:1].expand(len(ids), -1).contiguous()
        logits = executor.logits(ids, pages, places)
    return F.cross_entropy(logits[:-1].float(), ids[1:])
