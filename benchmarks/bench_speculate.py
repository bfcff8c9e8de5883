"""Speculation by prompt lookup: the cost of a pass of several tokens, and the gain on repetitive text.

    pytest benchmarks/bench_speculate.py --benchmark-enable -n 0 -s

The pass is GPT-2 124M's with random weights, in bf16, at 128 tokens of context: one row, then
more. The text is the embedded model's, which goes on with lines that it was given; both ways make the same
tokens, checked before any timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gptkern.bench.suites import _models as models
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.choose import Executors
from gptkern.engine.rows import Rows
from gptkern.gpt import GPT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, CONTEXT = 15, 128
LINES = "I will not go, I will not stay, I will not speak a word today;\n" * 4


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def test_what_a_pass_costs(benchmark: BenchmarkFixture) -> None:
    config, dtype = models.GPT2, torch.bfloat16
    model = models.ours(config, dtype, DEVICE)
    cache = KVCache.for_config(config, max_seqs=1, max_len=CONTEXT + 32, dtype=dtype, device=DEVICE)
    model(torch.randint(config.vocab_size, (1, CONTEXT), device=DEVICE), cache=cache, logits_to_keep=1)
    executor = Executors(model, cache, 9).decode
    tokens = torch.randint(config.vocab_size, (9,), device=DEVICE)
    (sequence,), length = cache.sequences, cache.lengths[0]

    def verify(n: int) -> None:
        cache.reserve([n])
        executor.forward(Rows([sequence], [n], tokens[:n], [n]))
        cache.truncate(sequence, length)

    calls = {n: lambda n=n: verify(n) for n in (1, 2, 3, 4, 5, 9)}
    for call in calls.values():
        call()
    rounds = [{n: _seconds(call) for n, call in calls.items()} for _ in range(ROUNDS)]
    times = {n: median(each[n] for each in rounds) for n in calls}
    benchmark.pedantic(calls[5], rounds=1)
    benchmark.extra_info.update({f"rows_{n}": t for n, t in times.items()})
    print()
    for n, seconds in times.items():
        print(f"{n - 1} drafted tokens: {seconds * 1e3:.2f} ms, {seconds / times[1]:.2f} x one row")


@pytest.mark.parametrize("drafted", [2, 4, 8])
def test_text_that_repeats_itself(benchmark: BenchmarkFixture, drafted: int) -> None:
    model = GPT.from_pretrained(device=DEVICE)
    assert model.tokenizer is not None
    ids = torch.tensor([model.tokenizer.encode(LINES)], device=DEVICE)

    def generate(**options: int) -> object:
        return model.generate(ids, max_new_tokens=128, return_dict_in_generate=True, **options)

    plain, output = generate(), generate(speculate=drafted)
    assert torch.equal(plain.sequences, output.sequences)  # type: ignore[attr-defined]
    rounds = [(_seconds(generate), _seconds(lambda: generate(speculate=drafted))) for _ in range(5)]
    gain = median(a / b for a, b in rounds)
    accepted = output.accepted_tokens / max(output.draft_tokens, 1)  # type: ignore[attr-defined]
    benchmark.pedantic(lambda: generate(speculate=drafted), rounds=1)
    benchmark.extra_info.update(gain=gain, accepted=accepted)
    print(f"\nspeculate={drafted}: {gain:.2f} x as fast, {accepted:.0%} of {output.draft_tokens} accepted")  # type: ignore[attr-defined]
