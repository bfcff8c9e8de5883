"""Rounding of weights that makes up for itself: an input's error goes to the inputs not rounded yet.

The output's squared error over some inputs x is (w - q) H (w - q)^T with H = mean of x x^T. Inputs are
rounded in order; the least error is left when the others take up -error * H^-1's row over its diagonal.
The algorithm is GPTQ's (Frantar et al., 2022), with scales as ``quantize`` has them.
"""

from __future__ import annotations

import torch

from gptkern.ops.decode_linear.formats import LAST, MIDDLE, QuantizedWeight, pack, quantize

# A share of H's mean diagonal is added to its diagonal: few inputs do not determine H.
_DAMPING = 0.01
_BLOCK = 128


def compensated(
    weight: torch.Tensor,
    x: torch.Tensor,
    format: str,
    *,
    group_size: int = _BLOCK,
    zero_point: bool = False,
) -> QuantizedWeight:
    """``weight`` in int8 or int4 with a small error of ``x @ weight.T``, not of the weights.

    Args:
        weight: ``(outputs, inputs)``.
        x: ``(rows, inputs)``: what the layer reads, some hundreds of rows or more.
        format, group_size, zero_point: As ``quantize`` takes them; not fp8.
    """
    rest, factor = weight.detach().float().clone(), _factor(x.float())
    width = rest.shape[1]
    size = group_size if format == "int4" else width
    whole = quantize(weight, "int8") if format == "int8" else None
    values = torch.empty_like(rest, dtype=torch.int8 if whole is not None else torch.uint8)
    groups: list[QuantizedWeight] = []
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        errors = torch.empty_like(rest[:, begin:end])
        for i in range(begin, end):
            if whole is None and i % size == 0:
                part = rest[:, i : i + size].contiguous()
                groups.append(quantize(part, "int4", group_size=size, zero_point=zero_point))
            scale, least, low, high = _range(whole or groups[-1])
            codes = ((rest[:, i] - least) / torch.where(scale == 0, 1.0, scale)).round().clamp(low, high)
            values[:, i] = codes.to(values.dtype)
            errors[:, i - begin] = (rest[:, i] - (codes * scale + least)) / factor[i, i]
            rest[:, i + 1 : end] -= errors[:, i - begin, None] * factor[i, i + 1 : end]
        rest[:, end:] -= errors @ factor[begin:end, end:]
    if whole is not None:
        return QuantizedWeight("int8", values, whole.scales)
    minimums = [group.minimums for group in groups if group.minimums is not None]
    scales = torch.cat([group.scales for group in groups], 1)
    return QuantizedWeight("int4", pack(values, size), scales, torch.cat(minimums, 1) if minimums else None)


def _range(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """(scale, the number that code 0 stands for, lowest code, highest code) of a group or of int8 rows."""
    if weight.format == "int8":
        return weight.scales, torch.zeros_like(weight.scales), -127, 127
    scale = weight.scales[:, 0].float()
    least = -MIDDLE * scale if weight.minimums is None else weight.minimums[:, 0].float()
    return scale, least, 0, LAST


def _factor(x: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of H, ``(inputs, inputs)``."""
    moments = x.T @ x / len(x)
    diagonal = moments.diagonal()
    diagonal += _DAMPING * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
