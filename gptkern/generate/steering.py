"""Steering vectors of one call, dealt out to its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gptkern.engine.steering import Steering
from gptkern.model.decoder import Decoder

# By layer, each ``(width,)``.
Vectors = Mapping[int, torch.Tensor]


def dealt(steering: Mapping[int, Any] | None, model: Decoder, prompts: int) -> list[Vectors | None]:
    """The vectors of each prompt; empty where there are none at all.

    Args:
        steering: By layer ``(width,)`` for all prompts, or ``(prompts, width)``.

    Raises:
        TypeError: No mapping from whole numbers to tensors of floating-point numbers.
        ValueError: A layer that the model does not have, a tensor of another shape, or not finite.
    """
    if steering is None:
        return []
    if not isinstance(steering, Mapping):
        raise TypeError(f"generate: steering is {type(steering).__name__}; a mapping is needed, or None")
    rows: list[dict[int, Any]] = [{} for _ in range(prompts)]
    for layer, given in steering.items():
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise TypeError(f"generate: steering's layer is {layer!r}; a whole number is needed")
        of_each = isinstance(given, torch.Tensor) and given.dim() == 2
        if of_each and len(given) != prompts:
            raise ValueError(
                f"generate: steering of layer {layer} has {len(given)} rows; one for each of {prompts} "
                "prompts is needed, or one vector for all"
            )
        for place, row in enumerate(rows):
            row[layer] = given[place] if of_each else given
    return [Steering.of(row, model, source="generate").vectors for row in rows] if steering else []
