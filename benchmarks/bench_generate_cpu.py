"""Generation on the CPU against transformers, and the time of a token as the context grows.

    pytest benchmarks/bench_generate_cpu.py --benchmark-enable -s

GPT-2 124M's shape with random weights, batch 1, a 32-token prompt, 128 new tokens. Rounds of the two
alternate, so that whatever else the machine does meets both; the ratio is the median over the rounds,
given for elapsed time and for CPU time. In fp32 both make the same tokens, checked before any timing;
in bf16 two right answers may differ.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gptkern.bench.suites import _models as models
from gptkern.gpt import GPT

PROMPT, NEW = 32, 128
ROUNDS = int(os.environ.get("GPTKERN_BENCH_ROUNDS", "3"))
CONTEXTS = (64, 256, 1000)
DTYPES = [torch.bfloat16, torch.float32]
CPU = torch.device("cpu")


def _times(call: Callable[[], object]) -> tuple[float, float]:
    """(elapsed, CPU) seconds of one call."""
    elapsed, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - elapsed, time.process_time() - busy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_transformers(benchmark: BenchmarkFixture, dtype: torch.dtype) -> None:
    ours, theirs = models.ours(models.GPT2, dtype, CPU), models.theirs(models.GPT2, dtype, CPU)
    ids = torch.randint(models.GPT2.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def gptkern() -> Any:
        return ours.generate(ids, max_new_tokens=NEW, eos_token_id=None)

    def transformers() -> Any:
        mask = torch.ones_like(ids)
        return theirs.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    found, expected = gptkern(), transformers()
    assert found.shape == expected.shape == (1, PROMPT + NEW)
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    rounds = [(_times(transformers), _times(gptkern)) for _ in range(ROUNDS)]
    elapsed, busy = (median(t[i] / g[i] for t, g in rounds) for i in (0, 1))
    benchmark.pedantic(gptkern, rounds=1)
    benchmark.extra_info.update(elapsed_ratio=elapsed, cpu_ratio=busy, threads=torch.get_num_threads())
    print(f"\n{dtype}, {torch.get_num_threads()} threads: transformers / gptkern, {NEW} tokens")
    for theirs_times, our_times in rounds:
        print(
            f"  elapsed {theirs_times[0] / NEW * 1e3:6.1f} / {our_times[0] / NEW * 1e3:6.1f} ms a token, "
            f"CPU {theirs_times[1] / NEW * 1e3:6.1f} / {our_times[1] / NEW * 1e3:6.1f}"
        )
    print(f"  median ratio: elapsed {elapsed:.2f}, CPU time {busy:.2f}")


class _Clock:
    """A streamer that notes the time of each token, in elapsed and CPU seconds."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def end(self) -> None:
        """Do nothing: the times are complete."""


def _token_times(model: GPT, context: int, new: int) -> tuple[float, float]:
    """Median (elapsed, CPU) milliseconds of a token around ``context`` tokens."""
    clock = _Clock()
    ids = torch.randint(model.config.vocab_size, (1, context - new // 2))
    model.generate(ids, max_new_tokens=new, eos_token_id=None, streamer=clock)
    # The first two are the prompt and the prefill's token.
    pairs = list(zip(clock.times[2:], clock.times[3:], strict=False))
    return tuple(median((b[i] - a[i]) * 1e3 for a, b in pairs) for i in (0, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_time_of_a_token_at_each_context(benchmark: BenchmarkFixture, dtype: torch.dtype) -> None:
    model = models.ours(models.GPT2, dtype, CPU)
    times = {context: _token_times(model, context, 40) for context in CONTEXTS}
    benchmark.pedantic(_token_times, args=(model, CONTEXTS[0], 40), rounds=1)
    benchmark.extra_info["ms_per_token"] = times
    print(f"\n{dtype}, {torch.get_num_threads()} threads: elapsed (CPU) ms a token")
    for context, (elapsed, busy) in times.items():
        print(f"  {context:5} tokens of context: {elapsed:6.1f} ({busy:6.1f})")
