"""The cost and the savings of the engine, as ratios within one run.

    pytest benchmarks/bench_engine.py -n 0 -s --benchmark-enable

Host time of a pass beyond the executor's, requests that arrive at random against the best static batches of
the same requests, and the tenth turn of a conversation against the first.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from gptkern import GPT, Engine, Request
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.choose import Executors
from gptkern.generate.engines import Engines

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 5
NEW = 64


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _drain(engine: Engine) -> int:
    """Call ``step`` until every request has ended; return the number of tokens."""
    tokens = 0
    while engine.has_work:
        tokens += len(engine.step())
    return tokens


def test_host_time_of_a_pass(benchmark: BenchmarkFixture) -> None:
    """A token of the engine at batch 1, less the executor's own pass: the goal is 60 microseconds or less."""
    model = GPT.from_pretrained(device=DEVICE)
    prompt = list(range(1, 33))
    engine = Engine(model, max_seqs=1, prefix_cache=False)

    def passes() -> float:
        engine.add(Request(prompt=prompt, options={"max_new_tokens": NEW + 1, "eos_token_id": None}))
        engine.step()
        return _seconds(lambda: _drain(engine)) / NEW

    cache = KVCache.for_config(
        model.config, max_seqs=1, max_len=model.config.n_positions, dtype=model.dtype, device=DEVICE
    )
    executor = Executors(model, cache, 1).decode
    (sequence,) = cache.allocate()
    token = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    @torch.inference_mode()
    def alone() -> float:
        cache.truncate(sequence, 0)
        for _ in range(len(prompt)):
            executor(token)
        return _seconds(lambda: [executor(token) for _ in range(NEW)]) / NEW

    rounds = [(passes(), alone()) for _ in range(ROUNDS)]
    benchmark.pedantic(lambda: engine.has_work, rounds=1)
    whole, own = (median(column) for column in zip(*rounds, strict=True))
    benchmark.extra_info.update({"pass": whole, "executor": own})
    print(
        f"\na pass {whole * 1e6:.0f} us, the executor {own * 1e6:.0f}: {(whole - own) * 1e6:.0f} us beyond it"
    )


def test_arrivals_against_static_batches(benchmark: BenchmarkFixture) -> None:
    """32 requests of random lengths that arrive at random, and the best static batches of the same."""
    model = GPT.from_pretrained(device=DEVICE)
    rng = random.Random(1)
    lengths = [(rng.randint(4, 100), rng.randint(8, NEW)) for _ in range(32)]
    prompts = [[rng.randrange(1, model.config.vocab_size) for _ in range(length)] for length, _ in lengths]
    arrivals = sorted(rng.randint(0, NEW // 4) for _ in lengths)

    def arriving(engine: Engine) -> None:
        waiting = list(zip(arrivals, prompts, lengths, strict=True))
        turn = 0
        while waiting or engine.has_work:
            while waiting and (waiting[0][0] <= turn or not engine.has_work):
                _, prompt, (_, new) = waiting.pop(0)
                engine.add(Request(prompt=prompt, options={"max_new_tokens": new, "eos_token_id": None}))
            engine.step()
            turn += 1

    def static(engine: Engine, size: int) -> None:
        # Sorted by their lengths, so that a batch waits as little as possible for its longest.
        order = sorted(range(32), key=lambda place: lengths[place][1])
        for start in range(0, 32, size):
            for place in order[start : start + size]:
                options = {"max_new_tokens": lengths[place][1], "eos_token_id": None}
                engine.add(Request(prompt=prompts[place], options=options))
            _drain(engine)

    engine = Engine(model, max_seqs=16, prefix_cache=False)
    times = [_seconds(lambda: arriving(engine)) for _ in range(ROUNDS)]
    batches = {
        size: median(_seconds(lambda size=size: static(engine, size)) for _ in range(ROUNDS))
        for size in (4, 8, 16)
    }
    best = min(batches, key=batches.__getitem__)
    benchmark.pedantic(lambda: engine.has_work, rounds=1)
    ratio = batches[best] / median(times)
    benchmark.extra_info.update({"arriving": median(times), "static": batches[best]})
    print(f"\narriving at random: {ratio:.2f} of the tokens/s of static batches of {best}")


def test_the_tenth_turn(benchmark: BenchmarkFixture) -> None:
    """Time to the first token in turn 10 of a conversation, whose beginning is known, against turn 1."""
    model = GPT.from_pretrained(device=DEVICE)
    turn = [1 + place * 7 % 200 for place in range(32)]

    def first_tokens() -> tuple[float, float]:
        model.engines = Engines(keeps_prefixes=True)
        conversation: list[int] = []
        times = []
        for _ in range(10):
            conversation = conversation + turn
            stream = model.stream(conversation, max_new_tokens=8, eos_token_id=None)
            times.append(_seconds(lambda stream=stream: next(stream)))
            list(stream)
            conversation = conversation + stream.completion.token_ids
        return times[0], times[-1]

    first_tokens()
    rounds = [first_tokens() for _ in range(ROUNDS)]
    first, tenth = (median(column) for column in zip(*rounds, strict=True))
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update({"first": first, "tenth": tenth})
    print(f"\nfirst token of turn 10: {tenth / first:.2f} x that of turn 1")
