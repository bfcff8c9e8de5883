"""Quantised weights of a linear layer: the formats, how they are made, and their layout in memory.

``int8`` and ``fp8`` (e4m3) have a scale for each output; ``int4`` has one for each group of inputs, and
with ``zero_point`` a zero too. A weight is (value - zero) * scale. Values are exact in fp32, fp16 and bf16:
kernels multiply with them unscaled and scale the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptkern.quantization import GROUP_SIZES, check_format

_LARGEST = {"int8": 127.0, "fp8": 448.0}
# Shares of an int4 group's range that are tried for its scale: clipping the ends can lose less than coarse
# steps.
_CLIPS = tuple(1.0 - 0.03 * step for step in range(10))


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantised matrix ``(outputs, inputs)``.

    Attributes:
        format: ``int8``, ``fp8`` or ``int4``.
        values: int8: ``(outputs, inputs)`` int8. fp8: the same shape, e4m3 as uint8. int4: ``(outputs,
            inputs / 2)`` uint8, where byte j of a group of G holds input j in its low half and j + G / 2 in
            its high one.
        scales: fp32, ``(outputs,)``; int4: ``(outputs, groups)``.
        zeros: int4 with a zero point: uint8, like ``scales``, 0 to 15 where ``quantize`` made them. None
            otherwise; int4's zero is then 8.
    """

    format: str
    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

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
        values = unpack(self.values, self.group_size).unflatten(1, (*scales.shape[1:], -1)).to(wide)
        zeros = 8 if self.zeros is None else self.zeros.to(wide)[..., None]
        matrix: torch.Tensor = ((values - zeros) * scales[..., None]).flatten(1).to(dtype)
        return matrix


def quantize(
    weight: torch.Tensor, format: str, *, group_size: int = GROUP_SIZES[0], zero_point: bool = False
) -> QuantizedWeight:
    """Quantise a matrix ``(outputs, inputs)``.

    Args:
        group_size: int4 only: inputs that share a scale.
        zero_point: int4 only: whether each group has a zero point beside its scale.

    Raises:
        ValueError: An unknown format, or groups that do not divide the inputs.
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


def _int4(groups: torch.Tensor, zero_point: bool) -> QuantizedWeight:
    """int4 of ``(outputs, groups, group_size)``: each group with the clipping of least squared error."""
    low, high = groups.amin(2), groups.amax(2)
    best: tuple[torch.Tensor, ...] = ()
    for clip in _CLIPS:
        if zero_point:
            scales = ((high - low) * clip / 15).clamp_min(torch.finfo(torch.float32).tiny)
            zeros = (-low * clip / scales).round().clamp(0, 15)
        else:
            scales = (torch.maximum(-low / 8, high / 7) * clip).clamp_min(torch.finfo(torch.float32).tiny)
            zeros = torch.full_like(scales, 8)
        values = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
        error = (((values - zeros[..., None]) * scales[..., None] - groups) ** 2).sum(2)
        candidate: tuple[torch.Tensor, ...] = (error, values, scales, zeros)
        if best:
            better = error < best[0]
            candidate = tuple(
                torch.where(better.reshape(better.shape + (1,) * (new.dim() - 2)), new, old)
                for new, old in zip(candidate, best, strict=True)
            )
        best = candidate
    _, values, scales, zeros = best
    packed = pack(values.to(torch.uint8).flatten(1), groups.shape[2])
    return QuantizedWeight("int4", packed, scales, zeros.to(torch.uint8) if zero_point else None)


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
