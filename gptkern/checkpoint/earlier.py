"""int4 weights as gptkern wrote them first: a group's scale in fp32, its zero a whole number in uint8.

A weight was (code - zero) * scale. That scale and minimum are rounded to fp16 now moves it by less than a
sixtieth of an int4 step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.storage import StoredTensor

_SCALES, _ZEROS, _MINIMUMS = ".scales", ".zeros", ".minimums"


@dataclass(frozen=True)
class _InHalf(StoredTensor):
    """The scales of groups in fp16, or with ``zeros`` their minimums.

    Attributes:
        scales, zeros: As they are stored.
    """

    scales: StoredTensor | None = None
    zeros: StoredTensor | None = None

    @property
    def data(self) -> torch.Tensor:
        assert self.scales is not None
        numbers = self.scales.data
        if self.zeros is not None:
            numbers = self.zeros.data.float() * -numbers
        halves = numbers.half()
        if not torch.equal(halves.isfinite(), numbers.isfinite()):
            raise CheckpointError(f"{self.file}: {self.name}: a number beyond fp16, {numbers.abs().max():g}")
        return halves

    @property
    def spans(self) -> list[tuple[Path, int, int]]:
        return [span for stored in self._stored() for span in stored.spans]

    def release(self) -> None:
        for stored in self._stored():
            stored.release()

    def _stored(self) -> list[StoredTensor]:
        return [stored for stored in (self.scales, self.zeros) if stored is not None]


def renewed(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of an int4 checkpoint by today's names and dtypes; others stay as they are."""
    found = dict(tensors)
    for name, scales in tensors.items():
        if not name.endswith(_SCALES) or scales.dtype != torch.float32 or len(scales.shape) != 2:
            continue
        layer = name.removesuffix(_SCALES)
        in_half = _InHalf(
            *(scales.file, scales.name, torch.float16, scales.shape, scales.raw, scales.start), scales=scales
        )
        found[name] = in_half
        zeros = found.get(layer + _ZEROS)
        if zeros is not None and zeros.dtype == torch.uint8 and zeros.shape == scales.shape:
            del found[layer + _ZEROS]
            found[layer + _MINIMUMS] = replace(in_half, name=zeros.name, zeros=zeros)
    return found
