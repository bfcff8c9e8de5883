"""Quantised weights of a linear layer: the formats, how they are made, and their layout in memory.

``int8`` and ``fp8`` (e4m3) have a scale for each output, and a weight is value * scale. ``int4`` has a scale
for each group of inputs, and with ``zero_point`` a minimum too, the number that code 0 stands for: a weight
is code * scale + minimum, or (code - 8) * scale without. Both are real numbers in fp16: GGUF's blocks in
Q4_1 and Q4_0 are groups of 32, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gptkern.quantization import GROUP_SIZES, check_format

_LARGEST = {"int8": 127.0, "fp8": 448.0}
# int4: the code that stands for 0 where there are no minimums, and the last code.
MIDDLE, LAST = 8, 15
_LARGEST_HALF = torch.finfo(torch.float16).max
# Shares of an int4 group's range that are tried for its scale: clipping the ends can lose less than coarse
# steps. From each the scale and minimum of least error for the codes found are tried so many times.
_CLIPS = (1.0, 0.94, 0.88, 0.82)
_FITS = 2
# Weights that are quantised to int4 at a time: what is tried of them stays in the cache.
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantised matrix ``(outputs, inputs)``.

    Attributes:
        format: ``int8``, ``fp8`` or ``int4``.
        values: int8: ``(outputs, inputs)`` int8. fp8: the same shape, e4m3 as uint8. int4: ``(outputs,
            inputs / 2)`` uint8, where byte j of a group of G holds input j in its low half and j + G / 2 in
            its high one.
        scales: fp32, ``(outputs,)``; int4: fp16, ``(outputs, groups)``.
        minimums: int4 with a zero point: fp16, like ``scales``. None otherwise; int4's code 8 is then 0.
    """

    format: str
    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        outputs, width = self.values.shape
        return outputs, 2 * width if self.format == "int4" else width

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scales.shape[1] if self.format == "int4" else self.shape[1]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix in ``dtype``: computed in fp32 (float64 for that dtype), rounded once."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scales = self.scales.to(wide)
        if self.format != "int4":
            values = self.values.view(torch.float8_e4m3fn) if self.format == "fp8" else self.values
            return (values.to(wide) * scales[:, None]).to(dtype)
        codes = unpack(self.values, self.group_size).unflatten(1, (*scales.shape[1:], -1)).to(wide)
        # A code times a scale is exact: the sum alone is rounded.
        least = -MIDDLE * scales if self.minimums is None else self.minimums.to(wide)
        matrix: torch.Tensor = (codes * scales[..., None] + least[..., None]).flatten(1).to(dtype)
        return matrix


def quantize(
    weight: torch.Tensor, format: str, *, group_size: int = GROUP_SIZES[0], zero_point: bool = False
) -> QuantizedWeight:
    """Quantise a matrix ``(outputs, inputs)``.

    Args:
        group_size: int4 only: inputs that share a scale.
        zero_point: int4 only: whether each group has a minimum beside its scale.

    Raises:
        ValueError: An unknown format, groups that do not divide the inputs, or a weight beyond fp16 in int4.
    """
    check_format("quantize", format, group_size, [weight.shape[1]])
    weight = weight.detach().float()
    if format == "int4":
        return _int4(weight.unflatten(1, (-1, group_size)), zero_point)
    largest = _LARGEST[format]
    scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / largest
    scaled = weight / scales[:, None]
    if format == "fp8":
        values = scaled.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        values = scaled.round().clamp(-largest, largest).to(torch.int8)
    return QuantizedWeight(format, values, scales)


def check_int4(weight: str, largest: float) -> None:
    """Raise ValueError naming ``weight`` if int4's scales do not hold its ``largest`` magnitude."""
    if largest > _LARGEST_HALF:
        raise ValueError(f"quantize: {weight} is {largest:g}; int4 holds up to {_LARGEST_HALF:g}: take int8")


def _int4(groups: torch.Tensor, zero_point: bool) -> QuantizedWeight:
    """int4 of ``(outputs, groups, group_size)``."""
    check_int4("a weight", groups.abs().max().item() if groups.numel() else 0.0)
    rows = max(1, _AT_ONCE // max(1, groups[:1].numel()))
    parts = [_best(part, zero_point) for part in groups.split(rows)]
    codes, scales, minimums = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    packed = pack(codes.to(torch.uint8).flatten(1), groups.shape[2])
    return QuantizedWeight("int4", packed, scales, minimums if zero_point else None)


def _best(groups: torch.Tensor, zero_point: bool) -> tuple[torch.Tensor, ...]:
    """(codes, scales, minimums) of each group, of least squared error among those tried."""
    best: tuple[torch.Tensor, ...] = ()
    for scales, minimums in _starts(groups, zero_point):
        for fit in range(_FITS + 1):
            # As they are stored: the codes make up for what rounding does to them.
            scales, minimums = scales.half().float(), minimums.half().float()
            if not zero_point:
                minimums = -MIDDLE * scales
            codes = codes_of(groups, scales, minimums)
            error = ((codes * scales[..., None] + minimums[..., None] - groups) ** 2).sum(2)
            candidate: tuple[torch.Tensor, ...] = (error, codes, scales.half(), minimums.half())
            best = _better(candidate, best) if best else candidate
            if fit < _FITS:
                scales, minimums = _fitted(groups, codes, scales, zero_point)
    return best[1:]


def codes_of(groups: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor) -> torch.Tensor:
    """The codes, 0 to 15, nearest to ``(..., group_size)`` numbers, in fp32."""
    steps = torch.where(scales == 0, 1.0, scales)
    return ((groups - minimums[..., None]) / steps[..., None]).round().clamp(0, LAST)


def _starts(groups: torch.Tensor, zero_point: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scales and minimums to begin with. The first holds a group that lies on 16 even steps exactly."""
    low, high = groups.aminmax(dim=2)
    for clip in _CLIPS:
        if zero_point:
            span = (high - low) * clip
            yield span / LAST, low + (high - low - span) / 2
        else:
            scales = torch.maximum(-low / MIDDLE, high / (LAST - MIDDLE)) * clip
            yield scales, -MIDDLE * scales
            # A scale below 0 gives the larger end, where it is the upper one, the code further from 8.
            scales = torch.where(high > -low, high, low) * (-clip / MIDDLE)
            yield scales, -MIDDLE * scales


def _fitted(
    groups: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zero_point: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and minimums of least squared error for these codes."""
    middle, mean = torch.full_like(groups[..., :1], MIDDLE), torch.zeros_like(groups[..., :1])
    if zero_point:
        middle, mean = codes.mean(2, keepdim=True), groups.mean(2, keepdim=True)
    steps = codes - middle
    spread = steps.square().sum(2)
    scales = torch.where(spread > 0, (steps * (groups - mean)).sum(2) / spread, scales)
    return scales, (mean - middle * scales[..., None]).squeeze(2)


def _better(candidate: tuple[torch.Tensor, ...], best: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The candidate or the best of each group, by the error, which both have first."""
    better = candidate[0] < best[0]
    return tuple(
        torch.where(better.reshape(better.shape + (1,) * (new.dim() - 2)), new, old)
        for new, old in zip(candidate, best, strict=True)
    )


def pack(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """Pack numbers 0 to 15, ``(rows, width)`` uint8, two in a byte; the last group is padded with zeros."""
    rows, width = values.shape
    filled = torch.nn.functional.pad(values, (0, -width % group_size))
    halves = filled.reshape(rows, -1, 2, group_size // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1).contiguous()


def unpack(packed: torch.Tensor, group_size: int, width: int | None = None) -> torch.Tensor:
    """The inverse of ``pack``; ``width`` cuts off the padding of the last group."""
    halves = packed.unflatten(1, (-1, group_size // 2))
    values = torch.stack([halves & 15, halves >> 4], 2).flatten(1)
    return values if width is None else values[:, :width]
