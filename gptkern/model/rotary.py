"""Tables of rotary positions, computed once in float64.

Where a method changes frequencies with the sequence's length (dynamic, longrope), they are those of the
decoder's context: a token's numbers must not depend on what comes after it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from gptkern.model.spec import RotarySpec


def frequencies(rotary: RotarySpec, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of every position, ``(context, dim / 2)`` fp32 on the CPU, times the attention factor."""
    turns, attention_factor = angular_frequencies(rotary, context)
    angles = torch.arange(context, dtype=torch.float64, device="cpu")[:, None] * turns
    return (angles.cos() * attention_factor).float(), (angles.sin() * attention_factor).float()


def angular_frequencies(rotary: RotarySpec, context: int) -> tuple[torch.Tensor, float]:
    """(radians that each pair turns by from one position to the next, attention factor).

    The first is ``(dim / 2,)`` float64 on the CPU; queries and keys are multiplied by the second.
    """
    exponents = torch.arange(0, rotary.dim, 2, dtype=torch.float64, device="cpu") / rotary.dim
    plain = rotary.theta**-exponents
    if rotary.scaling is None:
        return plain, 1.0
    values: dict[str, Any] = dict(rotary.scaling.values)
    match rotary.scaling.kind:
        case "linear":
            return plain / values["factor"], 1.0
        case "dynamic":
            # The base grows with a sequence beyond the context, and there is none.
            return plain, 1.0
        case "llama3":
            return _llama3(plain, values), 1.0
        case "yarn":
            return _yarn(plain, rotary, values), _yarn_attention_factor(values)
        case "longrope":
            return _longrope(plain, context, values)


def _llama3(plain: torch.Tensor, values: dict[str, Any]) -> torch.Tensor:
    """Long waves are slowed down by the factor, short ones not, those between in part (Llama 3.1)."""
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    waves = values["original_max_position_embeddings"] * plain / (2 * math.pi)  # in the original context
    kept: torch.Tensor = ((waves - low) / (high - low)).clamp(0.0, 1.0)
    return plain * (kept + (1 - kept) / float(values["factor"]))


def _yarn(plain: torch.Tensor, rotary: RotarySpec, values: dict[str, Any]) -> torch.Tensor:
    """Pairs of many turns in the original context stay, those of few are slowed down (Peng et al., 2023)."""

    def pair_that_turns(times: float) -> float:
        context = int(values["original_max_position_embeddings"])
        return rotary.dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(rotary.theta))

    first = pair_that_turns(values.get("beta_fast", 32.0))
    last = pair_that_turns(values.get("beta_slow", 1.0))
    if values.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary.dim - 1)
    # One pair alone still needs a width to fall over.
    width = last - first or 0.001
    slowed = ((torch.arange(len(plain), dtype=torch.float64, device="cpu") - first) / width).clamp(0.0, 1.0)
    return plain * (1 - slowed + slowed / float(values["factor"]))


def _yarn_attention_factor(values: dict[str, Any]) -> float:
    if "attention_factor" in values:
        return float(values["attention_factor"])

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(values["factor"]) + 1.0 if values["factor"] > 1.0 else 1.0

    mscale, of_all = values.get("mscale"), values.get("mscale_all_dim")
    return grown(mscale) / grown(of_all) if mscale and of_all else grown(1.0)


def _longrope(plain: torch.Tensor, context: int, values: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Each pair is slowed down by a factor of its own (Ding et al., 2024)."""
    original = values["original_max_position_embeddings"]
    factors = values["long_factor" if context > original else "short_factor"]
    factor = values.get("factor", context / original)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    turns = plain / torch.tensor(factors, dtype=torch.float64, device="cpu")
    return turns, float(values.get("attention_factor", grown))
