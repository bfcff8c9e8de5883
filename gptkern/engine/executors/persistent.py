"""PersistentExecutor: on a GPU, all layers of up to 8 rows in one cooperative launch."""

from __future__ import annotations

import torch

from gptkern.engine.cache import KVCache
from gptkern.engine.executors.changes import unlike_gpt
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.weights import step_weights
from gptkern.model.decoder import Decoder
from gptkern.ops._dispatch import use_kernel
from gptkern.ops.decode_step import MOST_ROWS, StepWeights, persistent_step


class PersistentExecutor(GraphExecutor):
    """``GraphExecutor`` with one launch for all layers in place of five a layer, and the same bits.

    It is taken only on request: it has not been measured to be faster.

    Raises:
        ValueError: The model is not on a CUDA device; see ``GraphExecutor``.
    """

    name = "persistent"
    on_request = True

    def __init__(self, model: Decoder, cache: KVCache, max_rows: int = MOST_ROWS) -> None:
        if not use_kernel(model.lm_head.weight):
            raise ValueError(f"PersistentExecutor: a CUDA device is needed; the model is on {model.device}")
        self._weights: StepWeights | None = None
        super().__init__(model, cache, min(max_rows, MOST_ROWS))

    @staticmethod
    def serves(model: Decoder, dtype: torch.dtype) -> str | None:
        """See ``Executor``."""
        quantization = model.quantization
        if quantization is not None and quantization.floats:
            return (
                f"one launch for a pass takes matrices of one format; beside {quantization.format} "
                f"{len(quantization.floats)} of them are floats here"
            )
        return unlike_gpt(model.spec) or GraphExecutor.serves(model, dtype)

    def _weights_moved(self) -> None:
        super()._weights_moved()
        self._weights = step_weights(self._model)

    def run(self, rows: int) -> torch.Tensor:
        """See ``GraphExecutor``."""
        assert self._weights is not None
        storage = self._table.storage
        return persistent_step(
            self._weights,
            self._tokens[:rows],
            self._live,
            storage.k,
            storage.v,
            storage.page_table[:rows],
            self._table.lengths[:rows],
            storage.kv_scales,
        )
