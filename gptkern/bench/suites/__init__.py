"""The suites by name: each yields its problems for a device."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command's help names the suites, and loads no torch for that
    import torch

    from gptkern.bench.problem import Problem

OPS = (
    "layer_norm",
    "rms_norm",
    "rotary",
    "flash_attention",
    "linear",
    "gelu_mlp",
    "gated_mlp",
    "linear_cross_entropy",
    "decode_attention",
)
END_TO_END = ("sample", "prefill", "decode_step", "generate", "train_step")
SUITES = OPS + END_TO_END


def problems(name: str, device: torch.device, quick: bool = False) -> Iterator[Problem]:
    """The problems of one suite.

    Raises:
        ValueError: There is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"bench: there is no suite {name!r}; there are {', '.join(SUITES)}")
    module = importlib.import_module(f"gptkern.bench.suites.{name}")
    yield from module.problems(device, quick)
