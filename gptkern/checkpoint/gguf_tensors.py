"""Tensors of a GGUF file as a model's parameters: dequantised when read, or packed as our int4 is.

Q4_1 is our int4 in groups of 32, byte for byte: a half byte times the block's scale plus its minimum, both in
fp16, input j of a block in the low half of byte j and input j + 16 in its high half. Q4_0 is the same without
minimums: half a byte less 8, times the scale. Of the others Q8_0 has a scale for 32 inputs where our int8 has
one for a row, Q4_K and Q6_K have scales of scales: none of our formats holds them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from gptkern.checkpoint.gguf_file import Entry, GGUFFile, library
from gptkern.checkpoint.storage import StoredTensor, release_bytes

PACKED = ("Q4_0", "Q4_1")
GROUP = 32
# bytes of a block, and of those the numbers before the codes: a scale, and a minimum
_BLOCKS = {"Q4_0": (18, 2), "Q4_1": (20, 4)}
_MIDDLE = 8
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
View = Literal["numbers", "values", "scales", "minimums"]


@dataclass(frozen=True)
class Part:
    """A tensor of a GGUF file that gives some rows of a parameter.

    Attributes:
        entry: The tensor.
        heads: Not 0 where llama.cpp has put the rows of each of so many heads in another order: pairs that
            rotate together, i and i + d/2, side by side. They are put back.
        shift: Added to all numbers: where llama.cpp has added 1 to a norm's weights, -1.
    """

    entry: Entry
    heads: int = 0
    shift: float = 0.0

    def restored(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` as transformers has them."""
        if self.shift:
            rows = rows + self.shift
        if not self.heads:
            return rows
        pairs: torch.Tensor = rows.unflatten(0, (self.heads, -1, 2))
        return pairs.transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class GGUFTensor(StoredTensor):
    """A parameter in a GGUF file, its parts' rows one after another.

    Attributes:
        parts: At least one; all have rows of one length.
        view: ``numbers``, or of a matrix in Q4_0 or Q4_1 its packed ``values``, ``scales`` or ``minimums``.
    """

    parts: tuple[Part, ...] = ()
    view: View = "numbers"

    @property
    def data(self) -> torch.Tensor:
        """The parameter: a view of the file, or computed anew."""
        parts = [part.restored(self._read(part.entry)) for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat([part.to(self.dtype) for part in parts])

    @property
    def spans(self) -> list[tuple[Path, int, int]]:
        return [(self.file, part.entry.start, part.entry.end) for part in self.parts]

    def release(self) -> None:
        for _, start, end in self.spans:
            release_bytes(self.raw, start, end)

    def same_place(self, other: StoredTensor) -> bool:
        return isinstance(other, GGUFTensor) and (self.parts, self.view) == (other.parts, other.view)

    def _read(self, entry: Entry) -> torch.Tensor:
        span = self.raw[entry.start : entry.end]
        if self.view != "numbers":
            return self._of_blocks(span, entry)
        if entry.format in _PLAIN:
            dtype = _PLAIN[entry.format]
            aligned = span if entry.start % dtype.itemsize == 0 else span.clone()
            return aligned.view(dtype).view(entry.shape)
        gguf = library()
        rows = span.view(*entry.shape[:-1], -1).numpy()
        return torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[entry.format]))

    def _of_blocks(self, span: torch.Tensor, entry: Entry) -> torch.Tensor:
        """The codes, or fp16 numbers, of a matrix in Q4_0 or Q4_1."""
        size, before = _BLOCKS[entry.format]
        blocks = span.view(entry.shape[0], -1, size)
        if self.view == "values":
            return blocks[..., before:].flatten(1)
        numbers = blocks[..., :before].contiguous().view(torch.float16)
        if self.view == "scales":
            return numbers[..., 0]
        return numbers[..., 1] if before == 4 else numbers[..., 0] * -_MIDDLE


def parameter(file: GGUFFile, parts: Sequence[Part]) -> GGUFTensor:
    """A parameter made of tensors; quantised ones become fp32."""
    first = parts[0].entry
    rows = sum(part.entry.shape[0] for part in parts)
    dtypes = {_PLAIN.get(part.entry.format, torch.float32) for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    name = " + ".join(part.entry.name for part in parts)
    shape = (rows, *first.shape[1:])
    return GGUFTensor(file.path, name, dtype, shape, file.raw, first.start, parts=tuple(parts))


def has_minimums(tensor: GGUFTensor) -> bool:
    """True if fp16 holds the minimum of every block of a matrix in Q4_0 or Q4_1: of Q4_0 it is -8 scales."""
    if all(part.entry.format == PACKED[1] for part in tensor.parts):
        return True
    halves = replace(tensor, dtype=torch.float16, shape=(tensor.shape[0], tensor.shape[1] // GROUP))
    least, scales = (replace(halves, view=view).data for view in ("minimums", "scales"))
    tensor.release()
    return not bool((least.isinf() & scales.isfinite()).any())


def packed(tensor: GGUFTensor, minimums: bool) -> dict[str, GGUFTensor]:
    """The tensors of ``QuantizedWeight`` for blocks of 4 bits; with ``minimums`` Q4_0 has them, too."""
    rows, width = tensor.shape
    halves = replace(tensor, dtype=torch.float16, shape=(rows, width // GROUP))
    views = {
        "values": replace(tensor, dtype=torch.uint8, shape=(rows, width // 2), view="values"),
        "scales": replace(halves, view="scales"),
    }
    return views | ({"minimums": replace(halves, view="minimums")} if minimums else {})
