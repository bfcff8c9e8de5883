"""A model's weights as the persistent step takes them, and the table of their addresses."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptkern.ops._dispatch import traced
from gptkern.ops.decode_attention.launch import LOG2E
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_step import kernels

# Addresses must be multiples of it, for loads of 16 bytes.
_ALIGNMENT = 16
# The kernel's table: its columns, and where in a row the norms and the matrices begin.
COLUMNS: int = kernels.COLUMNS.value
_NORM_1: int = kernels.NORM_1.value
_NORM_2: int = kernels.NORM_2.value
MATRICES: int = kernels.MATRICES.value

NormWeights = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Linear:
    """A linear layer: ``(outputs, inputs)``, and ``(outputs,)`` or None."""

    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    """One layer; norms are (weight, bias or None).

    Attributes:
        norm_1: The norm of QKV's input. Where norms follow their branches (GPT-1), it is the last norm of the
            layer before, and None in the first layer.
        norm_2: The norm of FC's input.
        attention_scale: The softmax scale.
    """

    norm_1: NormWeights | None
    qkv: Linear
    out: Linear
    norm_2: NormWeights
    fc: Linear
    proj: Linear
    attention_scale: float


@dataclass(frozen=True)
class StepWeights:
    """The weights of a whole step, of one dtype and on one device.

    Attributes:
        token_weight, position_weight: ``(vocabulary, width)`` and ``(positions, width)``.
        layers: From the first to the last.
        norm: The norm before the head.
        head: The output layer, without bias.
        heads: The number of attention heads.
        eps: The epsilon of every norm.
        activation: The activation between a layer's FC and projection.

    Raises:
        ValueError: Layers that are not alike (shape, bias, format), or a weight that is not contiguous or
            whose address is no multiple of 16 (under ``torch.compile`` addresses are seen when it runs).
    """

    token_weight: torch.Tensor
    position_weight: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: NormWeights
    head: Linear
    heads: int
    eps: float
    activation: str

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("StepWeights: layers is empty")
        first = [_kind(part) for part in _parts(self.layers[0])]
        for index, layer in enumerate(self.layers):
            norms = [] if index == 0 and layer.norm_1 is None else [(layer.norm_1, first[0])]
            for part, kind in [*norms, *zip(_parts(layer), first, strict=True)]:
                if _kind(part) != kind:
                    raise ValueError(
                        f"StepWeights: layer {index} has {_kind(part)} "
                        f"where layer 0 has {kind}: they must agree"
                    )
        if _format(self.head) != _format(self.layers[0].qkv):
            raise ValueError(
                f"StepWeights: the head is {_format(self.head)}, "
                f"the layers {_format(self.layers[0].qkv)}: they must agree"
            )
        biases = [part[1] if isinstance(part, tuple) else part.bias for part in _parts(self.layers[0])]
        if len({bias is None for bias in (*biases, self.norm[1])}) > 1 or self.head.bias is not None:
            raise ValueError("StepWeights: all norms and layers must have a bias or none, and the head none")
        for tensor in (tensor for row in self.rows() for tensor in row if tensor is not None):
            address = 0 if traced(tensor) else tensor.data_ptr()
            if not tensor.is_contiguous() or address % _ALIGNMENT:
                raise ValueError(
                    f"StepWeights: a weight of shape {tuple(tensor.shape)} has strides {tensor.stride()} and "
                    f"address {address:#x}; contiguous and a multiple of {_ALIGNMENT} is needed"
                )

    @property
    def post_norm(self) -> bool:
        """True for post-norm models (GPT-1): the residual is the normalised input."""
        return self.layers[0].norm_1 is None

    def rows(self) -> Iterator[list[torch.Tensor | None]]:
        """The tensors of each layer, then of the head, in the columns of the kernel's table."""
        for layer in self.layers:
            matrices = (layer.qkv, layer.out, layer.fc, layer.proj)
            yield [
                *(layer.norm_1 or (None, None)),
                *layer.norm_2,
                *(t for matrix in matrices for t in _fields(matrix)),
            ]
        head = [*self.norm, None, None, *_fields(self.head)]
        yield head + [None] * (COLUMNS - len(head))

    @functools.cached_property
    def table(self) -> torch.Tensor:
        """The addresses, ``(layers + 1, columns)`` int64 on the weights' device; 0 where there is nothing."""
        rows = (tuple(0 if t is None else t.data_ptr() for t in row) for row in self.rows())
        return _on_device(tuple(rows), torch.int64, self.token_weight.device)

    @functools.cached_property
    def attention_scales(self) -> torch.Tensor:
        """Each layer's softmax scale, times log2(e), ``(layers,)`` fp32."""
        scales = tuple(layer.attention_scale * LOG2E for layer in self.layers)
        return _on_device(scales, torch.float32, self.token_weight.device)


# A StepWeights as the registered op's schema names it: tensors, then settings.
FLAT_FIELDS = 8
Flat = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None], list[float], int, float, str, str | None]


def flat(weights: StepWeights) -> Flat:
    """(token weight, position weight, all rows, attention scales, heads, eps, activation, format)."""
    first = weights.layers[0].qkv.weight
    return (
        weights.token_weight,
        weights.position_weight,
        [tensor for row in weights.rows() for tensor in row],
        [layer.attention_scale for layer in weights.layers],
        weights.heads,
        weights.eps,
        weights.activation,
        first.format if isinstance(first, QuantizedWeight) else None,
    )


def unflat(
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    tensors: Sequence[torch.Tensor | None],
    attention_scales: Sequence[float],
    heads: int,
    eps: float,
    activation: str,
    format: str | None,
) -> StepWeights:
    """The inverse of ``flat``."""
    count = len(attention_scales)
    if len(tensors) != (count + 1) * COLUMNS:
        raise ValueError(
            f"StepWeights: {len(tensors)} tensors for {count} layers; {(count + 1) * COLUMNS} are needed"
        )

    def norm(row: Sequence[torch.Tensor | None], column: int) -> NormWeights:
        return _needed(row[column]), row[column + 1]

    def linear(row: Sequence[torch.Tensor | None], matrix: int) -> Linear:
        at = MATRICES + 4 * matrix
        values, bias, scales, zeros = _needed(row[at]), *row[at + 1 : at + 4]
        return Linear(
            values if format is None else QuantizedWeight(format, values, _needed(scales), zeros), bias
        )

    def layer(row: Sequence[torch.Tensor | None], attention_scale: float) -> LayerWeights:
        qkv, out, fc, proj = (linear(row, matrix) for matrix in range(4))
        norm_1 = None if row[_NORM_1] is None else norm(row, _NORM_1)
        return LayerWeights(norm_1, qkv, out, norm(row, _NORM_2), fc, proj, attention_scale)

    *layers, head = (tensors[at : at + COLUMNS] for at in range(0, len(tensors), COLUMNS))
    return StepWeights(
        token_weight,
        position_weight,
        tuple(layer(row, scale) for row, scale in zip(layers, attention_scales, strict=True)),
        norm(head, _NORM_1),
        linear(head, 0),
        heads=heads,
        eps=eps,
        activation=activation,
    )


def _needed(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError("StepWeights: a weight is None; only norm_1 of the first layer and biases may be")
    return tensor


# The registered op makes a StepWeights at every call: the copy, for which a host would wait and which a
# graph capture forbids, is made once for one set of addresses.
@functools.lru_cache(maxsize=64)
def _on_device(numbers: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype).to(device)


def _fields(linear: Linear) -> tuple[torch.Tensor | None, ...]:
    """(values, bias, scales, zeros)."""
    weight = linear.weight
    if isinstance(weight, QuantizedWeight):
        return weight.values, linear.bias, weight.scales, weight.zeros
    return weight, linear.bias, None, None


def _parts(layer: LayerWeights) -> tuple[NormWeights | Linear, ...]:
    """The parts of a layer, without its first norm."""
    return layer.norm_2, layer.qkv, layer.out, layer.fc, layer.proj


def _format(linear: Linear) -> str:
    """The number format of a matrix, in words."""
    weight = linear.weight
    if not isinstance(weight, QuantizedWeight):
        return str(weight.dtype)
    return weight.format + ("" if weight.zeros is None else " with zeros")


def _kind(part: NormWeights | Linear | None) -> str:
    """The properties that must be the same in every layer, in words."""
    if part is None:
        return "no norm"
    if isinstance(part, tuple):
        return f"a norm of {part[0].shape[0]} with{'out' if part[1] is None else ''} bias"
    outputs, inputs = part.weight.shape
    bias = "without" if part.bias is None else "with"
    group = part.weight.group_size if isinstance(part.weight, QuantizedWeight) else inputs
    return f"{inputs} to {outputs} in {_format(part)} (groups of {group}) {bias} bias"
