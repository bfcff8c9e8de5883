"""Verifying drafts: every drafted token is one more row of the step that plain generation takes.

The rows of one sequence share its pages and differ in length. Keys and values of all rows are in the cache
before attention reads, so that each row sees those before it and no other. The step's kernels compute a
row whatever its neighbours: its logits are bitwise those of the plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch

from gptkern.decode import DecodeStep
from gptkern.generate.cpu_step import MOST_ROWS, CpuStep
from gptkern.generate.executor import Executor

if TYPE_CHECKING:
    from gptkern.engine.cache import KVCache
    from gptkern.gpt import GPT


class Verify:
    """Takes the sequences of a cache through tokens and drafts.

    Args:
        executor: What plain generation of this cache takes, with a step; see ``verifier``.
        drafted: Most drafted tokens of a row.

    Attributes:
        most: Most rows of one pass.
    """

    def __init__(self, model: GPT, cache: KVCache, executor: Executor, drafted: int) -> None:
        step, self._executor = executor.step, executor
        assert step is not None
        wanted = cache.max_seqs * (drafted + 1)
        self.most = min(wanted, MOST_ROWS) if isinstance(step, CpuStep) else wanted
        self._cache, self._rows = cache, _Rows(cache, self.most)
        self._step: Callable[[torch.Tensor], torch.Tensor]
        if isinstance(step, CpuStep):
            self._step = lambda tokens: step.logits(tokens, self._rows.page_table, self._rows.seq_lens)
        else:
            self._step = DecodeStep(model, cast("KVCache", self._rows))

    def __call__(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits after each of every sequence's ``tokens``, ``(all tokens, vocab_size)``.

        The cache's lengths stay: ``keep`` says how many of them it is to hold.

        Raises:
            RuntimeError: The model was hooked or changed since, and its layers are to be called.
        """
        reason = self._executor.overtaken()
        if reason is not None:
            raise RuntimeError(f"generate: {reason}, since generation with speculate began; begin it anew")
        self._rows.lay([len(row) for row in tokens])
        flat = [token for row in tokens for token in row]
        return self._step(torch.tensor(flat, device=self._cache.device))

    def keep(self, counts: Sequence[int]) -> None:
        """Hold the first so many of the last call's tokens of each sequence, and give back spare pages."""
        self._cache.advance(counts)
        for sequence, length in zip(self._cache.sequences, self._cache.lengths, strict=True):
            self._cache.truncate(sequence, length)


def verifier(model: GPT, cache: KVCache, executor: Executor, drafted: int) -> Verify | None:
    """A verifier whose logits equal the executor's bit for bit; None where a row's follow its neighbours."""
    return None if executor.step is None else Verify(model, cache, executor, drafted)


class _Rows:
    """A cache as ``DecodeStep`` sees it, with a row for each new token instead of each sequence."""

    def __init__(self, cache: KVCache, most: int) -> None:
        self._cache = cache
        self.max_seqs, self.page_size = most, cache.page_size
        self.k, self.v, self.dtype, self.device = cache.k, cache.v, cache.dtype, cache.device
        self.storage = cache.storage
        self.lengths: list[int] = []
        self.sequences: list[int] = []
        with torch.inference_mode(False):
            shape = (most, cache.max_pages_per_seq)
            self.page_table = torch.zeros(shape, dtype=torch.int32, device=cache.device)
            self.seq_lens = torch.zeros(most, dtype=torch.int32, device=cache.device)

    def lay(self, counts: Sequence[int]) -> None:
        """Make room for, and rows of, so many new tokens of each sequence."""
        cache = self._cache
        cache.reserve(counts)
        owners = [index for index, count in enumerate(counts) for _ in range(count)]
        self.sequences = [cache.sequences[index] for index in owners]
        self.lengths = [
            length + ahead
            for length, count in zip(cache.lengths, counts, strict=True)
            for ahead in range(count)
        ]
        self.page_table[: len(owners)] = cache.page_table[torch.tensor(owners, device=self.device)]
        self.seq_lens[: len(owners)] = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)

    def reserve(self, new_lengths: Sequence[int]) -> None:
        """``lay`` has."""

    def advance(self, new_lengths: Sequence[int]) -> None:
        """``Verify.keep`` will."""

    def refresh(self) -> None:
        """``lay`` will."""
