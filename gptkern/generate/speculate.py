"""The loop with drafts: several tokens a pass where a row repeats itself, and the same tokens as without.

A pass computes the logits after every drafted token, and the sampler draws at each of them what plain steps
would draw there: a draw depends on seed, copy and step alone. A draft holds while it equals the draws.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from gptkern.engine.lookup import Lookup
from gptkern.engine.rows import Rows
from gptkern.generate.step import FinishReason, Step, finish, refuse_failures

if TYPE_CHECKING:
    from gptkern.engine.cache import KVCache
    from gptkern.engine.executors.choose import Executors
    from gptkern.engine.sampling import Sampler, SamplerRow
    from gptkern.engine.settings import Settings
    from gptkern.engine.stop_strings import RowText
    from gptkern.generate.prompt import Prompts

Token = tuple[int, float | None, FinishReason | None]


def speculative_steps(
    logits: torch.Tensor,
    executors: Executors,
    sampler: Sampler,
    sampled: list[SamplerRow],
    cache: KVCache,
    prompts: Prompts,
    settings: Settings,
    rows: list[int],
    texts: Sequence[RowText] | None,
) -> Iterator[Step]:
    """The steps that ``loop.steps`` would make from ``logits`` ``(rows, vocab_size)`` on, in fewer passes."""
    lookups = [Lookup(prompts.rows[row // settings.num_return_sequences]) for row in rows]
    line, made = _Line(rows), dict.fromkeys(rows, 0)
    drafts: list[list[int]] = [[] for _ in rows]
    held: list[int] = []
    executor = executors.decode
    most = executor.max_rows or 0
    while True:
        draws = sampler.draw(sampled, logits, drafts).read()
        refuse_failures(rows, draws)
        drawn = [draw.tokens for draw in draws]
        for sequence, length, tokens in zip(cache.sequences, held, drawn, strict=False):
            cache.truncate(sequence, length + len(tokens))
        line.drafted += sum(map(len, drafts))
        line.accepted += sum(len(tokens) - 1 for tokens in drawn)
        over: set[int] = set()
        for ahead in range(max(map(len, drawn))):
            for place, (row, tokens) in enumerate(zip(rows, drawn, strict=True)):
                if place in over or ahead >= len(tokens):
                    continue
                made[row] += 1
                reason = finish(tokens[ahead], row, settings, texts, made[row] == settings.max_new)
                if reason is not None:
                    over.add(place)
                lookups[place].push(tokens[ahead])
                sampled[place].push(tokens[ahead])
                scores = draws[place].logprobs
                line.push(row, (tokens[ahead], None if scores is None else scores[ahead], reason))
            yield from line.ready()
        if over:
            kept = [place for place in range(len(rows)) if place not in over]
            if not kept:
                return
            for place, sequence in enumerate(cache.sequences):
                if place in over:
                    cache.free(sequence)
            sampled = [sampled[place] for place in kept]
            rows, drawn = [rows[place] for place in kept], [drawn[place] for place in kept]
            lookups = [lookups[place] for place in kept]
        if executors.decode is not executor:
            raise RuntimeError(
                f"generate: {executors.reason}, since generation with speculate began; begin it anew"
            )
        drafts = _drafts(lookups, [settings.max_new - made[row] - 1 for row in rows], settings, most)
        held = cache.lengths
        fed = [[tokens[-1], *draft] for tokens, draft in zip(drawn, drafts, strict=True)]
        counts = [len(tokens) for tokens in fed]
        flat = torch.tensor([token for tokens in fed for token in tokens], device=cache.device)
        logits = executor.forward(Rows(cache.sequences, counts, flat, counts))


def _drafts(lookups: Sequence[Lookup], room: Sequence[int], settings: Settings, most: int) -> list[list[int]]:
    """Each row's draft; rows that have one share alike what the pass has room for."""
    wanted = [lookup.draft(min(settings.speculate, left)) for lookup, left in zip(lookups, room, strict=True)]
    share = max((most - len(lookups)) // max(sum(map(bool, wanted)), 1), 0)
    return [draft[:share] for draft in wanted]


class _Line:
    """Rows' tokens, waiting until every running row has its next one."""

    def __init__(self, rows: Sequence[int]) -> None:
        self._waiting: dict[int, deque[Token]] = {row: deque() for row in rows}
        self.drafted = self.accepted = 0

    def push(self, row: int, token: Token) -> None:
        """Take a row's next token."""
        self._waiting[row].append(token)

    def ready(self) -> Iterator[Step]:
        """The steps that are whole."""
        while self._waiting and all(self._waiting.values()):
            rows = list(self._waiting)
            tokens, logprobs, reasons = zip(*(w.popleft() for w in self._waiting.values()), strict=True)
            scores = None if logprobs[0] is None else list(logprobs)
            step = Step(rows, list(tokens), scores, list(reasons), self.drafted, self.accepted)
            self.drafted = self.accepted = 0
            for row, reason in zip(rows, reasons, strict=True):
                if reason is not None:
                    del self._waiting[row]
            yield step
