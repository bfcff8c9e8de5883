"""Activations as the CPU executor's products with int8 and int4 weights take them, in PyTorch.

A bf16 model's activations are rounded to int8 before such a product (``csrc/decode/byte_rows.h`` and
``code_rows.h``). Products and sums of whole numbers are exact, and what they are scaled to is summed in fp32,
in the same order by every instruction set: a product is ``rounded(x, weight) @ weight.T``, in whose sums
nothing but fp32 rounds.
"""

from __future__ import annotations

import torch

from gptkern.ops.decode_linear.formats import QuantizedWeight

# With int8 weights, a panel's vectors, 64 inputs each, have 16 lanes of 4; a lane's inputs of all vectors
# share a scale.
PANEL, VECTOR, LANES = 256, 64, 16
# With int4 weights, neighbours share one.
BLOCK = 32
# Smaller magnitudes become 0.
LEAST_MAGNITUDE = 1e-36


def scales_of(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """The scale of each activation: the largest magnitude of those that share it, over 127.

    Args:
        x: ``(..., inputs)`` fp32.
        weight: int8 or int4: what the rows are multiplied with decides which inputs share a scale.

    Returns:
        ``x``'s shape, fp32.
    """
    return _largest(x, weight) / torch.full((), 127.0)


def rounded(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """Activations as whole multiples, -127 to 127, of their scales.

    Args:
        x: ``(..., inputs)`` fp32.
        weight: As ``scales_of`` takes it.

    Returns:
        ``x``'s shape in float64, which holds them exactly.
    """
    largest = _largest(x, weight)
    # A Python number over a tensor would be PyTorch's reciprocal times the number, which rounds twice.
    factors = torch.where(largest >= LEAST_MAGNITUDE, torch.full_like(largest, 127.0) / largest, 0.0)
    return (x * factors).round().double() * scales_of(x, weight).double()


def _largest(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """The largest magnitude of the inputs that share a scale, in ``x``'s shape."""
    others: tuple[int, ...] = (-1,)
    if weight.format == "int4":
        sharing = x.unflatten(-1, (-1, BLOCK))
    else:
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % PANEL))
        sharing, others = padded.unflatten(-1, (-1, PANEL // VECTOR, LANES, 4)), (-3, -1)
    largest = sharing.abs().amax(others, keepdim=True).expand_as(sharing).flatten(x.dim() - 1)
    some: torch.Tensor = largest[..., : x.shape[-1]]
    return some
