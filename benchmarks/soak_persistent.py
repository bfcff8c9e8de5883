"""The persistent executor, many thousand times: no deadlock, and the bits of separate launches to the end.

    python benchmarks/soak_persistent.py --steps 100000
    python benchmarks/soak_persistent.py --steps 100000 --beside   # while another process uses the GPU

The exit status is 1 if a token does not come back within a minute, or if the two executors differ.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import torch

from gptkern.bench.suites import _models as models
from gptkern.bench.suites.decode_step import filled
from gptkern.config import GPTConfig
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.persistent import PersistentExecutor

CONTEXT, CYCLE, PATIENCE = 128, 500, 60.0
CONFIG = models.GPT2.replace(n_positions=CONTEXT + CYCLE + 1)


class Stuck(RuntimeError):
    """Work on the GPU that does not end."""


def soak(
    config: GPTConfig, device: torch.device, dtype: torch.dtype, *, batch: int, steps: int, cycle: int = CYCLE
) -> int:
    """Run ``steps`` persistent steps in cycles of ``cycle``; return the number of cycles compared.

    The first cycle, the last, and one in ten are repeated by separate launches and compared.

    Raises:
        Stuck: a cycle did not end.
        ValueError: logits differ.
    """
    model = models.ours(config, dtype, device)
    caches = [filled(config, batch, CONTEXT, dtype, device) for _ in range(2)]
    persistent = PersistentExecutor(model, caches[0])
    separate = GraphExecutor(model, caches[1])
    generator = torch.Generator().manual_seed(2)
    cycles, compared = -(-steps // cycle), 0
    with torch.inference_mode():
        for index in range(cycles):
            count = min(cycle, steps - index * cycle)
            tokens = torch.randint(config.vocab_size, (count, batch), generator=generator).to(device)
            logits = _run(persistent, caches[0], tokens)
            _await(device, index * cycle)
            if index % 10 == 0 or index == cycles - 1:
                # The last step attends to every key and value of the cycle.
                if not torch.equal(logits, _run(separate, caches[1], tokens)):
                    raise ValueError(f"the steps from {index * cycle} on differ from separate launches")
                compared += 1
                print(f"{batch} sequences: {index * cycle + count} of {steps} steps", file=sys.stderr)
    return compared


def _run(executor: GraphExecutor, cache: KVCache, tokens: torch.Tensor) -> torch.Tensor:
    for sequence in cache.sequences:
        cache.truncate(sequence, CONTEXT)
    for row in tokens:
        logits = executor(row)
    return logits


def _await(device: torch.device, step: int) -> None:
    if device.type != "cuda":
        return
    end = torch.cuda.Event()
    end.record()
    began = time.monotonic()
    while not end.query():
        if time.monotonic() - began > PATIENCE:
            raise Stuck(f"the steps from {step} on did not end within {PATIENCE:.0f} s")
        time.sleep(0.001)


def _load() -> None:
    """Use the GPU until killed."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    while True:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="of each batch size (default: 100000)")
    parser.add_argument("--beside", action="store_true", help="with another process on the same GPU")
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device: torch sees none")
    if options.load:
        _load()
    other = subprocess.Popen([sys.executable, __file__, "--load"]) if options.beside else None
    try:
        for batch in (1, 8):
            began = time.monotonic()
            compared = soak(CONFIG, torch.device("cuda"), torch.bfloat16, batch=batch, steps=options.steps)
            beside = " beside another process" if other else ""
            print(
                f"{torch.cuda.get_device_name()}, {batch} sequences: {options.steps} steps{beside} in "
                f"{time.monotonic() - began:.0f} s, {compared} cycles compared, all the same"
            )
    except (Stuck, ValueError) as error:
        print(f"FAILED: {error}", flush=True)
        if other is not None:
            other.kill()
        # A stuck kernel would keep an ordinary exit waiting.
        os._exit(1)
    finally:
        if other is not None:
            other.kill()


if __name__ == "__main__":
    main()
