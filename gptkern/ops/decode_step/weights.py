"""A model's weights as the persistent step takes them, and the table of their addresses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gptkern.ops.decode_attention.launcher import LOG2E
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_linear.launcher import packed_values
from gptkern.ops.decode_step import kernels

# What an address must be a multiple of, for loads of 16 bytes.
_ALIGNMENT = 16

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
        norm_1, norm_2: Of what QKV and FC are given. Where norms follow their branches (GPT-1), ``norm_1`` is
            that of the layer before, and None in the first layer.
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
    """All that a step multiplies with, of one dtype and on one device.

    Attributes:
        token_weight, position_weight: ``(vocabulary, width)`` and ``(positions, width)``.
        layers: From the first to the last.
        norm: The one before the head.
        head: Without bias.
        heads: Of attention.
        eps: Of every norm.
        activation: Between a layer's FC and projection.

    Raises:
        ValueError: Layers that are not alike (shape, bias, format), or a weight that is not contiguous or
            whose address is no multiple of 16.
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
        for tensor in self._tensors():
            if not tensor.is_contiguous() or tensor.data_ptr() % _ALIGNMENT:
                raise ValueError(
                    f"StepWeights: a weight of shape {tuple(tensor.shape)} has strides {tensor.stride()} and "
                    f"address {tensor.data_ptr():#x}; contiguous and a multiple of {_ALIGNMENT} is needed"
                )

    @property
    def post_norm(self) -> bool:
        """Whether a branch is added to the norm of what it is given, not to that itself."""
        return self.layers[0].norm_1 is None

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from (tensor for row in self._rows() for tensor in row if tensor is not None)

    def _rows(self) -> Iterator[list[torch.Tensor | None]]:
        for layer in self.layers:
            matrices = (layer.qkv, layer.out, layer.fc, layer.proj)
            yield [
                *(layer.norm_1 or (None, None)),
                *layer.norm_2,
                *(t for matrix in matrices for t in _fields(matrix)),
            ]
        columns: int = kernels.COLUMNS.value
        head = [*self.norm, None, None, *_fields(self.head)]
        yield head + [None] * (columns - len(head))

    @functools.cached_property
    def table(self) -> torch.Tensor:
        """The addresses, ``(layers + 1, columns)`` int64 on the weights' device; 0 where there is nothing."""
        rows = [[0 if t is None else t.data_ptr() for t in row] for row in self._rows()]
        return torch.tensor(rows, dtype=torch.int64).to(self.token_weight.device)

    @functools.cached_property
    def attention_scales(self) -> torch.Tensor:
        """What each layer's scores are multiplied by, ``(layers,)`` fp32, for powers of 2."""
        scales = [layer.attention_scale * LOG2E for layer in self.layers]
        return torch.tensor(scales, dtype=torch.float32).to(self.token_weight.device)


def _fields(linear: Linear) -> tuple[torch.Tensor | None, ...]:
    """(values, bias, scales, zeros)."""
    packed = linear.weight if isinstance(linear.weight, QuantizedWeight) else None
    scales, zeros = (None, None) if packed is None else (packed.scales, packed.zeros)
    return packed_values(linear.weight), linear.bias, scales, zeros


def _parts(layer: LayerWeights) -> tuple[NormWeights | Linear, ...]:
    """All but the first norm."""
    return layer.norm_2, layer.qkv, layer.out, layer.fc, layer.proj


def _format(linear: Linear) -> str:
    """In what a matrix is kept."""
    weight = linear.weight
    if not isinstance(weight, QuantizedWeight):
        return str(weight.dtype)
    return weight.format + ("" if weight.zeros is None else " with zeros")


def _kind(part: NormWeights | Linear | None) -> str:
    """What must be the same in every layer."""
    if part is None:
        return "no norm"
    if isinstance(part, tuple):
        return f"a norm of {part[0].shape[0]} with{'out' if part[1] is None else ''} bias"
    outputs, inputs = part.weight.shape
    bias = "without" if part.bias is None else "with"
    group = part.weight.group_size if isinstance(part.weight, QuantizedWeight) else inputs
    return f"{inputs} to {outputs} in {_format(part)} (groups of {group}) {bias} bias"
