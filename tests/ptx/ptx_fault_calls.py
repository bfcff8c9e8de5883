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
        edges: (size, values): further evidence is each launch with an int64 tensor of so many elements whose
            first have these values, which the ops refuse on a CPU and the kernels have masks for.
    """

    op: _cases.Op
    makes: tuple[_cases.Make, ...]
    kernels: tuple[str, ...]
    programs: int = 2
    edges: tuple[int, tuple[int, ...]] = (0, ())


def _splits(device: torch.device, dtype: torch.dtype) -> _cases.Call:
    """One head of keys in splits: a sequence that fills three, and one that fills two."""
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in ((2, 2, 20), *[(40, 16, 1, 20)] * 2))
    table = torch.arange(40, dtype=torch.int32, device=device).view(2, 20)
    return _cases.Call((q, k, v, table, torch.tensor([300, 130], dtype=torch.int32, device=device)))


def _positions(device: torch.device, dtype: torch.dtype) -> _cases.Call:
    made = rotary_cases._heads(2, 9, 3, 3, 24, dim=6, norm=True)(device, dtype)
    return _cases.Call((*made.args, torch.arange(9, device=device)), made.kwargs)


def _wide_rows(device: torch.device, dtype: torch.dtype) -> _cases.Call:
    return ptx_kernels._wide_rows(device, dtype)


# Kernels that serve all tiles with any number of programs.
ANY_GRID = ("linear",)
CALLS = {
    "linear": Calls(
        linear_cases.linear_act,
        (linear_cases._act(330, 200, 72, "gelu_tanh"),),
        ("linear", "linear_dw", "column_sum"),
    ),
    "gelu": Calls(gelu_mlp, (mlp_cases.inputs(70, 328, 72),), ("linear_dact",)),
    "gated": Calls(
        gated_mlp,
        (mlp_cases.inputs(70, 328, 72, gate=2, bias=True),),
        ("gated_linear", "gated_linear_dact"),
    ),
    "attention": Calls(
        flash_attention,
        (flash_cases._dense(1, 200, 200, 2, 1, 16), flash_cases._dense(1, 200, 136, 2, 1, 16)),
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
        (_splits,),
        ("decode_attention_kernel",),
        132,
    ),
    "append": Calls(
        attend_cases.append_kv, (attend_cases._append(7, 3, 20),), ("append_kv_kernel",), edges=(7, (-1, 112))
    ),
    "embed": Calls(
        decode_embed, (embed_cases._embed(3, 11, 20),), ("decode_embed_kernel",), edges=(3, (-1, 11))
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
        edges=(9, (-1, 9)),
    ),
    "loss": Calls(
        _loss,
        (loss_cases._inputs(65, 200, 150),),
        ("logits_kernel", "loss_kernel", "dhidden_kernel", "dweight_kernel"),
        edges=(65, (-1, 150)),
    ),
}
