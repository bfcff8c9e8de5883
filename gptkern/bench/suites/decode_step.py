"""One decode pass of ``generate``: a token of every sequence through model and cache, logits out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache as once

import torch

from gptkern.bench.problem import Inputs, Problem, Provider
from gptkern.bench.suites import _models as models
from gptkern.bench.suites import _providers as shared
from gptkern.config import GPTConfig
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.choose import Executors
from gptkern.engine.executors.persistent import PersistentExecutor
from gptkern.ops.decode_step import MOST_ROWS

# (model, batch, context)
GPU = [
    (config, batch, context)
    for config in (models.GPT2, models.LARGE)
    for batch, context in ((1, 128), (1, 1024), (1, 4096), (8, 1024), (64, 1024))
]
CPU = [(models.SMALL, 1, context) for context in (128, 1024, 4096)] + [(models.GPT2, 1, 128)]
_IN_A_QUICK_RUN = 3
# Calls that one cache has room for before it is taken back to ``context``.
ROOM = 512
# Positions of every model, so that the contexts share one.
POSITIONS = 4096 + ROOM + 1

Decode = Callable[[torch.Tensor], torch.Tensor]


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Every model, batch and context."""
    for dtype in shared.dtypes(device, quick):
        shapes = GPU if device.type == "cuda" else CPU
        for config, batch, context in shapes[: _IN_A_QUICK_RUN if quick else None]:
            yield _problem(config.replace(n_positions=POSITIONS), batch, context, dtype, device)


def filled(config: GPTConfig, batch: int, context: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Sequences of ``context`` tokens whose keys and values are random, the same in all of them."""
    cache = KVCache.for_config(
        config, max_seqs=batch, max_len=context + ROOM + 1, page_size=64, dtype=dtype, device=device
    )
    generator = torch.Generator().manual_seed(0)
    shape = (config.n_layer, context, config.n_head, config.head_dim)
    k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    cache.allocate(batch)
    forward_pass = cache.extend([context] * batch)
    for layer in range(config.n_layer):
        for new, layers in ((k, cache.k), (v, cache.v)):
            values = new[layer].to(device=device, dtype=dtype).repeat(batch, 1, 1)
            layers[layer].flatten(0, 1)[forward_pass.slots] = values
    forward_pass.commit()
    return cache


def _growing(decode: Decode, cache: KVCache, context: int) -> Decode:
    """``decode``, its cache taken back to ``context`` when it is full; the first row's logits."""

    def call(tokens: torch.Tensor) -> torch.Tensor:
        if cache.lengths[0] == cache.max_len - 1:
            for sequence in cache.sequences:
                cache.truncate(sequence, context)
        return decode(tokens)[:1]

    return call


def _problem(
    config: GPTConfig, batch: int, context: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    def inputs(device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        return (torch.randint(config.vocab_size, (batch,), generator=generator).to(device),)

    @once
    def made() -> Decode:
        cache = filled(config, batch, context, dtype, device)
        decode = Executors(models.ours(config, dtype, device), cache, batch).decode
        return _growing(decode, cache, context)

    @once
    def persistent() -> Decode:
        cache = filled(config, batch, context, dtype, device)
        decode = PersistentExecutor(models.ours(config, dtype, device), cache)
        return _growing(decode, cache, context)

    @once
    def eager() -> Decode:
        model, cache = models.ours(config, dtype, device), filled(config, batch, context, dtype, device)
        return _growing(lambda tokens: model(tokens[:, None], cache=cache).logits[:, 0], cache, context)

    @torch.inference_mode()
    def reference(tokens: torch.Tensor) -> torch.Tensor:
        cache = filled(config, 1, context, torch.float64, device)
        logits: torch.Tensor = models.exact(models.ours(config, dtype, device))(
            tokens[:1, None], cache=cache
        ).logits
        return logits[:, 0]

    providers: dict[str, Provider] = {
        "gptkern": torch.inference_mode()(lambda tokens: made()(tokens)),
        "gptkern, layer by layer": torch.inference_mode()(lambda tokens: eager()(tokens)),
    }
    if device.type == "cuda" and batch <= MOST_ROWS:
        providers["gptkern, persistent"] = torch.inference_mode()(lambda tokens: persistent()(tokens))
    token_bytes = 2 * config.n_layer * config.n_embd * dtype.itemsize
    weights = models.weight_bytes(config, dtype)
    return Problem(
        "decode_step",
        f"{config.n_layer}x{config.n_embd}, {batch} at {context}",
        dtype,
        inputs,
        providers,
        reference,
        bytes_moved=weights + batch * (context * token_bytes + config.vocab_size * dtype.itemsize),
        flops=2.0 * batch * (weights / dtype.itemsize + 2 * config.n_layer * config.n_embd * context),
    )
