"""Beam search, with the scores and the stopping rules of transformers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gptkern.engine.cache import KVCache
from gptkern.engine.rules import RowRules, Rules
from gptkern.engine.settings import Settings
from gptkern.engine.stop_strings import RowText
from gptkern.generate.executor import Executor
from gptkern.generate.loop import pool_tokens, prefill
from gptkern.generate.prompt import Prompts
from gptkern.generate.step import FinishReason

if TYPE_CHECKING:
    from gptkern.gpt import GPT
    from gptkern.tokenizer import Tokenizer


@dataclass(frozen=True)
class Beam:
    """A way on from one prompt.

    Attributes:
        tokens: New tokens.
        score: Sum of their log-probabilities; of a complete beam, divided by its length penalty.
        finish_reason: Of a complete beam; "length" while it runs.
    """

    tokens: list[int] = field(default_factory=list)
    score: float = 0.0
    finish_reason: FinishReason = "length"


@dataclass
class _Search:
    """The search from one prompt: running beams, best first, and the best complete ones."""

    row: int
    prompt: list[int]
    running: list[Beam] = field(default_factory=lambda: [Beam()])
    complete: list[Beam] = field(default_factory=list)


@torch.inference_mode()
def beam_search(model: GPT, prompts: Prompts, settings: Settings, tokenizer: Tokenizer | None) -> list[Beam]:
    """The ``num_return_sequences`` best beams of each prompt, best first, prompt after prompt.

    All searches share each forward pass. One that can no longer improve leaves the batch.
    """
    searches = [_Search(row, tokens) for row, tokens in enumerate(prompts.rows)]
    rules = Rules(settings)
    cache = KVCache.for_config(
        model.config,
        max_seqs=len(searches) * settings.num_beams,
        max_len=model.config.n_positions,
        cache_tokens=pool_tokens(prompts, settings, len(searches) * settings.num_beams),
        **model.cache_options(settings.kv_cache_dtype),
        device=model.device,
    )
    logits = prefill(model, prompts, cache)
    step = Executor(model, cache, rows=len(searches) * settings.num_beams, steps=settings.max_new - 1)
    active = searches
    while True:
        _check(logits, active)
        scores = _processed(logits.float().log_softmax(-1), active, settings, rules)
        parents = _advance(scores, active, settings, tokenizer)
        sequences = cache.sequences
        active = [search for search in active if search.running]
        if not active:
            break
        _follow(cache, [sequences[row] for row in parents])
        tokens = [beam.tokens[-1] for search in active for beam in search.running]
        logits = step(torch.tensor(tokens, device=model.device))
    return [beam for search in searches for beam in search.complete[: settings.num_return_sequences]]


def _check(logits: torch.Tensor, searches: Sequence[_Search]) -> None:
    """Refuse rows of logits that no distribution can be made of, as sampling does."""
    rows = [(search.row, beam) for search in searches for beam in range(len(search.running))]
    # The largest is NaN where one is.
    for (row, beam), largest in zip(rows, logits.amax(-1).tolist(), strict=True):
        if math.isfinite(largest):
            continue
        where = f"generate: row {row} of the prompts, beam {beam}: the logits"
        if largest == -math.inf:
            raise ValueError(f"{where} leave no token to choose: every one is -inf")
        held = "NaN" if math.isnan(largest) else "+inf"
        raise ValueError(f"{where} hold {held}; numbers and -inf are accepted")


def _processed(
    logprobs: torch.Tensor, searches: Sequence[_Search], settings: Settings, rules: Rules
) -> torch.Tensor:
    """Log-probabilities ``(rows, vocab_size)`` after biases, penalties, bans and the minimum length."""
    rows = [(search.prompt, beam) for search in searches for beam in search.running]
    penalty, vocab_size = settings.repetition_penalty, logprobs.shape[1]
    for row, (prompt, beam) in zip(logprobs, rows, strict=True):
        own = RowRules(rules, [*prompt, *beam.tokens])
        verdict = own.verdict()
        _add(row, verdict.biases)
        if penalty != 1.0:
            seen = torch.tensor(sorted({*prompt, *beam.tokens}), device=row.device)
            row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
        if settings.presence_penalty or settings.frequency_penalty:
            counts = Counter(beam.tokens)
            _add(
                row,
                {t: -settings.frequency_penalty * n - settings.presence_penalty for t, n in counts.items()},
            )
        row[sorted(verdict.banned)] = -torch.inf
        if len(beam.tokens) < settings.min_new:
            row[[token for token in settings.eos if token < vocab_size]] = -torch.inf
    return logprobs


def _add(row: torch.Tensor, amounts: Mapping[int, float]) -> None:
    if amounts:
        row[list(amounts)] += torch.tensor(list(amounts.values()), dtype=row.dtype, device=row.device)


def _advance(
    logprobs: torch.Tensor, searches: Sequence[_Search], settings: Settings, tokenizer: Tokenizer | None
) -> list[int]:
    """Take every search one token on; for each beam that runs then, the row it continues."""
    # Enough that num_beams can go on even if every end-of-text token is among the best.
    candidates = max(2, 1 + len(settings.eos)) * settings.num_beams
    vocab_size = logprobs.shape[1]
    parents: list[int] = []
    start = 0
    for search in searches:
        beams = search.running
        before = torch.tensor([beam.score for beam in beams], device=logprobs.device)
        total = (logprobs[start : start + len(beams)] + before[:, None]).flatten()
        top = total.topk(min(candidates, total.numel()))
        if top.values[0] == -math.inf:
            raise ValueError(
                f"generate: row {search.row} of the prompts: the options bar every token there is"
            )
        running: list[Beam] = []
        rows: list[int] = []
        for rank, (score, flat) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            parent, token = divmod(flat, vocab_size)
            tokens = [*beams[parent].tokens, token]
            reason = _finish_reason(tokens, search.prompt, settings, tokenizer)
            if reason is None:
                running.append(Beam(tokens, score))
                rows.append(start + parent)
            elif rank < settings.num_beams:
                search.complete.append(Beam(tokens, score / len(tokens) ** settings.length_penalty, reason))
        start += len(beams)
        search.complete.sort(key=lambda beam: -beam.score)
        del search.complete[settings.num_beams :]
        search.running = running[: settings.num_beams]
        if _closed(search, settings):
            search.running = []
        parents += rows[: len(search.running)]
    return parents


def _finish_reason(
    tokens: list[int], prompt: list[int], settings: Settings, tokenizer: Tokenizer | None
) -> FinishReason | None:
    if tokens[-1] in settings.eos:
        return "stop"
    if settings.stop_strings:
        assert tokenizer is not None
        text = RowText(tokenizer, settings.stop_strings, prompt)
        for token in tokens:
            text.push(token)
        if text.stopped:
            return "stop"
    return "length" if len(tokens) == settings.max_new else None


def _closed(search: _Search, settings: Settings) -> bool:
    """Whether no running beam is taken to beat the complete ones."""
    if len(search.complete) < settings.num_beams or not search.running:
        return False
    if settings.early_stopping is True:
        return True
    best = search.running[0]
    longest = settings.early_stopping == "never" and settings.length_penalty > 0
    length = settings.max_new if longest else len(best.tokens)
    return bool(best.score / length**settings.length_penalty <= search.complete[-1].score)


def _follow(cache: KVCache, parents: Sequence[int]) -> None:
    """Make the cache's sequences continue ``parents``, in that order, however many there are."""
    surplus = len(cache.sequences) - len(parents)
    for _ in range(-surplus):
        cache.fork(parents[0])
    cache.reorder([*parents, *[parents[0]] * surplus])
    for sequence in cache.sequences[len(parents) :]:
        cache.free(sequence)
