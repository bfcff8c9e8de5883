"""PersistentExecutor: on a GPU, all layers of up to 8 rows in one cooperative launch."""

from __future__ import annotations

import torch

from gptkern.engine.cache import KVCache
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.model.decoder import Decoder
from gptkern.ops._dispatch import use_kernel
from gptkern.ops.decode_step import ALIGNMENT, MOST_ROWS, persistent_step, widest_normed_head


class PersistentExecutor(GraphExecutor):
    """``GraphExecutor`` with one launch for all layers in place of one a stage, and the same bits.

    It is taken only on request: it has not been measured to be faster.

    Raises:
        ValueError: The model is not on a CUDA device; see ``GraphExecutor``.
    """

    name = "persistent"
    on_request = True

    def __init__(self, model: Decoder, cache: KVCache, max_rows: int = MOST_ROWS) -> None:
        if not use_kernel(model.lm_head.weight):
            raise ValueError(f"PersistentExecutor: a CUDA device is needed; the model is on {model.device}")
        super().__init__(model, cache, min(max_rows, MOST_ROWS))

    @staticmethod
    def serves(model: Decoder, dtype: torch.dtype) -> str | None:
        """See ``Executor``."""
        return GraphExecutor.serves(model, dtype) or _unserved(model)

    def run(self, rows: int) -> torch.Tensor:
        """See ``GraphExecutor``."""
        assert self._program is not None
        storage = self._table.storage
        return persistent_step(
            self._program,
            self._tokens[:rows],
            self._live,
            storage.k,
            storage.v,
            storage.page_table[:rows],
            self._table.lengths[:rows],
            storage.kv_scales,
        )


def _unserved(model: Decoder) -> str | None:
    """The part of a decoder that the persistent step has no phase for; None if there is none."""
    if model.spec.norm_place in ("branch", "both"):
        return "the persistent step has no phase for norms of branches' outputs, which this model has"
    if model.spec.qk_norm == "whole":
        return "the persistent step has no phase for a norm of all heads at once, which this model has"
    most = widest_normed_head(model.dtype)
    if model.spec.qk_norm is not None and model.spec.head_dim > most:
        return (
            f"in {model.dtype} the persistent step norms heads of up to {most} elements; this model's have "
            f"{model.spec.head_dim}"
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_neg():
            return (
                f"the persistent step reads memory as it stands; {name} has the negative bit: its opposites"
            )
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            return (
                f"the persistent step reads contiguous weights at multiples of {ALIGNMENT} bytes; {name} has "
                f"strides {tensor.stride()} and address {tensor.data_ptr():#x}"
            )
    return None
