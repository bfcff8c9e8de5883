"""Beam search over a model: each pass advances the beams and forks or drops their cached sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from gptkern.engine.beam import Beam, BeamSearch
from gptkern.engine.cache import KVCache
from gptkern.engine.engine import Engine
from gptkern.engine.settings import Settings
from gptkern.generate.loop import pool_tokens
from gptkern.generate.prompt import Prompts

if TYPE_CHECKING:
    from gptkern.gpt import GPT
    from gptkern.tokenizer import Tokenizer


@torch.inference_mode()
def beam_search(model: GPT, prompts: Prompts, settings: Settings, tokenizer: Tokenizer | None) -> list[Beam]:
    """The ``num_return_sequences`` best beams of each prompt, best first, prompt after prompt."""
    most = len(prompts.rows) * settings.num_beams
    search = BeamSearch(prompts.rows, settings, model.spec.vocab_size, model.device, tokenizer)
    tokens = pool_tokens(prompts, settings, most)
    with model.engines.engine(model, most, tokens, settings.kv_cache_dtype) as engine:
        cache = engine.cache
        # An engine that was kept chose its executor for the model as it was at the last call.
        engine.executors.look_again()
        try:
            return _search(engine, prompts, search)
        finally:
            cache.clear()


def _search(engine: Engine, prompts: Prompts, search: BeamSearch) -> list[Beam]:
    cache = engine.cache
    logits = torch.cat([engine.prefilled(prompt) for prompt in prompts.rows])
    while True:
        parents, tokens = search.advance(logits)
        if not parents:
            return search.best()
        sequences = cache.sequences
        _follow(cache, [sequences[row] for row in parents])
        logits = engine.executors.decode(torch.tensor(tokens, device=cache.device))


def _follow(cache: KVCache, parents: Sequence[int]) -> None:
    """Make the cache's sequences continue ``parents``, in that order, however many there are."""
    surplus = len(cache.sequences) - len(parents)
    for _ in range(-surplus):
        cache.fork(parents[0])
    cache.reorder([*parents, *[parents[0]] * surplus])
    for sequence in cache.sequences[len(parents) :]:
        cache.free(sequence)
