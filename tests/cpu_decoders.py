"""Small random decoders of any specification, for the tests of the CPU's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptkern.model.decoder import Decoder
from gptkern.model.spec import DecoderSpec


@dataclass(frozen=True)
class _Config:
    spec: DecoderSpec
    initializer_range: float = 0.2
    scaled_init: bool = False


def small_decoder(spec: DecoderSpec, dtype: torch.dtype, transposed: bool = False) -> Decoder:
    """A decoder whose norms and biases are random too; ``transposed``: matrices are stored ``(in, out)``."""
    torch.manual_seed(0)
    config: Any = _Config(spec)
    model = Decoder(config).to(dtype).eval()
    for value in model.parameters():
        if value.dim() == 1:
            nn.init.normal_(value, 0.5, 0.3)
    if transposed:
        for layer in model.transformer.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    return model
