"""The modules of one layer, built of ops only: attention, the perceptron, norms, and the block of them.

Blocks pass on a pair, a branch's output and the residual that it is still to be added to, so that each
addition is fused with the norm that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gptkern import ops
from gptkern.as_built import untouched
from gptkern.model.attend import Attend, AttendOptions
from gptkern.model.spec import DecoderSpec, NormSpec
from gptkern.ops.linear.reference import ACTIVATIONS
from gptkern.quantize import QuantizedLinear


@dataclass(frozen=True, eq=False)
class Places:
    """Positions of the tokens of a pass, and the tables that rotate them.

    Attributes:
        ids: Each token's position, of the shape of the tokens.
        tables: The (cos, sin) of each kind of rotary positions of the decoder, ``(context, dim / 2)`` fp32.
    """

    ids: torch.Tensor
    tables: Sequence[tuple[torch.Tensor, torch.Tensor]]


class Attention(nn.Module):
    """Causal self-attention with one matrix for queries, keys and values."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        own = spec.layers[layer]
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.scale, self.window, self.softcap = own.attention_scale, own.window, spec.attention_softcap
        self.rotary = None if own.rotary is None else spec.rotaries.index(own.rotary)
        self.pairs = None if own.rotary is None else own.rotary.pairs
        self.c_attn = nn.Linear(spec.width, spec.qkv_width, bias=spec.qkv_bias)
        self.c_proj = nn.Linear(spec.q_width, spec.width, bias=spec.out_bias)
        self.whole_norm = spec.qk_norm == "whole"
        if spec.qk_norm is not None:
            per_head = NormSpec("rms", spec.norm.eps, unit_offset=spec.norm.unit_offset)
            self.q_norm: Norm | None = Norm(per_head, spec.q_width if self.whole_norm else spec.head_dim)
            self.k_norm: Norm | None = Norm(per_head, spec.kv_width if self.whole_norm else spec.head_dim)
        else:
            self.q_norm = self.k_norm = None

    def forward(self, x: torch.Tensor, attend: Attend, places: Places) -> torch.Tensor:
        heads = self.c_attn(x).unflatten(-1, (self.n_head + 2 * self.n_kv_head, self.head_dim))
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=-2)
        if self.whole_norm and self.q_norm is not None and self.k_norm is not None:
            q, k = (norm(t.flatten(-2)).view_as(t) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        q, k = self._rotated(q, k, places)
        options: AttendOptions = {"scale": self.scale, "window": self.window, "softcap": self.softcap}
        out = attend.attention(self.layer, q, k, v, **options)
        projected: torch.Tensor = self.c_proj(out.flatten(-2))
        return projected

    def _rotated(self, q: torch.Tensor, k: torch.Tensor, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys with the norm of each head and their rotation, where the layer has them."""
        q_norm, k_norm = self.q_norm, self.k_norm
        norm = None
        if q_norm is not None and k_norm is not None and not self.whole_norm:
            if self.rotary is not None and untouched(q_norm, *NORM) and untouched(k_norm, *NORM):
                norm = (q_norm.weight, k_norm.weight, q_norm.eps)
            else:
                q, k = q_norm(q), k_norm(k)
        if self.rotary is None or self.pairs is None:
            return q, k
        cos, sin = places.tables[self.rotary]
        unit_offset = q_norm is not None and q_norm.unit_offset
        q, turned = ops.rotary(
            q, k, cos, sin, places.ids, pairs=self.pairs, norm=norm, unit_offset=unit_offset
        )
        assert turned is not None
        return q, turned


class MLP(nn.Module):
    """The two-layer perceptron, plain or gated: ``act(gate) * up``."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation, self.gated = spec.activation, spec.gated
        self.c_fc = nn.Linear(spec.width, spec.fc_width, bias=spec.fc_bias)
        self.c_proj = nn.Linear(spec.inner, spec.width, bias=spec.proj_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fc, proj = self.c_fc, self.c_proj
        if untouched(fc, *LINEAR) and untouched(proj, *LINEAR):
            op = ops.gated_mlp if self.gated else ops.gelu_mlp
            return op(x, fc.weight, fc.bias, proj.weight, proj.bias, activation=self.activation)
        inner = fc(x)
        activation = ACTIVATIONS[self.activation]
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            out: torch.Tensor = proj(activation(gate) * up)
        else:
            out = proj(activation(inner))
        return out


class Norm(nn.Module):
    """Layer or RMS normalisation, alone or fused with the residual addition before it."""

    def __init__(self, spec: NormSpec, width: int) -> None:
        super().__init__()
        self.kind, self.eps, self.unit_offset = spec.kind, spec.eps, spec.unit_offset
        self.weight = nn.Parameter(torch.zeros(width) if spec.unit_offset else torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if spec.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "rms":
            return ops.rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor, dropout_p: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``residual + dropout(x)``, and that sum."""
        if self.kind == "rms":
            return ops.add_rms_norm(
                x, residual, self.weight, self.eps, dropout_p=dropout_p, unit_offset=self.unit_offset
            )
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, dropout_p=dropout_p)


# The functions that a fused op may replace, as it computes them from weights alone.
LINEAR = (nn.Linear.forward, QuantizedLinear.forward)
NORM = (Norm.forward,)


def add_norm(
    norm: nn.Module, x: torch.Tensor, residual: torch.Tensor, dropout_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``residual + dropout(x)``, and that sum; in one kernel if ``norm`` may be fused."""
    if isinstance(norm, Norm) and untouched(norm, *NORM):
        return norm.add(x, residual, dropout_p)
    residual = residual + F.dropout(x, dropout_p)
    return norm(residual), residual


class Block(nn.Module):
    """One decoder block; ``DecoderSpec`` says where its norms are and whether its branches are parallel."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.norm_place, self.parallel, self.shared_norm = spec.norm_place, spec.parallel, spec.shared_norm
        self.residual_scale = spec.residual_scale
        self.resid_pdrop = spec.residual_dropout
        self.ln_1 = Norm(spec.norm, spec.width)
        self.attn = Attention(spec, layer)
        if not spec.shared_norm:
            self.ln_2 = Norm(spec.norm, spec.width)
        self.mlp = MLP(spec)
        both = spec.norm_place == "both"
        self.post_attn_norm = Norm(spec.norm, spec.width) if both else None
        self.post_mlp_norm = Norm(spec.norm, spec.width) if both else None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, attend: Attend, places: Places
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map ``(x, residual)`` to the next such pair; a residual of None stands for nothing to add."""
        dropout_p = self.resid_pdrop if self.training and attend.dropout else 0.0
        if self.norm_place == "after":
            h, _ = add_norm(self.ln_1, self._scaled(self.attn(x, attend, places)), x, dropout_p)
            h, _ = add_norm(self.ln_2, self._scaled(self.mlp(h)), h, dropout_p)
            return h, None
        if self.norm_place == "branch":
            h = x + F.dropout(self._scaled(self.ln_1(self.attn(x, attend, places))), dropout_p)
            return h + F.dropout(self._scaled(self.ln_2(self.mlp(h))), dropout_p), None
        if residual is None:
            h, residual = self.ln_1(x), x
        else:
            # Parallel branches are dropped out before their sum.
            h, residual = add_norm(self.ln_1, x, residual, 0.0 if self.parallel else dropout_p)
        if self.parallel:
            other = h if self.shared_norm else self.ln_2(residual)
            branches = self.attn(h, attend, places), self.mlp(other)
            attended, inner = (F.dropout(self._scaled(branch), dropout_p) for branch in branches)
            return attended + inner, residual
        attended = self._branch(self.attn(h, attend, places), self.post_attn_norm)
        h, residual = add_norm(self.ln_2, attended, residual, dropout_p)
        return self._branch(self.mlp(h), self.post_mlp_norm), residual

    def _branch(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """A branch's output as it is added: normed, scaled."""
        return self._scaled(x if norm is None else norm(x))

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale
