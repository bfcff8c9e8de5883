"""TorchExecutor: the model's own layers, as PyTorch calls modules; it serves anything."""

from __future__ import annotations

import torch

from gptkern.engine.executors.base import Executor, undone_on_failure
from gptkern.engine.rows import Rows
from gptkern.model.decoder import Decoder, GPTOutput


class TorchExecutor(Executor):
    """Calls the model, one sequence after another: PyTorch's products depend on how many rows they have.

    So a sequence's bits depend on its own tokens and on how they were divided into passes, and on nothing
    else. Whatever a module computes, hooks included, is computed.
    """

    name = "torch"
    made_for = "any"
    row_invariant = False

    @staticmethod
    def serves(model: Decoder, dtype: torch.dtype) -> str | None:
        """See ``Executor``: it serves every model."""
        return None

    def forward(self, rows: Rows) -> torch.Tensor:
        """See ``Executor``."""
        logits: list[torch.Tensor] = []
        start = 0
        with undone_on_failure(self._cache, rows.sequences):
            for place, (sequence, count, wanted) in enumerate(
                zip(rows.sequences, rows.counts, rows.wanted, strict=True)
            ):
                tokens, steering = rows.tokens[start : start + count], rows.steered(place)
                start += count
                output: GPTOutput = self._model(
                    tokens[None],
                    cache=self._cache,
                    sequences=[sequence],
                    logits_to_keep=max(wanted, 1),
                    **({} if steering is None else {"steering": steering.vectors}),
                )
                logits.append(output.logits[0, -wanted:] if wanted else output.logits[0, :0])
        return logits[0] if len(logits) == 1 else torch.cat(logits)
