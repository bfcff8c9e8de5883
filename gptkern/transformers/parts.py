"""Norms, perceptrons and the ways out of a block, by the ops, over the library's own modules.

A part with another module in the place of a layer (an adapter, a quantised matrix), or with a hook, runs the
library's own code.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.pytorch_utils import Conv1D

from gptkern import ops
from gptkern.as_built import untouched
from gptkern.model.families.table import ACTIVATIONS

# Up to transformers 5.23 the cache is called past_key_values, since then cache: as argument and as output.
_RENAMED = "cache" in inspect.signature(gpt2.GPT2LMHeadModel.forward).parameters
CACHE = "cache" if _RENAMED else "past_key_values"

# The functions that the ops here compute, before anybody could have put others into their classes.
CONV, NORM, DROPOUT, HEAD = Conv1D.forward, nn.LayerNorm.forward, nn.Dropout.forward, nn.Linear.forward
KNOWN_ACTIVATIONS = {
    kind: (ours, kind.forward)
    for kind, ours in ((type(ACT2FN[theirs]), ours) for theirs, ours in ACTIVATIONS.items())
}


def activation(act: Any) -> str | None:
    """The op's name for an activation module; None for an unknown module or one with a hook."""
    ours, forward = KNOWN_ACTIVATIONS.get(type(act), (None, None))
    return ours if ours is not None and untouched(act, forward) else None


def as_imported(module: Any) -> bool:
    """True if the library's class behind ``module`` has the ``forward`` that it had at import."""
    library, forward = module._gptkern_library
    return library.forward is forward


class LayerNorm(nn.LayerNorm):
    """A layer norm outside the blocks, or one that a block calls."""

    _gptkern_library = (nn.LayerNorm, NORM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _fits(self, x) or nn.LayerNorm.forward is not NORM:
            return super().forward(x)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """The front of a library's RMS norm."""

    _gptkern_library: ClassVar[tuple[type, Any]]
    # The name under which the library's module has its eps, and whether the factors are 1 + weight.
    eps_name: ClassVar[str]
    unit_offset: ClassVar[bool]
    weight: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _fits(self, x) or not as_imported(self):
            out: torch.Tensor = super().forward(x)
            return out
        eps = getattr(self, self.eps_name)
        return ops.rms_norm(x, self.weight, eps, unit_offset=self.unit_offset)


NORMS = (NORM, LayerNorm.forward, RMSNorm.forward)


def _fits(norm: Any, x: torch.Tensor) -> bool:
    """True if the op gives a norm of ``x`` in the library's dtypes."""
    # Mixed dtypes (an fp32 norm over bf16) promote by PyTorch's rules, which the op does not follow. Under
    # autocast PyTorch's norms give fp32 and ours the autocast dtype.
    same = norm.weight is not None and norm.weight.dtype == x.dtype
    # Heads that were transposed before their norm are more loops than the op has.
    plain = x.is_contiguous() or (x.dim() <= 3 and x.stride(-1) == 1)
    return same and plain and not torch.is_autocast_enabled(x.device.type)


def fused_norm(norm: nn.Module, x: torch.Tensor) -> bool:
    """True if an op may compute ``norm`` from its weights alone."""
    return untouched(norm, *NORMS) and _fits(norm, x) and (not isinstance(norm, RMSNorm) or as_imported(norm))


def add_norm(norm: Any, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual), for a norm that ``fused_norm`` allows."""
    if isinstance(norm, RMSNorm):
        eps = getattr(norm, norm.eps_name)
        return ops.add_rms_norm(x, residual, norm.weight, eps, unit_offset=norm.unit_offset)
    return ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)


@dataclass(frozen=True)
class Products:
    """The names of a perceptron's parts in the library's module.

    Attributes:
        first: Its first product, or gate and up; gate and up in one matrix if ``gated``.
        last: Its last product.
        act: The activation.
        gated: ``act(gate) * up``.
        transposed: Matrices are ``(in, out)``, in a ``Conv1D``.
        dropout: The dropout of its output, where it has one.
    """

    first: tuple[str, ...]
    last: str
    act: str = "act"
    gated: bool = False
    transposed: bool = False
    dropout: str = "dropout"

    def reason(self, module: Any) -> str | None:
        """The reason why the ops cannot compute the perceptron; None if they compute all but the dropout."""
        for name in (*self.first, self.last):
            layer = getattr(module, name)
            if not untouched(layer, CONV if self.transposed else HEAD):
                return f"{name} is a {type(layer).__name__} that was put in or hooked"
        act = getattr(module, self.act)
        if activation(act) is None:
            return f"{self.act} is a {type(act).__name__} that was put in or hooked"
        return None if as_imported(module) else "the library's class was given another forward"

    def fits(self, module: Any, x: torch.Tensor) -> bool:
        """True if the ops compute all of the perceptron but its dropout."""
        if self.reason(module) is not None:
            return False
        dtypes = {getattr(module, name).weight.dtype for name in (*self.first, self.last)}
        return len(dtypes) == 1 and (x.dtype in dtypes or torch.is_autocast_enabled(x.device.type))

    def run(self, module: Any, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """The perceptron without its dropout, plus ``residual``; on the weights where they lie."""
        name = activation(getattr(module, self.act))
        assert name is not None
        *first, (w_proj, b_proj) = (self._layer(module, part) for part in (*self.first, self.last))
        if len(first) == 2:
            # Two matrices: the gate's activation is in the epilogue of its product, their product is not.
            (w_gate, b_gate), (w_up, b_up) = first
            inner = ops.linear_act(x, w_gate, b_gate, activation=name) * ops.linear(x, w_up, b_up)
            if residual is None:
                return ops.linear(inner, w_proj, b_proj)
            return ops.linear_residual(inner, w_proj, b_proj, residual)
        op = ops.gated_mlp if self.gated else ops.gelu_mlp
        (w_fc, b_fc), *_ = first
        return op(x, w_fc, b_fc, w_proj, b_proj, activation=name, residual=residual)

    def _layer(self, module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = getattr(module, name)
        return (layer.weight.t() if self.transposed else layer.weight), layer.bias


class Perceptron(nn.Module):
    """The front of a library's perceptron: bias, activation and residual in the products' epilogues."""

    _gptkern_library: ClassVar[tuple[type, Any]]
    products: ClassVar[Products]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.products.fits(self, x):
            out: torch.Tensor = super().forward(x)
            return out
        return dropped(self.products.run(self, x, None), self, self.products.dropout)


def add_perceptron(mlp: Any, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """``residual + mlp(x)``, the addition in the last product's epilogue where nothing is between them."""
    whole = (
        isinstance(mlp, Perceptron)
        and untouched(mlp, Perceptron.forward)
        and idle(mlp, mlp.products.dropout)
        and mlp.products.fits(mlp, x)
    )
    out: torch.Tensor = mlp.products.run(mlp, x, residual) if whole else residual + mlp(x)
    return out


def dropped(x: torch.Tensor, owner: Any, name: str | None) -> torch.Tensor:
    """``x`` after the dropout that ``owner`` has under ``name``: a module, or a probability (StarCoder 2)."""
    dropout = None if name is None else getattr(owner, name, None)
    if isinstance(dropout, float | int):
        return F.dropout(x, dropout, owner.training)
    out: torch.Tensor = x if dropout is None else dropout(x)
    return out


def idle(owner: Any, name: str | None) -> bool:
    """True if ``dropped`` would do nothing, and nobody listens to the dropout."""
    dropout = None if name is None else getattr(owner, name, None)
    if isinstance(dropout, float | int):
        return not (owner.training and dropout > 0)
    return dropout is None or (untouched(dropout, DROPOUT) and not (dropout.training and dropout.p > 0))
