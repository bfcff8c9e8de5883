"""The loop: prefill once, then one token of every running row a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from gptkern.engine.cache import PAGE_SIZE, KVCache
from gptkern.engine.executors.choose import Executors
from gptkern.engine.executors.graph import MOST_ROWS
from gptkern.engine.sampling import RowParams, Sampler, SamplerRow, row_keys
from gptkern.engine.settings import Settings
from gptkern.engine.stop_strings import RowText
from gptkern.generate.prompt import Prompts
from gptkern.generate.speculate import speculative_steps
from gptkern.generate.step import Step, finish, refuse_failures

if TYPE_CHECKING:
    from gptkern.gpt import GPT
from gptkern.model.decoder import GPTOutput

# Where the next step is under way before the host looks at this one's tokens. A row that turns out to
# have finished has then computed one token too many, which nobody sees.
AHEAD_ON = ("cuda",)


@torch.inference_mode()
def steps(
    model: GPT,
    prompts: Prompts,
    settings: Settings,
    *,
    texts: Sequence[RowText] | None = None,
    logprobs: bool = False,
) -> Iterator[Step]:
    """Generate, one step an item, until every row has finished.

    Rows are the prompts in order, each ``num_return_sequences`` times; all copies of one share its
    prefill. A row that has finished leaves the batch.

    Args:
        texts: One a row, told of every token; a row whose text has stopped finishes.
    """
    copies = settings.num_return_sequences
    cache = KVCache.for_config(
        model.config,
        max_seqs=len(prompts.rows) * copies,
        max_len=model.config.n_positions,
        cache_tokens=pool_tokens(prompts, settings, len(prompts.rows) * copies),
        **model.cache_options(settings.kv_cache_dtype),
        device=model.device,
    )
    logits = prefill(model, prompts, cache)
    rows = _fork(cache, len(prompts.rows), copies)
    logits = logits[[row // copies for row in rows]]
    sampler = Sampler(model.config.vocab_size, model.device)
    params = RowParams(settings, model.config.vocab_size, 0 if logprobs else None)
    keys = row_keys(settings, len(prompts.rows))
    sampled = [
        SamplerRow(params, prompts.rows[row // copies], seed=keys[row][0], request=keys[row][1])
        for row in rows
    ]
    executors = Executors(model, cache, max(MOST_ROWS, len(rows)))
    if settings.speculate and executors.decode.row_invariant:
        yield from speculative_steps(
            logits, executors, sampler, sampled, cache, prompts, settings, rows, texts
        )
        return
    ahead = model.device.type in AHEAD_ON
    for index in range(settings.max_new):
        drawn = sampler.draw(sampled, logits)
        last = index + 1 == settings.max_new
        if ahead and not last:
            logits = executors.decode(drawn.tokens)
        draws = drawn.read()
        refuse_failures(rows, draws)
        tokens = [draw.tokens[0] for draw in draws]
        for row, token in zip(sampled, tokens, strict=True):
            row.push(token)
        finished = [finish(t, row, settings, texts, last) for t, row in zip(tokens, rows, strict=True)]
        scores = [draw.logprobs[0] for draw in draws if draw.logprobs is not None]
        yield Step(rows, tokens, scores if logprobs else None, finished)
        kept = [i for i, reason in enumerate(finished) if reason is None]
        if not kept:
            return
        chosen = drawn.tokens
        if len(kept) < len(rows):
            _drop(cache, kept)
            rows, sampled = [rows[i] for i in kept], [sampled[i] for i in kept]
            logits, chosen = logits[kept], chosen[kept]
        if not ahead:
            logits = executors.decode(chosen)


def pool_tokens(prompts: Prompts, settings: Settings, rows: int) -> int:
    """Tokens that a cache has to have room for, so that each of ``rows`` can be as long as the longest."""
    return rows * -(-(prompts.longest + settings.max_new) // PAGE_SIZE) * PAGE_SIZE


def prefill(model: GPT, prompts: Prompts, cache: KVCache) -> torch.Tensor:
    """Run the prompts through the model into the cache; logits after each, ``(batch, vocab_size)``."""
    ids, mask = prompts.ids, prompts.mask
    if mask is not None:
        # Whatever stands in the padding may be no token of the model.
        ids = ids.masked_fill(~mask, 0)
    output: GPTOutput = model(ids, attention_mask=mask, cache=cache, logits_to_keep=1)
    return output.logits[:, -1]


def _fork(cache: KVCache, prompts: int, copies: int) -> list[int]:
    """Give every prompt its further copies; which row each of the cache's sequences is."""
    rows = [prompt * copies for prompt in range(prompts)]
    for prompt, sequence in enumerate(cache.sequences):
        for copy in range(1, copies):
            cache.fork(sequence)
            rows.append(prompt * copies + copy)
    return rows


def _drop(cache: KVCache, kept: Sequence[int]) -> None:
    for index, sequence in enumerate(cache.sequences):
        if index not in kept:
            cache.free(sequence)
