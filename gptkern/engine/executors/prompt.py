"""PromptExecutor: prompts in units that begin at fixed places, whatever passes they are divided into."""

from __future__ import annotations

import torch

from gptkern.engine.cache import KVCache
from gptkern.engine.executors.base import Executor, undone_on_failure
from gptkern.engine.rows import Rows
from gptkern.engine.steering import Steering

# Tokens of a unit. On a CPU 64 rows cost about as much a row as 512 do, and the shorter the units, the more
# of a prompt is found again. On a GPU a unit's launches take longer than its arithmetic.
UNIT_ON_CPU, UNIT = 64, 512


class PromptExecutor:
    """Runs prompts by the model's layers, where these are faster than the executor of single tokens.

    PyTorch's products depend on how many rows they have. So a prompt runs in units that begin at multiples of
    ``unit``, each sequence by itself. A prompt's last unit, where it is short, runs on the executor of single
    tokens, together with those of other sequences. A token's bits depend on its own prompt alone.

    Args:
        cache: Where keys and values lie.
        layers: Runs the model's layers.
        single: Runs single tokens, and units of up to ``single.prompt_tokens``.

    Attributes:
        unit: Tokens of a unit.
    """

    def __init__(self, cache: KVCache, layers: Executor, single: Executor) -> None:
        self._cache, self._layers, self._single = cache, layers, single
        self._short = single.prompt_tokens or 0
        self.unit = UNIT_ON_CPU if cache.device.type == "cpu" else UNIT

    def forward(self, rows: Rows) -> torch.Tensor:
        """See ``Executor.forward``. Every sequence's tokens end at a multiple of ``unit`` or with its prompt.

        Logits are wanted after its last token at most.
        """
        tails = [
            self._tail(self._cache.length(sequence), count)
            for sequence, count in zip(rows.sequences, rows.counts, strict=True)
        ]
        tokens = rows.tokens.split(list(rows.counts))
        with undone_on_failure(self._cache, rows.sequences):
            logits = [
                self._by_layers(
                    sequence, part[: len(part) - tail], 0 if tail else rows.wanted[place], rows.steered(place)
                )
                for place, (sequence, part, tail) in enumerate(
                    zip(rows.sequences, tokens, tails, strict=True)
                )
            ]
            places = [place for place, tail in enumerate(tails) if tail]
            if places:
                wanted = [rows.wanted[place] for place in places]
                short = Rows(
                    [rows.sequences[place] for place in places],
                    [tails[place] for place in places],
                    torch.cat([tokens[place][-tails[place] :] for place in places]),
                    wanted,
                    [rows.steered(place) for place in places],
                )
                ends = self._single.forward(short).split(wanted)
                for place, end in zip(places, ends, strict=True):
                    logits[place] = end
        return torch.cat([end for end in logits if end is not None])

    def _tail(self, length: int, count: int) -> int:
        """The number of last tokens, out of ``count`` that follow ``length``, that are a short unit."""
        tail = min((length + count) % self.unit, count)
        return tail if tail <= self._short else 0

    def _by_layers(
        self, sequence: int, tokens: torch.Tensor, wanted: int, steering: Steering | None
    ) -> torch.Tensor | None:
        """Run tokens unit by unit; the logits that are wanted after the last, None where there are none."""
        logits: torch.Tensor | None = None
        while len(tokens):
            count = min(self.unit - self._cache.length(sequence) % self.unit, len(tokens))
            own = wanted if count == len(tokens) else 0
            logits = self._layers.forward(Rows([sequence], [count], tokens[:count], [own], [steering]))
            tokens = tokens[count:]
        return logits
