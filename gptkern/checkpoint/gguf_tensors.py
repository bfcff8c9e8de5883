"""Tensors of a GGUF file as a model's parameters: dequantised when read, or packed as our int4 is.

Q4_0 is our int4 in groups of 32 without a zero point, byte for byte: half a byte less 8, times the block's
scale, input j of a block in the low half of byte j and input j + 16 in its high half. The scales are fp16
there and fp32 here, which holds them exactly. Of the others Q4_1 adds a minimum that is no multiple of its
scale, Q8_0 has a scale for 32 inputs where our int8 has one for a row, Q4_K and Q6_K have scales of scales:
none of our formats holds them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from gptkern.checkpoint.gguf_file import Entry, GGUFFile, library
from gptkern.checkpoint.storage import StoredTensor, release_bytes

PACKED = "Q4_0"
GROUP = 32
_BLOCK_BYTES = 18
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
View = Literal["numbers", "values", "scales"]


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
        view: ``numbers``, or of a matrix in Q4_0 its packed ``values`` or its ``scales``.
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
            blocks = span.view(entry.shape[0], -1, _BLOCK_BYTES)
            if self.view == "values":
                return blocks[..., 2:].flatten(1)
            return blocks[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
        if entry.format in _PLAIN:
            dtype = _PLAIN[entry.format]
            aligned = span if entry.start % dtype.itemsize == 0 else span.clone()
            return aligned.view(dtype).view(entry.shape)
        gguf = library()
        rows = span.view(*entry.shape[:-1], -1).numpy()
        return torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[entry.format]))


def parameter(file: GGUFFile, parts: Sequence[Part]) -> GGUFTensor:
    """A parameter made of tensors; quantised ones become fp32."""
    first = parts[0].entry
    rows = sum(part.entry.shape[0] for part in parts)
    dtypes = {_PLAIN.get(part.entry.format, torch.float32) for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    name = " + ".join(part.entry.name for part in parts)
    shape = (rows, *first.shape[1:])
    return GGUFTensor(file.path, name, dtype, shape, file.raw, first.start, parts=tuple(parts))


def packed(tensor: GGUFTensor) -> tuple[GGUFTensor, GGUFTensor]:
    """(values, scales) of a matrix in Q4_0, as ``QuantizedWeight`` has them."""
    rows, width = tensor.shape
    return (
        replace(tensor, dtype=torch.uint8, shape=(rows, width // 2), view="values"),
        replace(tensor, dtype=torch.float32, shape=(rows, width // GROUP), view="scales"),
    )
