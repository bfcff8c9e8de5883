"""ops.sample against transformers' processors and torch.multinomial: top-k 50, top-p 0.9, in one run.

The work's floor is one reading of the logits: batch * vocab * 4 bytes.

    python benchmarks/bench_sample.py
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gptkern.ops import SamplerState, SamplingParams, sample


def medians(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of each, their calls taken in turn so that other load falls on both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 2):
        for function, taken in zip((first, second), times, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0][2:]), statistics.median(times[1][2:])


def main(repeats: int = 30) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    warpers = [TemperatureLogitsWarper(0.8), TopKLogitsWarper(50), TopPLogitsWarper(0.9)]
    print(f"{device}, {torch.get_num_threads()} threads, median of {repeats}, microseconds")
    print("batch   vocab  gptkern  transformers  ratio  GB/s read once")
    for batch in (1, 32):
        for vocab in (50257, 151936):
            logits = torch.randn(batch, vocab, device=device) * 3
            params = SamplingParams.make(batch, vocab, temperature=0.8, top_k=50, top_p=0.9, device=device)
            state = SamplerState.make(batch, vocab, seed=0, device=device)
            ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)

            def ours(logits=logits, params=params, state=state) -> object:  # type: ignore[no-untyped-def]
                return sample(logits, params, state=state)

            def theirs(logits=logits, ids=ids) -> object:  # type: ignore[no-untyped-def]
                scores = logits
                for warper in warpers:
                    scores = warper(ids, scores)
                return torch.multinomial(torch.softmax(scores, dim=-1), 1)

            a, b = medians(ours, theirs, repeats)
            rate = batch * vocab * 4 / a / 1e9
            print(f"{batch:5d} {vocab:7d} {a * 1e6:8.0f} {b * 1e6:13.0f} {b / a:6.1f} {rate:15.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
