"""CpuExecutor: on a CPU, all layers of up to 128 rows in one call of the extension.

A pass of few rows is bound by how fast the weights stream from memory. PyTorch's operators stream them
at a third to two thirds of what the memory gives, and spend as long again between them.
``csrc/decode/cpu_path.cpp`` reads each weight once, and its threads stay together from the embeddings to the
logits. Quantised weights it widens in registers where they lie: half or a quarter of bf16's bytes to read.

Matrices that are not quantised are copied into the order in which products read them
(``csrc/decode/packed_product.h``), by the first pass and whenever they have changed. The copies take as much
memory again as the matrices. Where that is not left, or ``GPTKERN_CPU_PACKED=0`` forbids it, each pass brings
the weights into this order on the way: the same bits, later.

Products are of fp32 activations, but for a bf16 model's: those with int8 and int4 weights are of activations
rounded to int8 (``cpu_bytes.py``), and with AVX-512 BF16 those with bf16 and fp8 weights of activations
rounded to bf16, as PyTorch's are. Sums are in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gptkern import _native
from gptkern.cpu_threads import cpu_threads
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.base import TableExecutor, check_cache
from gptkern.engine.executors.changes import weights_alone
from gptkern.engine.executors.cpu_model import cpu_model
from gptkern.engine.weights_version import optimizer_steps
from gptkern.environment import fallback
from gptkern.host_memory import memory_left
from gptkern.model.decoder import Decoder
from gptkern.model.weights import decoder_weights
from gptkern.ops._dispatch import use_kernel

# More rows at once gain nothing: by then weights are read as often as arithmetic lets them be.
MOST_ROWS = 128
# From so many rows on, a draft costs more than the chance that it holds is worth.
DRAFT_ROWS = 16
# Beyond, PyTorch's products of bfloat16 are sooner done than those of widened weights: other paths widen.
# Layers of few weights have products so small that what PyTorch does between them counts for more.
PRODUCTS_OF_BFLOAT16 = "avx512_bf16"
PROMPT_TOKENS_IN_BFLOAT16 = 16
FEW_WEIGHTS = 1 << 20
DTYPES_SERVED = (torch.float32, torch.bfloat16)
# The variable that forbids packed copies (0) or demands them (1).
PACKED = "GPTKERN_CPU_PACKED"


def unserved(model: Decoder, dtype: torch.dtype) -> str | None:
    """The reason why the extension cannot run these weights with a cache of ``dtype``; None if it can."""
    parameters = list(model.parameters())
    if len({(p.dtype, p.device.type) for p in parameters}) > 1:
        return "the weights are of several dtypes or on several devices"
    if model.device.type != "cpu":
        return f"the CPU's decode step reads weights on the CPU; these are on {model.device}"
    if model.dtype not in DTYPES_SERVED:
        return f"the CPU's decode step takes float32 and bfloat16; the weights are {model.dtype}"
    if dtype != model.dtype:
        return f"the CPU's decode step keeps keys and values in the weights' {model.dtype}, not in {dtype}"
    if not all(1 in p.stride() if p.dim() > 1 else p.is_contiguous() for p in parameters):
        return "the CPU's decode step takes matrices whose rows or columns are contiguous"
    weights = decoder_weights(model)
    embeddings = (weights.tokens, weights.positions)
    if any(e is not None and e.stride(1) != 1 for e in embeddings):
        return "the CPU's decode step takes embeddings whose rows are contiguous"
    if model.quantization is not None and not all(b.is_contiguous() for b in model.buffers()):
        return "the CPU's decode step takes quantised weights that are contiguous"
    return None


class CpuExecutor(TableExecutor):
    """Runs new tokens through the extension's decode step.

    A row's logits are bitwise the same whatever else is in the pass, and with any number of threads.
    What was changed in place, moved or replaced since the last pass is what the next one reads. Of writes
    that PyTorch does not count (through ``parameter.data``, a raw pointer) into a matrix of which there is a
    copy it sees those that change one of a few values; whoever writes less calls ``weights_written``.

    Args:
        model: One that ``serves`` has no reason against. Its weights may change and move.
        cache: Of the model's shape and dtype, on the CPU.
    """

    name = "cpu"
    made_for = "cpu"

    def __init__(self, model: Decoder, cache: KVCache, max_rows: int = MOST_ROWS) -> None:
        check_cache("CpuExecutor", model, cache)
        super().__init__(model, cache, max_rows)
        self.draft_rows = min(max_rows, DRAFT_ROWS)
        layer = sum(parameter.numel() for parameter in model.transformer.h[0].parameters())
        widened = _native.extension.decode_path() != PRODUCTS_OF_BFLOAT16
        by_layers = (
            widened and model.dtype == torch.bfloat16 and model.quantization is None and layer > FEW_WEIGHTS
        )
        self.prompt_tokens = PROMPT_TOKENS_IN_BFLOAT16 if by_layers else None
        self._steps = optimizer_steps()
        self._decoder = _decoder(model)

    @staticmethod
    def serves(model: Decoder, dtype: torch.dtype) -> str | None:
        """See ``Executor``."""
        reason = weights_alone(model)
        if reason is not None:
            return reason
        if use_kernel(model.transformer.wte.weight):
            return f"the CPU's decode step is for models on the CPU; this one is on {model.device}"
        if _native.extension is None:
            return "gptkern._C is not built"
        if not _native.extension.has_decoder:
            return "the CPU's decode step needs AVX2, which this processor lacks"
        return unserved(model, dtype)

    def _launch(self, tokens: torch.Tensor, places: Sequence[tuple[list[int], int]]) -> torch.Tensor:
        return self._logits_of(list(range(len(places))), tokens, places)

    def _logits_of(
        self, wanted: list[int], tokens: torch.Tensor, places: Sequence[tuple[list[int], int]]
    ) -> torch.Tensor:
        table = self._table
        table.lay(places)
        logits = self.logits(tokens, table.storage.page_table, table.lengths, wanted, advance=True)
        table.advanced(len(places))
        return logits

    def repeated(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor | None]] | None:
        """See ``Executor``."""
        cache, table, rows = self._cache, self._table, len(tokens)
        if rows > self.max_rows:
            return None
        places = torch.arange(rows, dtype=torch.int32, device="cpu")
        logits = torch.empty(rows, self._model.spec.vocab_size, dtype=cache.dtype, device="cpu")
        where = cache.k, cache.v, table.storage.page_table, table.lengths
        arguments = (*where, tokens, places, logits, cpu_threads(), True)
        step = self._step
        # They grow where the table does not see it.
        table.forget_lengths()
        return logits, lambda: logits if step(*arguments) else None

    def logits(
        self,
        tokens: torch.Tensor,
        page_table: torch.Tensor,
        lengths: torch.Tensor,
        wanted: Sequence[int] | None = None,
        advance: bool = False,
    ) -> torch.Tensor:
        """Logits after ``tokens``, whose keys and values are written; the cache's own lengths stay.

        Rows may be consecutive tokens of one sequence: each attends to those before it. What follows the
        keys and values of the last layer is computed of the wanted rows alone.

        Args:
            tokens: ``(rows,)``, whole numbers of any dtype.
            page_table: ``(rows or more, pages)`` int32, rows contiguous.
            lengths: ``(rows or more,)`` int32: what each row's sequence holds before its token.
            wanted: The rows whose logits are returned, in that order; None: all.
            advance: The rows' ``lengths`` grow by 1 when all is done.

        Raises:
            ValueError: A token outside the vocabulary, a sequence at the end of the context, or a wanted row
                that there is not.
            RuntimeError: The weights have been given a dtype or a device that this cannot serve.
        """
        cache, tokens = self._cache, tokens.to(torch.int64).contiguous()
        rows = range(len(tokens)) if wanted is None else wanted
        places = torch.tensor(rows, dtype=torch.int32, device="cpu")
        logits = torch.empty(len(places), self._model.spec.vocab_size, dtype=cache.dtype, device="cpu")
        arguments = (cache.k, cache.v, page_table, lengths, tokens, places, logits, cpu_threads(), advance)
        while not self._step(*arguments):
            reason = unserved(self._model, cache.dtype)
            if reason is not None:
                raise RuntimeError(f"GPT: weights changed while generation was under way: {reason}")
            self._decoder.read_packed(False)  # its copies' memory is given back before others are made
            self._decoder = _decoder(self._model)
        return logits

    def weights_written(self) -> None:
        """See ``Executor``."""
        self._decoder.weights_written()

    def _step(self, *arguments: Any) -> bool:
        """The decoder's step. Fused optimizers write without PyTorch's counting it."""
        steps = optimizer_steps()
        if steps != self._steps:
            self._steps = steps
            self._decoder.weights_written()
        done: bool = self._decoder.step(*arguments)
        return done


def _decoder(model: Decoder) -> Any:
    """The extension's view of the model's weights where they lie now."""
    # Modules' dictionaries, to notice when an entry is replaced.
    owners = [
        entries
        for module in model.modules()
        for entries in (module._modules, module._parameters, module._buffers)
        if entries
    ]
    decoder = _native.extension.Decoder(cpu_model(model), owners)
    # In tensors made in inference mode PyTorch counts no write: copies of them would go stale in silence.
    counted = not any(parameter.is_inference() for parameter in model.parameters())
    decoder.read_packed(_packs(decoder.packed_bytes, counted))
    return decoder


def _packs(size: int, counted: bool = True) -> bool:
    """True if copies of so many bytes are to be made of matrices whose writes PyTorch counts, or does not."""
    wanted = os.environ.get(PACKED)
    if wanted not in (None, "0", "1"):
        raise ValueError(f"{PACKED}={wanted!r}: it takes 1, 0, or nothing: 1 where the memory is there")
    if wanted is not None or size == 0:
        return wanted == "1"
    left = memory_left()
    if not counted:
        reason = (
            "the model was made in inference mode, where PyTorch counts no writes into weights, and copies"
            f" would not follow them; make it outside, or set {PACKED}=1 if nobody writes"
        )
    elif 2 * size > left:  # the caller will want memory too: for activations, for the cache
        reason = (
            f"packed copies take {size >> 20} MiB, and half of the memory that is left is {left >> 21} MiB;"
            f" quantised weights need none, and {PACKED} decides"
        )
    else:
        return True
    fallback("the CPU's decode step", "weights as they lie, which takes up to twice as long", reason)
    return False
