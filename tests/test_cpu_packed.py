"""Products on a CPU with weights of the rows' dtype: packed, or as they lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpu_products import PATHS, product

from gptkern import GPT, GPTConfig, _native
from gptkern.engine.cache import KVCache
from gptkern.engine.executors import cpu
from gptkern.engine.executors.cpu import CpuExecutor
from gptkern.environment import FallbackWarning

DTYPES = (torch.bfloat16, torch.float32)
# Some fill no vector or strip; some are summed in parts.
WIDTHS = (5, 32, 100, 300, 768, 1600)
ROWS = 43
OUTS = (1, 16, 33, 64, 97, 200)
SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=48, n_positions=40, vocab_size=99)

pytestmark = pytest.mark.skipif(not PATHS, reason="the CPU's decode step needs AVX2")


@pytest.fixture
def path(decode_path: None) -> str:
    """Each instruction set that the processor has."""
    assert _native.extension is not None
    return _native.extension.decode_path()


def _made(width: int, outs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(width)
    x = torch.randn(ROWS, width, generator=draw).to(dtype)
    return x, torch.randn(max(outs, ROWS), width, generator=draw).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_product_against_float64(width: int, dtype: torch.dtype, path: str) -> None:
    x, weight = _made(width, 97, dtype)
    exact, found = x.double() @ weight.double().T, product(x, weight, packed=True).double()
    # A part of up to 128 units is summed by itself; a pair's product rounds once or twice.
    within = (128 + 2 + width // 64) * 2 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    if dtype == torch.bfloat16:
        within += 2.0**-8 * exact.abs()
    assert ((found - exact).abs() <= within).all()


@pytest.mark.parametrize("turned", [False, True], ids=["by outputs", "by inputs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_packed_or_not_in_any_company_the_bits_are_the_same(
    width: int, dtype: torch.dtype, turned: bool, path: str
) -> None:
    x, weight = _made(width, 97, dtype)
    whole = product(x, weight)
    widened = dtype == torch.bfloat16 and path != "avx512_bf16"  # there it is summed in another order
    if turned and not widened:
        weight = weight.T.contiguous().T
    for rows in (1, 2, 5, 6, 7, 12, 13, ROWS):
        for packed in (False, True):
            assert torch.equal(product(x[:rows], weight, 1 + rows % 3, packed), whole[:rows]), (rows, packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_output_is_the_same_among_any_number_of_others(dtype: torch.dtype, path: str) -> None:
    x, weight = _made(300, 200, dtype)
    whole = product(x[:1], weight)
    for outs in OUTS:
        for threads in (1, 2, 3):
            assert torch.equal(product(x[:1], weight[:outs], threads, packed=True), whole[:, :outs]), outs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_no_number_stays_in_its_row_and_output(dtype: torch.dtype, path: str) -> None:
    x, weight = _made(100, 97, dtype)
    x[3, 7], weight[64, 99] = float("nan"), float("inf")
    for packed in (False, True):
        found = product(x[:20], weight, packed=packed)
        assert found[3].isnan().all()
        found = torch.cat([found[:3], found[4:]])
        assert found[:, 64].isinf().all()
        assert torch.cat([found[:, :64], found[:, 65:]], 1).isfinite().all()


def _executor(model: GPT) -> tuple[CpuExecutor, Callable[[], torch.Tensor]]:
    cache = KVCache.for_config(
        model.config, max_seqs=3, max_len=16, page_size=16, dtype=model.dtype, device="cpu"
    )
    executor = CpuExecutor(model, cache)
    table, lengths = torch.arange(3, dtype=torch.int32)[:, None], torch.zeros(3, dtype=torch.int32)
    return executor, lambda: executor.logits(torch.tensor([1, 5, 98]), table, lengths)


def _add_one(model: GPT) -> None:
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 2] += 1


def _step_fused(model: GPT) -> None:
    weight = model.transformer.h[0].attn.c_attn.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[100, 3] = 1  # one number alone changes, of a value
    torch.optim.AdamW([weight], lr=0.1, weight_decay=0, fused=True).step()


def _write_data(model: GPT) -> None:
    model.transformer.h[0].mlp.c_proj.weight.data.mul_(2)


def _move(model: GPT) -> None:
    layer = model.transformer.h[0].mlp.c_proj
    layer.weight.data = layer.weight.data.clone() * 2


WRITES = (_add_one, _step_fused, _write_data, _move)


@pytest.mark.parametrize("write", WRITES)
def test_copies_follow_the_weights(write: Callable[[GPT], None], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    _, logits = _executor(model)
    before = logits()
    write(model)
    after = logits()
    assert not torch.equal(before, after)
    monkeypatch.setenv(cpu.PACKED, "0")
    assert torch.equal(_executor(model)[1](), after)


def test_a_write_that_nobody_sees_can_be_reported() -> None:
    model = GPT(SMALL).eval()
    executor, logits = _executor(model)
    before = logits()
    model.transformer.h[0].mlp.c_fc.weight.data[5, 1] += 1
    executor.weights_written()
    assert not torch.equal(logits(), before)


def test_a_model_whose_writes_nobody_counts_is_read_as_it_lies() -> None:
    with torch.inference_mode():
        model = GPT(SMALL).eval()
        with pytest.warns(FallbackWarning, match="made in inference mode.*GPTKERN_CPU_PACKED=1"):
            _, logits = _executor(model)
        before = logits()
        model.transformer.h[0].mlp.c_fc.weight[5, 1] += 1
        assert not torch.equal(logits(), before)


def test_copies_are_made_where_the_memory_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cpu._packs(0)
    monkeypatch.setattr(cpu, "memory_left", lambda: 2 << 30)
    assert cpu._packs(1 << 30)
    with pytest.warns(FallbackWarning, match=r"1025 MiB, and half .* 1024 MiB.*GPTKERN_CPU_PACKED"):
        assert not cpu._packs(1025 << 20)
    monkeypatch.setenv(cpu.PACKED, "1")
    assert cpu._packs(1025 << 20)
    monkeypatch.setenv(cpu.PACKED, "0")
    assert not cpu._packs(1 << 20)
    monkeypatch.setenv(cpu.PACKED, "yes")
    with pytest.raises(ValueError, match="GPTKERN_CPU_PACKED='yes': it takes 1, 0, or nothing"):
        cpu._packs(1 << 20)
