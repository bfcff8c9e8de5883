"""Learning rates over a run, as shares of the peak."""

from __future__ import annotations

import math

from gptkern.train.settings import ScheduleSettings


def share(settings: ScheduleSettings, step: int, steps: int) -> float:
    """The learning rate of ``step`` (from 0) of ``steps``, as a share of the peak.

    The warm-up is nanoGPT's: ``(step + 1) / (warmup + 1)``, so that no step is wasted on a rate of 0.
    """
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    if settings.name == "constant":
        return 1.0
    length = steps - settings.warmup
    if settings.name == "wsd":
        length = min(settings.decay or max(1, steps // 5), length)
    done = min(1.0, max(0.0, (step - (steps - length)) / max(1, length)))
    remaining = 0.5 * (1.0 + math.cos(math.pi * done)) if settings.name == "cosine" else 1.0 - done
    return settings.final + remaining * (1.0 - settings.final)
