"""Low-rank adaptation (Hu et al. 2021, section 4.1): ``weight + alpha / rank * B @ A``, A and B trained.

A parametrisation of the weight, not a wrapper of the layer, so that the fused ops, which read
``layer.weight``, run as before.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """The update of one ``(out, in)`` matrix; zero at first, as B is."""

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.scale = alpha / rank
        # In fp32 whatever the frozen weight's dtype: the update is what is trained.
        self.a = nn.Parameter(torch.empty(rank, in_features, device=weight.device))
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.scale * (self.b @ self.a)).to(weight.dtype)


def add_lora(model: nn.Module, rank: int, alpha: float, targets: list[str]) -> list[str]:
    """Freeze ``model`` and give every linear layer whose name ends in one of ``targets`` an update.

    Returns:
        The names of the layers.

    Raises:
        ValueError: ``rank`` is not positive, or a target matches no layer.
    """
    if rank < 1:
        raise ValueError(f"add_lora: rank is {rank}; 1 or more is needed")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = [name for name in layers if any(f".{name}".endswith("." + target) for target in targets)]
    for target in targets:
        if not any(f".{name}".endswith("." + target) for name in layers):
            raise ValueError(f"add_lora: no layer's name ends in {target!r}; layers are {', '.join(layers)}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in chosen:
        layer = layers[name]
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))
    return chosen


def merge_lora(model: nn.Module) -> None:
    """Add every update to its weight for good; the model is then a plain one, all of it trainable."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
