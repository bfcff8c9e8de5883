"""Optimizers by name, and which parameters are decayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gptkern.train.settings import OptimizerSettings


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023, algorithm 2), with decoupled weight decay."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; ``closure`` recomputes the loss where given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                direction = torch.lerp(parameter.grad, momentum, beta1).sign_()
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1.0 - beta2)
        return loss


def _groups(parameters: list[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Matrices decayed, vectors (biases, norms) not."""
    split: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in split if group["params"]]


def make_optimizers(model: nn.Module, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """The run's optimizers over the model's trainable parameters. Each group keeps its peak in ``peak``."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    betas = (settings.beta1, settings.beta2)
    made: list[torch.optim.Optimizer] = []
    if settings.name == "muon":
        chosen = {name for name, p in named if p.dim() == 2 and ".h." in f".{name}"}
        matrices = [p for name, p in named if name in chosen]
        parameters = [p for name, p in named if name not in chosen]
        if matrices:
            # match_rms_adamw would scale by shape; the original keeps Keller Jordan's learning rates.
            made.append(
                torch.optim.Muon(
                    matrices,
                    lr=settings.muon_lr,
                    weight_decay=settings.weight_decay,
                    momentum=settings.momentum,
                )
            )
    if parameters:
        made.append(_elementwise(settings, _groups(parameters, settings.weight_decay), betas))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def _elementwise(
    settings: OptimizerSettings, groups: list[dict[str, Any]], betas: tuple[float, float]
) -> torch.optim.Optimizer:
    if settings.name == "lion":
        return Lion(groups, lr=settings.lr, betas=betas)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Every group at ``share`` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
