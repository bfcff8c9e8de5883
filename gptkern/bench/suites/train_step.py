"""One training step: forward, loss, backward, AdamW. gptkern's loss is the objective of ``gptkern train``."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gptkern.bench.problem import Inputs, Problem, Provider
from gptkern.bench.suites import _models as models
from gptkern.bench.suites import _providers as shared
from gptkern.config import GPTConfig
from gptkern.gpt import GPT
from gptkern.train.objective import LanguageModelling

GPU = [(models.GPT2, 16, 1024), (models.GPT2, 64, 1024)]
CPU = [(models.SMALL, 2, 128)]


class _Objective(nn.Module):
    """The mean of the trainer's losses, called as transformers' models are."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.sum = LanguageModelling(model)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        mean: torch.Tensor = self.sum(ids, targets) / labels[:, 1:].numel()
        return mean


class _Step:
    """A model with its optimizer; a call takes one step and returns the loss before it."""

    def __init__(self, model: nn.Module, device: torch.device, compiled: bool) -> None:
        self.device = device
        self._weights = list(model.parameters())
        self.model: Any = torch.compile(model.train()) if compiled else model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.model(ids, labels=ids)
        loss: torch.Tensor = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def restart(self, first: nn.Module) -> None:
        """Take the weights back to those of ``first``."""
        for weight, before in zip(self._weights, first.parameters(), strict=True):
            weight.copy_(before)


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Every model and batch, fp32 weights under bf16 autocast."""
    for config, batch, seq in shared.of_widths(device, GPU, CPU, quick):
        yield _problem(config, batch, seq, device, quick)


def _problem(config: GPTConfig, batch: int, seq: int, device: torch.device, quick: bool) -> Problem:
    makers = {"gptkern": models.ours, "transformers": models.theirs}
    if not quick:
        makers["torch.compile"] = models.theirs
    steps: dict[str, _Step] = {}

    def first(name: str) -> nn.Module:
        model: nn.Module = makers[name](config, torch.float32, device)
        return model

    def provider(name: str) -> Provider:
        def call(ids: torch.Tensor) -> torch.Tensor:
            if name not in steps:
                model = deepcopy(first(name))
                trained = _Objective(model) if isinstance(model, GPT) else model
                steps[name] = _Step(trained, device, name == "torch.compile")
            return steps[name](ids)

        return call

    def inputs(device: torch.device) -> Inputs:
        return (torch.randint(config.vocab_size, (batch, seq), device=device),)

    def reference(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            loss: torch.Tensor = models.theirs(config, torch.float32, device)(ids, labels=ids).loss
        return loss.double()

    return Problem(
        "train_step",
        f"{config.n_layer}x{config.n_embd}, {batch}x{seq}",
        torch.bfloat16,
        inputs,
        {name: provider(name) for name in makers},
        reference,
        # AdamW alone: weight, gradient and two moments read, weight and moments written, 4 bytes each
        bytes_moved=28.0 * models.weight_bytes(config, torch.int8),
        flops=3 * models.forward_flops(config, batch, seq),
        # The loss is that of the weights before the step.
        restart=lambda name: steps[name].restart(first(name)),
    )
