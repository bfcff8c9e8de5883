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


class _Growing:
    """``decode``, its cache taken back to ``context`` when it is full; the first row's logits."""

    def __init__(self, decode: Decode, cache: KVCache, context: int) -> None:
        self._decode, self._cache, self._context = decode, cache, context

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._cache.lengths[0] == self._cache.max_len - 1:
            self.restart()
        return self._decode(tokens)[:1]

    def restart(self) -> None:
        for sequence in self._cache.sequences:
            self._cache.truncate(sequence, self._context)


def _problem(
    config: GPTConfig, batch: int, context: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    def inputs(device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        return (torch.randint(config.vocab_size, (batch,), generator=generator).to(device),)

    @once
    def made() -> _Growing:
        cache = filled(config, batch, context, dtype, device)
        decode = Executors(models.ours(config, dtype, device), cache, batch).decode
        return _Growing(decode, cache, context)

    @once
    def persistent() -> _Growing:
        cache = filled(config, batch, context, dtype, device)
        decode = PersistentExecutor(models.ours(config, dtype, device), cache)
        return _Growing(decode, cache, context)

    @once
    def eager() -> _Growing:
        model, cache = models.ours(config, dtype, device), filled(config, batch, context, dtype, device)
        return _Growing(lambda tokens: model(tokens[:, None], cache=cache).logits[:, 0], cache, context)

    @torch.inference_mode()
    def reference(tokens: torch.Tensor) -> torch.Tensor:
        cache = filled(config, 1, context, torch.float64, device)
        logits: torch.Tensor = models.exact(models.ours(config, dtype, device))(
            tokens[:1, None], cache=cache
        ).logits
        return logits[:, 0]

    makers = {"gptkern": made, "gptkern, layer by layer": eager}
    if device.type == "cuda" and batch <= MOST_ROWS:
        makers["gptkern, persistent"] = persistent

    def provider(name: str) -> Provider:
        return torch.inference_mode()(lambda tokens: makers[name]()(tokens))

    @torch.inference_mode()
    def restart(name: str) -> None:
        makers[name]().restart()

    token_bytes = 2 * config.n_layer * config.n_embd * dtype.itemsize
    weights = models.weight_bytes(config, dtype)
    return Problem(
        "decode_step",
        f"{config.n_layer}x{config.n_embd}, {batch} at {context}",
        dtype,
        inputs,
        {name: provider(name) for name in makers},
        reference,
        bytes_moved=weights + batch * (context * token_bytes + config.vocab_size * dtype.itemsize),
        flops=2.0 * batch * (weights / dtype.itemsize + 2 * config.n_layer * config.n_embd * context),
        restart=restart,
    )
