"""``generate`` of transformers' GPT-2 before and after acceleration and beside ``GPT.generate``; training.

    pytest benchmarks/bench_transformers.py --benchmark-enable -n 0 -s

GPT-2 124M's shape with random weights, a 32-token prompt, 128 new tokens, batch 1 and 8, greedy; on a CPU
in bf16 and fp32, on a GPU in bf16. Rounds of the two alternate, so that whatever else the machine does meets
both; the ratio is the median over the rounds, of elapsed and of CPU time. In fp32
both make the same tokens, checked before any timing.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import gptkern

PROMPT = 32
NEW = int(os.environ.get("GPTKERN_BENCH_TOKENS", "128"))
ROUNDS = int(os.environ.get("GPTKERN_BENCH_ROUNDS", "3"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16] if DEVICE.type == "cuda" else [torch.bfloat16, torch.float32]

# PyTorch's bf16 products on a CPU without AVX-512: eight prompts alone pass the tests' limit of 300 s.
pytestmark = pytest.mark.timeout(3600)


def _pair(dtype: torch.dtype) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    library = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(DEVICE, dtype)
    return library, gptkern.accelerate(copy.deepcopy(library))


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    """(elapsed, CPU) seconds of one call."""
    elapsed, busy = time.perf_counter(), time.process_time()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - elapsed, time.process_time() - busy


def _compare(
    benchmark: BenchmarkFixture,
    library: Callable[[], Any],
    ours: Callable[[], Any],
    unit: str,
    names: str = "transformers / gptkern",
) -> None:
    rounds = [(_seconds(library), _seconds(ours)) for _ in range(ROUNDS)]
    elapsed, busy = (median(a[i] / b[i] for a, b in rounds) for i in (0, 1))
    benchmark.pedantic(ours, rounds=1)
    benchmark.extra_info.update(elapsed_ratio=elapsed, cpu_ratio=busy, threads=torch.get_num_threads())
    print(f"\n{unit}: {names}, {torch.get_num_threads()} threads")
    for a, b in rounds:
        print(f"  elapsed {a[0]:.3f} / {b[0]:.3f} s, CPU {a[1]:.3f} / {b[1]:.3f} s")
    print(f"  median ratio: elapsed {elapsed:.2f}, CPU time {busy:.2f}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 8])
def test_generate(benchmark: BenchmarkFixture, batch: int, dtype: torch.dtype) -> None:
    pair = _pair(dtype)
    ids = torch.randint(50257, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    calls = [lambda m=m: m.generate(ids, attention_mask=torch.ones_like(ids), **options) for m in pair]
    expected, found = (call() for call in calls)
    assert found.shape == expected.shape == (batch, PROMPT + NEW)
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    _compare(benchmark, *calls, f"generate, batch {batch}, {NEW} tokens, {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 8])
def test_generate_beside_gpt(
    benchmark: BenchmarkFixture, batch: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The accelerated model beside ``GPT.generate`` on the same weights: their loops are one."""
    library, accelerated = _pair(dtype)
    library.save_pretrained(tmp_path)
    gpt = gptkern.GPT.from_pretrained(tmp_path, dtype=dtype, device=DEVICE)
    ids = torch.randint(50257, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    calls = [lambda m=m: m.generate(ids, attention_mask=mask, **options) for m in (gpt, accelerated)]
    expected, found = (call() for call in calls)
    # On a GPU a product's order of sums may follow from how its matrix lies in memory.
    assert DEVICE.type == "cuda" or torch.equal(found, expected)
    unit = f"generate, batch {batch}, {NEW} tokens, {dtype}"
    _compare(benchmark, *calls, unit, "GPT.generate / the accelerated model's")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_step(benchmark: BenchmarkFixture, dtype: torch.dtype) -> None:
    batch, seq = (16, 1024) if DEVICE.type == "cuda" else (1, 128)
    ids = torch.randint(50257, (batch, seq), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def step(model: Any) -> None:
        model(ids, labels=ids).loss.backward()
        model.zero_grad()

    calls = [lambda m=m: step(m) for m in _pair(dtype)]
    for call in calls:
        call()
    _compare(benchmark, *calls, f"forward and backward, {batch} x {seq}, {dtype}")
