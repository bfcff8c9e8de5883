"""The fronts of the library's attentions with rotary positions: norm and rotation of all heads in one op."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import Cache

from gptkern import ops
from gptkern._at_import import NAME
from gptkern.transformers.attention import attention_forward
from gptkern.transformers.parts import RMSNorm, as_imported, dropped, fused_norm

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Under each of the names the library's models pass the cache.
_CACHES = ("cache", "past_key_values", "layer_past")
_CACHE_TAKES_KWARGS = "kwargs" in inspect.signature(Cache.update).parameters


@dataclass(frozen=True)
class Heads:
    """The parts of an attention in the library's module.

    Attributes:
        first: The product of queries, keys and values, or one each.
        last: The product of the heads' outputs.
        norm: The norms ``q_norm`` and ``k_norm``: of each head, of all heads as a whole, or none.
        per_head: Each head's query, key and value are stored side by side.
        dropout: The dropout of the result; None: none.
        interleaved: Neighbours are a pair, and the sines come first; else element i and ``i + dim / 2``.
        window: Where the layer's window stands: in the module, in the config, or nowhere.
    """

    first: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    last: str = "o_proj"
    norm: Literal["head", "whole"] | None = None
    per_head: bool = False
    dropout: str | None = None
    interleaved: bool = False
    window: Literal["module", "config"] | None = None


class RotaryAttention(nn.Module):
    """The front of an attention: projections, rotation, the library's cache, gptkern's attention."""

    _gptkern_library: ClassVar[tuple[type, Any]]
    heads: ClassVar[Heads]
    config: Any
    layer_idx: int
    scaling: float
    attention_dropout: float
    q_norm: Any
    k_norm: Any

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or not self._fused(hidden_states, kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        angles, mask = kwargs.pop("position_embeddings"), kwargs.pop("attention_mask", None)
        past = [kwargs.pop(name) for name in _CACHES if name in kwargs]
        q, k, v = self._heads(hidden_states)
        if getattr(self, "use_rope", True):
            q, k = self._rotated(q, k, angles)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        if past and past[0] is not None:
            extra = {"kwargs": kwargs} if _CACHE_TAKES_KWARGS else {}
            k, v = past[0].update(k, v, self.layer_idx, **extra)
        owner = {"module": self, "config": self.config, None: None}[self.heads.window]
        window = getattr(owner, "sliding_window", None)
        dropout = self.attention_dropout if self.training else 0.0
        options: dict[str, Any] = {"dropout": dropout, "scaling": self.scaling, "sliding_window": window}
        attended, weights = attention_forward(self, q, k, v, mask, **options, **kwargs)
        out = getattr(self, self.heads.last)(attended.flatten(-2))
        return dropped(out, self, self.heads.dropout), weights

    def _fused(self, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        return (
            as_imported(self)
            and self.config._attn_implementation == NAME
            and kwargs.get("position_embeddings") is not None
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _heads(self, x: torch.Tensor) -> Triple:
        """Queries, keys and values, ``(batch, seq, heads, head_dim)``."""
        products = [getattr(self, name)(x) for name in self.heads.first]
        if self.heads.per_head:
            q, k, v = products[0].unflatten(-1, (-1, 3 * self._head_dim)).chunk(3, dim=-1)
            return q, k, v
        if len(products) == 1:
            kv_width = self.config.num_key_value_heads * self._head_dim
            products = products[0].split([products[0].shape[-1] - 2 * kv_width, kv_width, kv_width], dim=-1)
        q, k, v = products
        if self.heads.norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self._head_dim)) for t in (q, k, v))
        return q, k, v

    @property
    def _head_dim(self) -> int:
        # GPT-NeoX calls it head_size.
        inside = vars(self)
        return int(inside["head_dim"] if "head_dim" in inside else inside["head_size"])

    def _rotated(
        self, q: torch.Tensor, k: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norm, unit_offset = None, False
        if self.heads.norm == "head":
            q_norm, k_norm = self.q_norm, self.k_norm
            if isinstance(q_norm, RMSNorm) and fused_norm(q_norm, q) and fused_norm(k_norm, k):
                norm = (q_norm.weight, k_norm.weight, getattr(q_norm, q_norm.eps_name))
                unit_offset = q_norm.unit_offset
            else:
                q, k = q_norm(q), k_norm(k)
        cos, sin, positions = _tables(angles, self.heads.interleaved)
        pairs = "interleaved" if self.heads.interleaved else "halves"
        q, turned = ops.rotary(q, k, cos, sin, positions, pairs=pairs, norm=norm, unit_offset=unit_offset)
        assert turned is not None
        return q, turned


def _tables(
    angles: tuple[torch.Tensor, torch.Tensor], interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(cos, sin, positions) for ``ops.rotary``: a row of the tables for each token of the batch.

    Args:
        angles: The library's: ``(batch or 1, seq, dim)`` cosines and sines, each twice; or interleaved ones,
            ``(batch or 1, seq, dim / 2)``, sines first.
    """
    sin, cos = angles if interleaved else angles[::-1]
    batch, seq, dim = cos.shape
    pairs = dim if interleaved else dim // 2
    wide = torch.promote_types(cos.dtype, torch.float32)
    tables = [t[..., :pairs].reshape(batch * seq, pairs).to(wide).contiguous() for t in (cos, sin)]
    positions = torch.arange(batch * seq, device=cos.device).view(batch, seq) if batch > 1 else None
    return tables[0], tables[1], positions
