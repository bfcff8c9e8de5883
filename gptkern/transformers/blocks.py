"""The fronts of the library's decoder layers: each addition in the norm or the product beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from gptkern.transformers.parts import (
    Products,
    add_norm,
    add_perceptron,
    as_imported,
    dropped,
    fused_norm,
    idle,
)


@dataclass(frozen=True)
class Places:
    """The names of a layer's parts in the library's module; None: it has no such part.

    Attributes:
        norm_1, norm_2: The norms before attention and before the MLP; with no ``norm_2`` (GPT-J) both
            branches read the first.
        attention, mlp: The branches.
        dropout_1, dropout_2: The dropouts after them.
        after_1, after_2: The norms of their outputs (Gemma).
        factor: The attribute that multiplies them (Granite).
        parallel: Both branches read the layer's input, where the module's ``use_parallel_residual`` does not
            say otherwise.
    """

    norm_1: str
    norm_2: str | None
    attention: str = "self_attn"
    mlp: str = "mlp"
    dropout_1: str | None = None
    dropout_2: str | None = None
    after_1: str | None = None
    after_2: str | None = None
    factor: str | None = None
    parallel: bool = False


class Block(nn.Module):
    """The front of a layer: x + attention(norm x), then + mlp(norm of that); or both from the same x."""

    _gptkern_library: ClassVar[tuple[type, Any]]
    places: ClassVar[Places]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or not self._fused(hidden_states):
            out: torch.Tensor = super().forward(hidden_states, *args, **kwargs)
            return out
        places = self.places
        normed = getattr(self, places.norm_1)(hidden_states)
        attended, _ = getattr(self, places.attention)(normed, **{"attention_mask": None} | kwargs)
        attended = self._branch(attended, places.dropout_1, places.after_1)
        if self._parallel:
            if places.norm_2 is not None:
                normed = getattr(self, places.norm_2)(hidden_states)
            residual = attended + hidden_states
        else:
            normed, residual = add_norm(getattr(self, str(places.norm_2)), attended, hidden_states)
        mlp = getattr(self, places.mlp)
        bare = places.after_2 is None and places.factor is None
        if bare and idle(self, places.dropout_2):
            return add_perceptron(mlp, normed, residual)
        return residual + self._branch(mlp(normed), places.dropout_2, places.after_2)

    @property
    def _parallel(self) -> bool:
        return bool(getattr(self, "use_parallel_residual", self.places.parallel))

    def _fused(self, x: torch.Tensor) -> bool:
        # Under autocast the sums would differ, as norms do.
        if torch.is_autocast_enabled(x.device.type) or not as_imported(self):
            return False
        return self._parallel or fused_norm(getattr(self, str(self.places.norm_2)), x)

    def _branch(self, x: torch.Tensor, dropout: str | None, norm: str | None) -> torch.Tensor:
        """A branch's output as it is added."""
        x = dropped(x, self, dropout)
        x = x if norm is None else getattr(self, norm)(x)
        return x if self.places.factor is None else x * getattr(self, self.places.factor)


class BigCodeBlock(Block):
    """GPT-BigCode's layer without an encoder, whose arguments the library passes by place."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        encoded = [*args, kwargs.get("encoder_hidden_states")]
        if len(args) <= 1 and all(value is None for value in encoded):
            args = ()
            kwargs = {name: value for name, value in kwargs.items() if not name.startswith("encoder_")}
        return super().forward(hidden_states, *args, **kwargs)


class OPTBlock(Block):
    """OPT's layer, which has its perceptron's products itself."""

    products: ClassVar[Products]
    dropout: float

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or not self._fused(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        places = self.places
        normed = getattr(self, places.norm_1)(hidden_states)
        attended, _ = getattr(self, places.attention)(normed, **{"attention_mask": None} | kwargs)
        attended = dropped(attended, self, "dropout")
        normed, residual = add_norm(getattr(self, str(places.norm_2)), attended, hidden_states)
        if idle(self, "dropout"):
            return self.products.run(self, normed, residual)
        return residual + dropped(self.products.run(self, normed, None), self, "dropout")

    def _fused(self, x: torch.Tensor) -> bool:
        return bool(self.do_layer_norm_before) and super()._fused(x) and self.products.fits(self, x)
