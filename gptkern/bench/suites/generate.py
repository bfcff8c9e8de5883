"""Generation end to end: prompt in, tokens out, sampling included."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gptkern.bench.problem import Inputs, Problem
from gptkern.bench.suites import _models as models
from gptkern.bench.suites import _providers as shared
from gptkern.config import GPTConfig

PROMPT = 32
# (model, batch, new tokens)
GPU = [(models.GPT2, 1, 128), (models.GPT2, 8, 128), (models.LARGE, 1, 128), (models.GPT2, 64, 128)]
CPU = [(models.SMALL, 1, 32), (models.GPT2, 1, 16), (models.GPT2, 1, 64), (models.GPT2, 8, 32)]


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Every model and batch, greedy, each provider's tokens checked against its own model's argmax."""
    kinds = [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]
    for dtype in kinds[:1] if quick else kinds:
        for config, batch, new in shared.of_widths(device, GPU, CPU, quick):
            yield _problem(config, batch, new, dtype, device)


def _problem(config: GPTConfig, batch: int, new: int, dtype: torch.dtype, device: torch.device) -> Problem:
    def inputs(device: torch.device) -> Inputs:
        return (torch.randint(config.vocab_size, (batch, PROMPT), device=device),)

    def gptkern(ids: torch.Tensor) -> torch.Tensor:
        tokens = models.ours(config, dtype, device).generate(ids, max_new_tokens=new, do_sample=False)
        assert isinstance(tokens, torch.Tensor)
        return _choices(tokens)

    @torch.inference_mode()
    def transformers(ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(ids)
        return _choices(
            models.theirs(config, dtype, device).generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False
            )
        )

    def _choices(tokens: torch.Tensor) -> torch.Tensor:
        # In low precision two right answers may differ: only full precision compares the tokens.
        return tokens if dtype == torch.float32 else torch.tensor(tokens.shape)

    step = models.weight_bytes(config, dtype)
    cache = 2 * config.n_layer * config.n_embd * dtype.itemsize * batch * (PROMPT + new // 2)
    return Problem(
        "generate",
        f"{config.n_layer}x{config.n_embd}, batch {batch}, {new} tokens",
        dtype,
        inputs,
        {"gptkern": gptkern, "transformers": transformers},
        transformers,
        bytes_moved=float(new * (step + cache)),
        flops=2.0 * batch * new * models.weight_bytes(config, torch.int8),
        exact=True,
    )
