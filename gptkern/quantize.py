"""Quantisation of a model's linear layers, the head included.

The embeddings stay as they are: decoding reads one row of them for each token. Prefill multiplies with
matrices that are dequantised a layer at a time; the kernels that decode read the packed ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Self, Unpack

import torch
import torch.nn.functional as F
from torch import nn

from gptkern import ops
from gptkern.compensate import compensated
from gptkern.model.attend import AttendOptions
from gptkern.ops._types import FP8_MAX
from gptkern.ops.decode_linear.formats import QuantizedWeight, check_int4, quantize
from gptkern.quantization import Quantization, linear_names


class QuantizedLinear(nn.Module):
    """A linear layer whose weights have 8 or 4 bits.

    Buffers ``values``, ``scales`` and ``minimums`` are those of ``QuantizedWeight``; moving the model to
    another dtype leaves them alone and changes the dtype that ``weight`` dequantises to.
    """

    values: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None
    _like: torch.Tensor

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.format = weight.format
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("minimums", weight.minimums)
        self.register_buffer(
            "_like", torch.empty(0, dtype=dtype, device=weight.scales.device), persistent=False
        )
        self.bias = bias

    def compute_in(self, dtype: torch.dtype, device: torch.device) -> None:
        """Set the dtype and device that ``weight`` dequantises to (``empty_layers`` makes layers on meta)."""
        self._like = torch.empty(0, dtype=dtype, device=device)

    @property
    def quantized(self) -> QuantizedWeight:
        """The matrix as the kernels that decode take it."""
        return QuantizedWeight(self.format, self.values, self.scales, self.minimums)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantised matrix, ``(out, in)``, computed anew at each call."""
        return self.quantized.dequantize(self._like.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in ("scales", "minimums")}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if tensor is not None and getattr(self, name).dtype != tensor.dtype:
                # A cast concerns what is computed; what the format is made of stays.
                setattr(self, name, tensor.to(self.values.device))
        return self

    def extra_repr(self) -> str:
        outputs, inputs = self.quantized.shape
        return f"{inputs}, {outputs}, {self.format}"


class _Place(NamedTuple):
    """A linear layer: its path in the model, the module that has it, and under which name."""

    path: str
    owner: nn.Module
    name: str
    layer: nn.Linear

    def options(self, quantization: Quantization) -> dict[str, Any]:
        """The options of ``quantize`` for it."""
        format = quantization.format_of(self.path)
        if format != "int4":
            return {"format": format}
        return {
            "format": format,
            "group_size": quantization.group_size,
            "zero_point": quantization.zero_point,
        }


class _Reading(nn.Module):
    """A linear layer that quantises itself by the first rows that it reads, and goes on as that."""

    def __init__(self, place: _Place, options: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.options, self._place = place.layer, options, place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = compensated(self.layer.weight, x.flatten(0, -2), **self.options)
        quantised = QuantizedLinear(weight, self.layer.bias, self.layer.weight.dtype)
        setattr(self._place.owner, self._place.name, quantised)
        out: torch.Tensor = quantised(x)
        return out


def quantize_model(model: Any, quantization: Quantization, ids: torch.Tensor | None = None) -> None:
    """Quantise every linear layer of a ``GPT``, in place, one at a time.

    Args:
        ids: int8 and int4 only: ``(batch, seq)`` token ids, some thousands, of texts like those that the
            model will continue. Weights are then rounded so that what the layers make of these texts changes
            least: one pass over them, and some time for each layer. None rounds each weight by itself.

    Raises:
        ValueError: The model is quantised already, a weight is not finite or beyond what int4 holds, or
            ``ids`` are for fp8, none or beyond the context. Nothing is changed then.
    """
    if model.quantization is not None:
        raise ValueError(f"quantize: the model's weights are {model.quantization.format} already")
    layers = list(_linear_layers(model, quantization))
    _check_weights(layers, quantization)
    if ids is not None:
        _quantize_reading(model, layers, quantization, ids)
    else:
        for place in layers:
            _quantize_layer(place, quantization)
    model.quantization = quantization


def quantize_floats(model: Any) -> None:
    """Quantise, in int8, the linear layers that ``model.quantization`` has among its ``floats``."""
    quantization: Quantization = model.quantization
    found = replace(quantization, floats=(), int8=(*quantization.int8, *quantization.floats))
    layers = [place for place in _linear_layers(model, found) if place.path in quantization.floats]
    _check_weights(layers, found)
    for place in layers:
        _quantize_layer(place, found)
    model.quantization = found


def _check_weights(layers: list[_Place], quantization: Quantization) -> None:
    """Raise for a weight that the format does not hold: a row, or a group of int4, would be NaN with it."""
    for place in layers:
        weight = place.layer.weight.detach()
        if weight.numel() == 0:
            continue
        largest = max(abs(end.item()) for end in weight.aminmax())
        if not math.isfinite(largest):
            raise ValueError(f"quantize: a weight of {place.path} is {largest:g}; finite numbers are needed")
        if quantization.format_of(place.path) == "int4":
            check_int4(f"a weight of {place.path}", largest)


def _quantize_layer(place: _Place, quantization: Quantization) -> None:
    layer = place.layer
    weight = quantize(layer.weight, **place.options(quantization))
    setattr(place.owner, place.name, QuantizedLinear(weight, layer.bias, layer.weight.dtype))


def _quantize_reading(
    model: Any, layers: list[_Place], quantization: Quantization, ids: torch.Tensor
) -> None:
    """Quantise the layers in one pass over ``ids``; each reads what the quantised ones before it make."""
    if quantization.format == "fp8":
        raise ValueError("quantize: ids are for int8 and int4, the format is fp8")
    if ids.dim() != 2 or ids.numel() == 0 or ids.shape[1] > model.spec.context:
        raise ValueError(
            f"quantize: ids has shape {tuple(ids.shape)}; (batch, seq) with at least one token and seq up to "
            f"the model's context of {model.spec.context} is needed"
        )
    training = model.training
    try:
        for place in layers:
            setattr(place.owner, place.name, _Reading(place, place.options(quantization)))
        with torch.no_grad():
            model.eval()(ids.to(model.device))
    except BaseException:
        for place in layers:
            setattr(place.owner, place.name, place.layer)
        raise
    finally:
        model.train(training)


def empty_layers(model: Any, quantization: Quantization) -> None:
    """Replace the linear layers of a model on the meta device by quantised ones, for a checkpoint to fill."""
    for place in _linear_layers(model, quantization):
        outputs, inputs = place.layer.weight.shape
        format, dtype = quantization.format_of(place.path), place.layer.weight.dtype
        groups = inputs // quantization.group_size if format == "int4" else 0
        values = torch.empty(
            outputs,
            inputs // 2 if groups else inputs,
            dtype=torch.int8 if format == "int8" else torch.uint8,
            device="meta",
        )
        scales = torch.empty(
            (outputs, groups) if groups else outputs,
            dtype=torch.float16 if groups else torch.float32,
            device="meta",
        )
        minimums = torch.empty_like(scales) if groups and quantization.zero_point else None
        weight = QuantizedWeight(format, values, scales, minimums)
        setattr(place.owner, place.name, QuantizedLinear(weight, place.layer.bias, dtype))
    model.quantization = quantization


def _linear_layers(model: Any, quantization: Quantization) -> Iterator[_Place]:
    """Every linear layer that is to be quantised."""
    for path in linear_names(len(model.transformer.h)):
        if path not in quantization.floats:
            owner, _, name = path.rpartition(".")
            yield _Place(path, model.get_submodule(owner), name, model.get_submodule(path))


class _LargestKV:
    """Attention over whole sequences that notes each head's largest key and value.

    Attributes:
        k, v: ``(kv_heads,)`` fp32 of each layer.
    """

    dropout = False

    def __init__(self) -> None:
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []

    def attention(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Unpack[AttendOptions]
    ) -> torch.Tensor:
        for largest, tensor in ((self.k, k), (self.v, v)):
            largest.append(tensor.float().abs().amax(dim=(0, 1, 3)))
        return ops.flash_attention(q, k, v, **options)


@torch.no_grad()
def kv_scales(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(k_scales, v_scales) of an fp8 KV cache, fp32 ``(layers, kv_heads)``: set ``model.kv_scales`` to them.

    Each head's largest number over ``ids`` is scaled to half of e4m3's largest, 448. Other texts may bring
    numbers up to twice as large; larger ones saturate.

    Args:
        ids: ``(batch, seq)``: texts like those that the model will continue.

    Raises:
        ValueError: Texts longer than the model's context.
    """
    if ids.shape[1] > model.spec.context:
        raise ValueError(
            f"kv_scales: ids has {ids.shape[1]} tokens a row, the model's context {model.spec.context}"
        )
    ids = ids.to(model.device)
    largest = _LargestKV()
    model.transformer(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids), largest)
    k, v = (2 * torch.stack(layers).clamp_min(1e-6) / FP8_MAX for layers in (largest.k, largest.v))
    return k, v
