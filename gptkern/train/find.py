"""Settings found by trying: a learning rate by a range test, the largest batch that fits."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gptkern.host_memory import memory_left
from gptkern.train.errors import SettingsError
from gptkern.train.processes import Processes, processes
from gptkern.train.settings import Settings
from gptkern.train.trainer import Trainer

TRIES = 100
_LOWEST, _HIGHEST = 1e-6, 1.0
_SMOOTHING, _DIVERGED = 0.9, 3.0
_CLEAR = 0.05  # a loss has risen again when it is this share of the whole fall above its lowest
_LONGEST = 60.0  # seconds that a search of batch sizes takes, and the one it is at when they are over


@dataclass(frozen=True)
class RateTest:
    """Learning rates tried, the smoothed loss after each, and the one to begin with."""

    rates: list[float]
    losses: list[float]
    suggestion: float


@dataclass(frozen=True)
class BatchTest:
    """Sequences of one forward pass.

    Attributes:
        speeds: Tokens a second with each number that was tried and fits.
        suggestion: The one to take.
        limit: Why no larger ones were tried: ``memory``, ``time``, or ``batch_size``: a step has no more.
    """

    speeds: dict[int, float]
    suggestion: int
    limit: str


def find_lr(
    settings: Settings, out: Path, tries: int = TRIES, *, advance: Callable[[int], object] = lambda more: None
) -> RateTest:
    """Raise the learning rate a little each step until the loss diverges (Smith 2017, section 3.3).

    See ``suggest`` for the one that is recommended. A fresh model is trained; nothing of it is kept.

    Args:
        settings: The run's settings.
        out: The run's folder, for its tokens.
        tries: Learning rates to try, at most.
        advance: Called with 1 after each.

    Raises:
        SettingsError: Several processes, a loss that is no number from the first step, or one that no rate
            lowers.
    """
    constant = dataclasses.replace(settings.schedule, name="constant", warmup=0)
    settings = dataclasses.replace(settings, schedule=constant)
    with processes(settings.train.device) as group:
        _alone(group, "--find-lr")
        trainer = Trainer(settings, out, group)
        peaks = [g["peak"] for o in trainer.optimizers for g in o.param_groups]
        rates: list[float] = []
        losses: list[float] = []
        running = 0.0
        for step in range(tries):
            rate = _LOWEST * (_HIGHEST / _LOWEST) ** (step / max(1, tries - 1))
            groups = [g for o in trainer.optimizers for g in o.param_groups]
            for g, peak in zip(groups, peaks, strict=True):
                # Groups with a peak of their own (muon's) keep their proportion to the others.
                g["peak"] = rate * peak / settings.optimizer.lr
            batch = trainer.source.training_batch(step, settings.train.batch_size)
            loss = float(trainer.step(step, batch).values[0])
            running = _SMOOTHING * running + (1.0 - _SMOOTHING) * loss
            smoothed = running / (1.0 - _SMOOTHING ** (step + 1))
            if not math.isfinite(loss) or (losses and smoothed > _DIVERGED * min(losses)):
                break
            rates.append(rate)
            losses.append(smoothed)
            advance(1)
    if not rates:
        raise SettingsError("--find-lr: the loss is no number from the first step on")
    return RateTest(rates, losses, suggest(rates, losses))


def suggest(rates: list[float], losses: list[float]) -> float:
    """The rate at which the smoothed loss falls fastest, before its first clear minimum.

    A minimum is clear when the loss then rises by a twentieth of its whole fall. Lower ones may follow at
    higher rates, where the loss comes and goes: a run that begins there ends worse.

    Raises:
        SettingsError: The loss never falls.
    """
    fall = losses[0] - min(losses)
    if not fall > 0.0:
        raise SettingsError("--find-lr: no learning rate lowers the loss: is there anything to learn?")
    lowest = 0
    for place, loss in enumerate(losses):
        if loss < losses[lowest]:
            lowest = place
        # Noise of the first losses is no minimum: nothing has fallen there yet.
        elif loss > losses[lowest] + _CLEAR * fall and losses[lowest] < losses[0] - 0.5 * fall:
            break
    reach = max(1, len(losses) // 20)

    def slope(place: int) -> float:
        before, after = max(0, place - reach), min(lowest, place + reach)
        return (losses[after] - losses[before]) / (after - before)

    return rates[min(range(lowest + 1), key=slope)]


def find_batch(
    settings: Settings, out: Path, *, tell: Callable[[str], None] = lambda text: None
) -> BatchTest:
    """Try ``micro_batch_size`` 1, 2, 4, ... to ``batch_size``; where memory runs out, between the last two.

    It ends after a minute and the step it is at. The suggestion is the smallest within 3% of the fastest: a
    larger one only takes memory. A fresh model is trained; nothing of it is kept.

    Raises:
        SettingsError: Several processes, or not even one sequence fits.
    """
    speeds: dict[int, float] = {}
    with processes(settings.train.device) as group:
        _alone(group, "--find-batch")
        trainer = Trainer(settings, out, group)
        end = time.monotonic() + _LONGEST

        def fits(size: int) -> bool:
            speed = _speed(trainer, group, size)
            tell(f"{size:5} sequences: " + (f"{speed:,.0f} tokens/s" if speed else "memory runs out"))
            if speed:
                speeds[size] = speed
            return speed > 0.0

        limit = _search(fits, settings.train.batch_size, lambda: time.monotonic() > end)
    if not speeds:
        raise SettingsError("--find-batch: one sequence does not fit: shorten [data] context, or the model")
    best = max(speeds.values())
    return BatchTest(speeds, min(size for size, speed in speeds.items() if speed >= 0.97 * best), limit)


def _search(fits: Callable[[int], bool], largest: int, late: Callable[[], bool]) -> str:
    """Try the powers of two below ``largest``, and it; returns what the search ended at."""
    low = 0
    for size in [*(1 << n for n in range((largest - 1).bit_length())), largest]:
        if not fits(size):
            high = size
            break
        if late() and size < largest:
            return "time"
        low = size
    else:
        return "batch_size"
    while low and high - low > max(1, low // 8) and not late():
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return "memory"


def _speed(trainer: Trainer, group: Processes, size: int) -> float:
    """Tokens a second of a step of ``size`` sequences; 0 where memory runs out."""
    on_gpu = group.device.type == "cuda"
    try:
        rate = 0.0
        for attempt in range(2):
            # The first step allocates the optimizer's state and fills caches; the second is timed.
            batch = trainer.source.training_batch(attempt, size)
            if not on_gpu and memory_left() < _step_bytes(trainer, batch.ids.numel()):
                return 0.0
            began = time.perf_counter()
            trainer.step(attempt, batch).values.tolist()
            rate = batch.ids.numel() / (time.perf_counter() - began)
        return rate
    except (torch.OutOfMemoryError, MemoryError):
        return 0.0
    finally:
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def _step_bytes(trainer: Trainer, tokens: int) -> int:
    """Bytes that a step's activations may take, generously: 34 fp32 tensors of (tokens, width) a block.

    The count is that of Korthikanti et al. 2022 (section 4.1) without the attention matrix, which
    flash attention does not store.
    """
    spec = trainer.objective.model.spec
    weights = sum(p.numel() for p in trainer.objective.parameters())
    return tokens * spec.width * 4 * 34 * len(spec.layers) + 4 * 3 * weights


def _alone(group: Processes, what: str) -> None:
    if group.world > 1:
        raise SettingsError(f"{what} runs in one process, not under torchrun")
