"""The calls into whose kernels faults are planted: sizes at which every mask, wait and counter matters.

Several tiles and a rest along each axis, more tiles than programs where a program takes one after another,
and more steps of k than a pipeline has stages. Of a kernel the first launch's text is taken; the other
launches with the same text, of the same call or of the calls after it, are further evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import ptx_kernels
import torch

from gptkern.ops import _cases, decode_attention, decode_embed, flash_attention, gated_mlp, gelu_mlp
from gptkern.ops import layer_norm as _layer_norm
from gptkern.ops import linear_cross_entropy as _loss
from gptkern.ops import rotary as _rotary
from gptkern.ops.decode_attention import cases as attend_cases
from gptkern.ops.decode_embed import cases as embed_cases
from gptkern.ops.decode_linear import cases as decode_cases
from gptkern.ops.flash_attention import cases as flash_cases
from gptkern.ops.gelu_mlp import cases as mlp_cases
from gptkern.ops.layer_norm import cases as norm_cases
from gptkern.ops.linear import cases as linear_cases
from gptkern.ops.linear_cross_entropy import cases as loss_cases
from gptkern.ops.rotary import cases as rotary_cases


@dataclass(frozen=True)
class Calls:
    """Calls of one op.

    Attributes:
        kernels: Those into which faults are planted.
        programs: The multiprocessors that launches of as many programs as fit believe in.
        edges: (dtype, size, values): further evidence is each launch with a tensor of this dtype and of so
            many elements whose first have these values, which the ops refuse on a CPU and the kernels have
            masks for.
    """

    op: _cases.Op
    makes: tuple[_cases.Make, ...]
    kernels: tuple[str, ...]
    programs: int = 2
    edges: tuple[tuple[torch.dtype, int, tuple[int, ...]], ...] = ()


def _splits(device: torch.device, dtype: torch.dtype) -> _cases.Call:
    """One head of keys in splits: a sequence that fills three, and one that fills two."""
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in ((2, 2, 20), *[(40, 16, 1, 20)] * 2))
    table = torch.arange(40, dtype=torch.int32, device=device).view(2, 20)
    return _cases.Call((q, k, v, table, torch.tensor([300, 130], dtype=torch.int32, device=device)))


def _sequences(device: torch.device, dtype: torch.dtype) -> _cases.Call:
    """As ``_splits``, with a sequence that fills one split and one that has no token."""
    q = torch.randn((4, 2, 20), device=device).to(dtype)
    table = torch.arange(80, dtype=torch.int32, device=device).view(4, 20) % 40
    lengths = torch.tensor([300, 100, 0, 128], dtype=torch.int32, device=device)
    return _cases.Call((q, *_splits(device, dtype).args[1:3], table, lengths))


def _rows(device: torch.device, dtype: torch.dtype) -> _cases.Call:
    """Rows of which the last is padding."""
    made = embed_cases._embed(9, 11, 20)(device, dtype)
    made.args[1].fill_(8)
    return made


def _positions(device: torch.device, dtype: torch.dtype) -> _cases.Call:
    made = rotary_cases._heads(2, 9, 3, 3, 24, dim=6, norm=True)(device, dtype)
    return _cases.Call((*made.args, torch.arange(9, device=device)), made.kwargs)


def _wide_rows(device: torch.device, dtype: torch.dtype) -> _cases.Call:
    return ptx_kernels._wide_rows(device, dtype)


# Kernels that serve all tiles with any number of programs.
ANY_GRID = ("linear",)
# Kernels whose second axis of programs shares out a sum: one of them alone has the most steps.
ANY_SHARES = ("linear_dw",)
CALLS = {
    "linear": Calls(
        linear_cases.linear_act,
        tuple(
            linear_cases._act(*sizes, "gelu_tanh")
            for sizes in ((330, 200, 72), (325, 456, 136), (323, 72, 120), (65, 72, 88), (5, 72, 104))
        ),
        ("linear", "linear_dw", "column_sum"),
    ),
    "gelu": Calls(
        gelu_mlp,
        tuple(
            mlp_cases.inputs(*sizes)
            for sizes in ((70, 328, 72), (133, 24, 200), (5, 24, 88), (5, 24, 104), (5, 24, 120))
        ),
        ("linear_dact",),
    ),
    "gated": Calls(
        gated_mlp,
        tuple(
            mlp_cases.inputs(*sizes, gate=2, bias=True)
            for sizes in ((70, 328, 72), (129, 72, 136), (133, 24, 200))
        ),
        ("gated_linear", "gated_linear_dact"),
    ),
    "attention": Calls(
        flash_attention,
        tuple(
            flash_cases._dense(1, queries, keys, 2, 1, 16)
            for queries, keys in ((200, 200), (200, 136), (296, 141), (136, 205))
        ),
        ("flash_attention_forward", "flash_attention_dq", "flash_attention_dkdv"),
    ),
    "decode": Calls(
        decode_cases.decode_linear,
        tuple(decode_cases._linear(rows, 600, 33, norm=False, activation="relu") for rows in (17, 18, 31)),
        ("decode_linear_kernel",),
    ),
    "qkv": Calls(
        decode_cases.decode_qkv,
        (decode_cases._modern_qkv(5, 136, 2, 1, 20, dim=8, norm=True),),
        ("decode_linear_kernel",),
    ),
    "decode_attention": Calls(
        decode_attention,
        (_splits, _sequences),
        ("decode_attention_kernel",),
        132,
        ((torch.int32, 4, (-1, 300, 321, 0)),),
    ),
    "append": Calls(
        attend_cases.append_kv,
        (attend_cases._append(7, 3, 20),),
        ("append_kv_kernel",),
        edges=((torch.int64, 7, (-1, 112)),),
    ),
    "embed": Calls(
        decode_embed,
        (embed_cases._embed(3, 11, 20), _rows),
        ("decode_embed_kernel",),
        edges=(
            (torch.int64, 9, (-1, 11)),
            (torch.int32, 9, (-1, 63, 64, 15, 16)),
            (torch.int32, 36, (-1,) * 36),
        ),
    ),
    "norm": Calls(
        norm_cases.add_layer_norm,
        tuple(norm_cases._add(rows, 65) for rows in (37, 41, 40, 63)),
        ("norm_forward_kernel", "norm_backward_kernel", "norm_weight_grad_kernel"),
    ),
    "wide norm": Calls(
        _layer_norm,
        (_wide_rows,),
        ("norm_wide_forward_kernel", "norm_wide_backward_kernel", "norm_wide_weight_grad_kernel"),
    ),
    "rotary": Calls(
        _rotary,
        (_positions,),
        ("rotary_kernel", "rotary_norm_backward_kernel"),
        edges=((torch.int64, 9, (-1, 9)),),
    ),
    "loss": Calls(
        _loss,
        (
            loss_cases._inputs(65, 200, 150),
            loss_cases._inputs(65, 24, 141),
            loss_cases._inputs(127, 200, 250),
        ),
        ("logits_kernel", "loss_kernel", "dhidden_kernel", "dweight_kernel"),
        edges=((torch.int64, 65, (-1, 150) * 32),),
    ),
}
