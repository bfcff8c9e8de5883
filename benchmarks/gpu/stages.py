"""What a stage of a GPU session is given, and what it reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from gptkern.config import GPTConfig


@dataclass(frozen=True)
class Row:
    """One thing that was checked or measured.

    Attributes:
        name: What it is, for people.
        ok: Whether a check passed; None for a measurement.
        value, unit: The measurement.
        note: What the number is to be compared with, or why a check failed.
    """

    name: str
    ok: bool | None = None
    value: float | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Scope:
    """Where a stage runs.

    Attributes:
        device: The GPU; the CPU in a dry run.
        dry: Tiny sizes, kernels interpreted: the stage's code is tried, and nothing is measured.
        deadline: ``time.monotonic()`` at which the stage should have ended; long loops look at it.
    """

    device: torch.device
    dry: bool
    deadline: float = field(default=float("inf"))

    @property
    def late(self) -> bool:
        """Whether the stage should come to its end."""
        return time.monotonic() > self.deadline


def tiny(config: GPTConfig) -> GPTConfig:
    """A model for a dry run."""
    return config.replace(
        n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=640, bos_token_id=None, eos_token_id=None
    )


def guarded(name: str, call: Callable[[], Row]) -> Row:
    """``call``'s row, or one that says how it failed. An error that leaves the GPU unusable is raised.

    A stage goes on after a check that fails; after an illegal access nothing works any more.
    """
    try:
        row = call()
    # Whatever a compiler, a launch or a comparison raises.
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        first = str(error).strip().splitlines() or [""]
        return Row(name, ok=False, note=f"{type(error).__name__}: {first[0]}")
    return row
