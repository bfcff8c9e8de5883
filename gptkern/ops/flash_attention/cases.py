"""Example calls of attention: one for every row of the launch tables, and small ones to check."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
from gptkern.ops.flash_attention.op import flash_attention, flash_attention_varlen


def _dense(
    batch: int,
    seq_q: int,
    seq_k: int,
    heads: int,
    heads_k: int,
    head_dim: int,
    *,
    v_dim: int | None = None,
    alibi: bool = False,
    bias: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        shapes = [(batch, seq, n, head_dim) for seq, n in ((seq_q, heads), (seq_k, heads_k))]
        shapes.append((batch, seq_k, heads_k, v_dim or head_dim))
        qkv = (tensor(*s, device=device, dtype=dtype) for s in shapes)
        extras: dict[str, Any] = {"alibi_slopes": _slopes(heads, device)} if alibi else {}
        if bias is not None:
            extras["attn_bias"] = tensor(*bias, device=device, dtype=dtype, requires_grad=False)
        return Call(tuple(qkv), {**kwargs, **extras})

    return make


def _slopes(heads: int, device: torch.device) -> torch.Tensor:
    """The slopes of the paper: a geometric sequence that ends at 2^-8."""
    return torch.tensor([2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)], device=device)


def _packed(
    lengths: list[int], heads: int, heads_k: int, head_dim: int, *, alibi: bool = False, **kwargs: Any
) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        q = tensor(sum(lengths), heads, head_dim, device=device, dtype=dtype)
        k, v = (tensor(sum(lengths), heads_k, head_dim, device=device, dtype=dtype) for _ in range(2))
        extras = {"alibi_slopes": _slopes(heads, device)} if alibi else {}
        return Call((q, k, v, starts, starts, max(lengths), max(lengths)), {**kwargs, **extras})

    return make


def _unaligned(batch: int, seq: int, heads: int, head_dim: int) -> Make:
    """Heads two bytes apart, which neither wide loads nor the copy engine can read."""

    def make(device: torch.device, dtype: torch.dtype) -> Call:
        wide = [tensor(batch, seq, heads, head_dim + 1, device=device, dtype=dtype) for _ in range(3)]
        return Call(tuple(x.detach()[..., :head_dim].requires_grad_() for x in wide))

    return make


_ALL = (torch.bfloat16, torch.float32)
# The forward kernel for Hopper: scalars of a tile, of all warps together.
_SCALARS = {90: 24}
# The random numbers take the registers that overlapping products would keep their accumulators in.
_DROPOUT = frozenset({"flash_attention_forward", "flash_attention_dq", "flash_attention_dkdv"})
# The mask is loaded between a tile's products, and ptxas waits for them there.
_MASK = _DROPOUT

CASES = [
    Case(
        "GPT-2 124M training, 64 x 1024",
        flash_attention,
        _dense(64, 1024, 1024, 12, 12, 64),
        _ALL,
        spills=_SCALARS,
    ),
    Case("GPT-2 1.5B prompt, 1 x 1000", flash_attention, _dense(1, 1000, 1000, 25, 25, 64), spills=_SCALARS),
    Case("not causal", flash_attention, _dense(4, 4096, 4096, 16, 16, 64, causal=False), spills=_SCALARS),
    Case(
        "dropout",
        flash_attention,
        _dense(64, 1024, 1024, 12, 12, 64, dropout_p=0.1),
        _ALL,
        serialised=_DROPOUT,
    ),
    Case("packed", flash_attention_varlen, _packed([1024, 517, 33], 12, 12, 64), spills=_SCALARS),
    Case("window", flash_attention, _dense(4, 4096, 4096, 16, 16, 64, window=1024), spills=_SCALARS),
    Case("unaligned", flash_attention, _unaligned(4, 1024, 12, 64)),
    Case("head dim 128", flash_attention, _dense(4, 4096, 4096, 16, 16, 128), _ALL, spills=_SCALARS),
    Case(
        "head dim 128, grouped, window",
        flash_attention,
        _dense(2, 4096, 4096, 32, 8, 128, window=1024),
        spills=_SCALARS,
    ),
    Case(
        "head dim 128, packed, grouped",
        flash_attention_varlen,
        _packed([1024, 517, 33], 32, 8, 128),
        spills=_SCALARS,
    ),
    # flash_attention_dq: its launch row is that of head dimensions of 80 and 96 as well, which do not spill.
    Case("head dim 128, unaligned", flash_attention, _unaligned(2, 1024, 16, 128), spills={90: 152}),
    Case("head dim 128, softcap", flash_attention, _dense(2, 4096, 4096, 16, 8, 128, softcap=50.0)),
    Case(
        "head dim 128, dropout",
        flash_attention,
        _dense(2, 4096, 4096, 16, 16, 128, dropout_p=0.1),
        serialised=_DROPOUT,
    ),
    Case("head dim 80", flash_attention, _dense(2, 2048, 2048, 32, 32, 80)),
    Case("head dim 256", flash_attention, _dense(2, 4096, 4096, 16, 8, 256)),
    Case("head dim 256, window", flash_attention, _dense(2, 4096, 4096, 16, 8, 256, window=512)),
    Case(
        "head dim 256, softcap, window",
        flash_attention,
        _dense(2, 4096, 4096, 8, 4, 256, softcap=50.0, window=512),
        # Both accumulators of 64 keys and the softcap do not fit in registers; 32 keys are too few for wgmma.
        mma_sync=frozenset({"flash_attention_dkdv"}),
    ),
    Case(
        "dropout, fp32, head dim 128",
        flash_attention,
        _dense(2, 1024, 1024, 8, 8, 128, dropout_p=0.1),
        (torch.float32,),
    ),
    Case("ALiBi", flash_attention, _dense(4, 2048, 2048, 16, 16, 64, alibi=True), _ALL),
    Case("ALiBi, packed", flash_attention_varlen, _packed([1024, 517, 33], 32, 8, 128, alibi=True)),
    Case(
        "additive mask",
        flash_attention,
        _dense(4, 1024, 1024, 16, 16, 64, bias=(4, 1, 1024, 1024)),
        _ALL,
        serialised=_MASK,
    ),
    Case(
        "additive mask, ALiBi, head dim 128",
        flash_attention,
        _dense(4, 1024, 1024, 16, 16, 128, bias=(16, 1024, 1024), alibi=True, causal=False),
        serialised=_MASK,
    ),
    Case("head dim 192, values 128", flash_attention, _dense(2, 4096, 4096, 16, 16, 192, v_dim=128)),
    Case("head dim 64, values 128", flash_attention, _dense(2, 4096, 4096, 16, 16, 64, v_dim=128)),
    Case("head dim 256, fp32", flash_attention, _dense(1, 1024, 1024, 8, 8, 256), (torch.float32,)),
    Case(
        "head dim 256, fp32, dropout, softcap, window",
        flash_attention,
        _dense(1, 1024, 1024, 8, 4, 256, dropout_p=0.1, softcap=50.0, window=100),
        (torch.float32,),
    ),
]

CHECKS = [
    Case("causal", flash_attention, _dense(2, 33, 33, 2, 2, 16)),
    Case("not causal, head dim 24", flash_attention, _dense(1, 17, 40, 2, 2, 24, causal=False)),
    Case("grouped, window, softcap", flash_attention, _dense(1, 20, 37, 4, 2, 16, window=9, softcap=5.0)),
    Case("queries that see nothing", flash_attention, _dense(1, 21, 9, 2, 1, 16, return_lse=True)),
    Case("one query", flash_attention, _dense(2, 1, 19, 2, 1, 16)),
    Case("empty batch", flash_attention, _dense(0, 5, 5, 2, 2, 16)),
    Case("packed", flash_attention_varlen, _packed([5, 0, 18, 1], 2, 1, 16)),
    Case("ALiBi", flash_attention, _dense(2, 20, 37, 4, 2, 16, alibi=True)),
    Case("additive mask", flash_attention, _dense(2, 20, 37, 4, 2, 16, bias=(4, 20, 37))),
    Case("values of another head dim", flash_attention, _dense(1, 20, 37, 4, 2, 16, v_dim=40)),
    Case("packed, window", flash_attention_varlen, _packed([20, 7], 2, 2, 16, window=4)),
    Case("head dim 64, tiles of 128", flash_attention, _dense(1, 150, 150, 2, 1, 64)),
    Case("head dim 128, packed, window", flash_attention_varlen, _packed([140, 3], 2, 1, 128, window=50)),
]
