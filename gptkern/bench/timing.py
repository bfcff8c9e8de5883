"""Timing a call: CUDA events after a cache flush on a GPU, a clock on a CPU.

With one CPU thread the clock is the process's CPU time: what else runs on the machine does not lengthen
it, and a CPU path waits for nothing. Threads that wait for each other spin: with several it is elapsed time.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

Call = Callable[[], object]

_CPU_SAMPLE_SECONDS = 0.004
_FLUSH_BYTES = 512 << 20


def cpu_clock() -> Callable[[], float]:
    """The clock of a CPU path: CPU time with one thread, elapsed time with several."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def warm_up(calls: Sequence[Call], device: torch.device, seconds: float = 0.05) -> float:
    """Call each at least twice and for ``seconds`` in all; the seconds one call then takes."""
    for call in calls:
        call()
    synchronize(device)
    clock = time.perf_counter if device.type == "cuda" else cpu_clock()
    began, count = clock(), 0
    while clock() - began < seconds or count < len(calls):
        calls[count % len(calls)]()
        synchronize(device)
        count += 1
    return (clock() - began) / count


def sample(calls: Sequence[Call], device: torch.device, count: int, estimate: float) -> list[float]:
    """``count`` samples of the seconds one call takes, rotating through ``calls`` (one per input set)."""
    if device.type == "cuda":
        return _sample_cuda(calls, count)
    return _sample_cpu(calls, count, estimate)


def sample_seconds(estimate: float, device: torch.device) -> float:
    """About how long one sample takes."""
    return estimate if device.type == "cuda" else max(estimate, _CPU_SAMPLE_SECONDS)


def _sample_cpu(calls: Sequence[Call], count: int, estimate: float) -> list[float]:
    # Several calls a sample where one is too short for the clock.
    repeats = max(1, round(_CPU_SAMPLE_SECONDS / max(estimate, 1e-9)))
    samples, turn, clock = [], 0, cpu_clock()
    for _ in range(count):
        began = clock()
        for _ in range(repeats):
            calls[turn % len(calls)]()
            turn += 1
        samples.append((clock() - began) / repeats)
    return samples


def _sample_cuda(calls: Sequence[Call], count: int) -> list[float]:
    # Read, not written: dirty lines would be written back while the call is timed. The flush also gives the
    # host time to enqueue the call, so that launch gaps stay out.
    flush = _flush_buffer()
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)
    ]
    for turn, (start, end) in enumerate(pairs):
        # The reset is the host's and takes effect at once: not while a call before is still running.
        torch.cuda.synchronize()
        reset_persisting_l2()
        flush.amax()
        start.record()
        calls[turn % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def reset_persisting_l2() -> str:
    """Lines that a kernel asked L2 to keep become ordinary ones, which a flush removes.

    Returns:
        "", or why it could not be done.
    """
    reset = _persisting_l2_reset()
    if reset is None:
        return "the driver's library has no cuCtxResetPersistingL2Cache"
    code = reset()
    return f"CUDA error {code}" if code else ""


@cache
def _persisting_l2_reset() -> Callable[[], int] | None:
    # PyTorch's own cudart() does not have it.
    try:
        reset: Callable[[], int] = ctypes.CDLL("libcuda.so.1").cuCtxResetPersistingL2Cache
    except (OSError, AttributeError):
        return None
    return reset


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been given.

    Raises:
        RuntimeError: An error of an earlier launch that has left the device unusable.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
