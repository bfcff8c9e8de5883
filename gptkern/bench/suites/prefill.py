"""Prefill: a whole prompt through the model, the logits of its last token out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gptkern.bench.problem import Inputs, Problem, Provider
from gptkern.bench.suites import _models as models
from gptkern.bench.suites import _providers as shared
from gptkern.config import GPTConfig

GPU = [(models.GPT2, 1, 1024), (models.GPT2, 16, 1024), (models.LARGE, 1, 1024)]
CPU = [(models.SMALL, 1, 256), (models.GPT2, 1, 128)]


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Every model and prompt shape."""
    for dtype in shared.dtypes(device, quick):
        for config, batch, seq in shared.of_widths(device, GPU, CPU, quick):
            yield _problem(config, batch, seq, dtype, device, quick)


def _problem(
    config: GPTConfig, batch: int, seq: int, dtype: torch.dtype, device: torch.device, quick: bool
) -> Problem:
    def inputs(device: torch.device) -> Inputs:
        return (torch.randint(config.vocab_size, (batch, seq), device=device),)

    @torch.inference_mode()
    def gptkern(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = models.ours(config, dtype, device)(ids, logits_to_keep=1).logits
        return logits

    @torch.inference_mode()
    def transformers(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = models.theirs(config, dtype, device)(ids, logits_to_keep=1).logits
        return logits

    @torch.inference_mode()
    def reference(ids: torch.Tensor) -> torch.Tensor:
        model = models.exact(models.theirs(config, dtype, device))
        logits: torch.Tensor = model(ids, logits_to_keep=1).logits
        return logits

    providers: dict[str, Provider] = {"gptkern": gptkern, "transformers": transformers}
    if not quick:
        providers["torch.compile"] = shared.compiled(transformers)
    return Problem(
        "prefill",
        f"{config.n_layer}x{config.n_embd}, {batch}x{seq}",
        dtype,
        inputs,
        providers,
        reference,
        bytes_moved=models.weight_bytes(config, dtype),
        flops=models.forward_flops(config, batch, seq),
    )
