"""Sampling with top-k and top-p: bound by reading the logits once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gptkern import ops
from gptkern.bench.problem import Inputs, Problem, Provider, Unavailable
from gptkern.bench.suites import _providers as shared

# (batch, vocab)
SHAPES = [(1, 50257), (32, 50257), (1, 128256), (64, 128256), (64, 50257)]
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.9


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Every shape, in the dtype that engines sample in."""
    for batch, vocab in shared.of_widths(device, SHAPES, SHAPES[:3], quick):
        yield _problem(batch, vocab, device)


def _token_mask(logits: torch.Tensor) -> torch.Tensor:
    """The mask of the tokens that remain after top-k, then top-p."""
    values, order = (logits / TEMPERATURE).topk(TOP_K)
    probs = torch.softmax(values, -1)
    inside = probs.cumsum(-1) - probs < TOP_P
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, inside)


def _choices_in_mask(tokens: list[torch.Tensor], inputs: Inputs) -> torch.Tensor:
    return _token_mask(inputs[0].double()).gather(1, tokens[0].view(-1, 1)).float()


def _sorting(logits: torch.Tensor) -> torch.Tensor:
    """PyTorch's way: sort the vocabulary, cut, draw."""
    values, order = (logits / TEMPERATURE).sort(descending=True)
    values[:, TOP_K:] = float("-inf")
    probs = torch.softmax(values, -1)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= TOP_P, 0.0)
    return order.gather(1, torch.multinomial(probs, 1))[:, 0]


def _transformers(logits: torch.Tensor) -> torch.Tensor:
    if not shared.installed("transformers"):
        raise Unavailable("transformers is not installed: pip install 'gptkern[transformers]'")
    from transformers.generation import logits_process as process

    ids = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
    scores: Any = logits
    for warper in (
        process.TemperatureLogitsWarper(TEMPERATURE),
        process.TopKLogitsWarper(TOP_K),
        process.TopPLogitsWarper(TOP_P),
    ):
        scores = warper(ids, scores)
    return torch.multinomial(torch.softmax(scores, -1), 1)[:, 0]


def _flashinfer(logits: torch.Tensor) -> torch.Tensor:
    if not logits.is_cuda:
        raise Unavailable("FlashInfer needs a GPU")
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    tokens: torch.Tensor = top_k_top_p_sampling_from_logits(
        logits / TEMPERATURE, TOP_K, TOP_P, filter_apply_order="top_k_first"
    )
    return tokens.long()


def _problem(batch: int, vocab: int, device: torch.device) -> Problem:
    params = ops.SamplingParams.make(
        batch, vocab, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P, device=device
    )
    state = ops.SamplerState.make(batch, vocab, seed=0, device=device)

    def inputs(device: torch.device) -> Inputs:
        return (3 * torch.randn(batch, vocab, device=device),)

    def gptkern(logits: torch.Tensor) -> torch.Tensor:
        return ops.sample(logits, params, state=state).tokens

    providers: dict[str, Provider] = {"gptkern": gptkern, "sorting": _sorting, "transformers": _transformers}
    if shared.installed("flashinfer"):
        providers["flashinfer"] = _flashinfer
    return Problem(
        "sample",
        f"{batch}x{vocab}",
        torch.float32,
        inputs,
        providers,
        lambda logits: torch.ones(batch, 1, device=logits.device),
        bytes_moved=4.0 * batch * vocab,
        comparable=_choices_in_mask,
    )
