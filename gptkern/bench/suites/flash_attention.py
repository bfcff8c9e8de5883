"""Causal attention, forward and backward: bound by the matrix and the exponential units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from gptkern import ops
from gptkern.bench.problem import Inputs, Problem, Provider, Unavailable
from gptkern.bench.suites import _providers as shared
from gptkern.ops.flash_attention.reference import attention

# (batch, seq, heads, head_dim): 16k tokens each
GPU = [
    (16, 1024, 16, 64),
    (8, 2048, 16, 128),
    (8, 2048, 16, 64),
    (4, 4096, 16, 64),
    (2, 8192, 16, 64),
    (1, 16384, 16, 64),
    (16, 1024, 16, 128),
    (4, 4096, 16, 128),
    (2, 8192, 16, 128),
]
CPU = [(1, 256, 12, 64), (2, 128, 4, 64), (1, 512, 12, 64)]


def _sdpa(backend: SDPBackend | None) -> Provider:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if backend is not None and not q.is_cuda:
            raise Unavailable("this SDPA backend needs a GPU")
        with nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
            )
        return out.transpose(1, 2)

    return call


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention(q, k, v)[0]


def _by_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Head by head, recomputed for the gradients: 16 heads' float64 squares at 16k are 34 GB each."""
    heads = [
        checkpoint(_eager, *(t[:, :, head : head + 1] for t in (q, k, v)), use_reentrant=False)
        for head in range(q.shape[2])
    ]
    return torch.cat(heads, 2)


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if not q.is_cuda:
        raise Unavailable("flash-attn needs a GPU")
    from flash_attn import flash_attn_func

    out: torch.Tensor = flash_attn_func(q, k, v, causal=True)
    return out


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Forward and backward of every shape."""
    peers: dict[str, Provider] = {"gptkern": ops.flash_attention, "sdpa": _sdpa(None)}
    if device.type == "cuda":
        peers["sdpa flash"] = _sdpa(SDPBackend.FLASH_ATTENTION)
        peers["sdpa efficient"] = _sdpa(SDPBackend.EFFICIENT_ATTENTION)
        peers["sdpa cudnn"] = _sdpa(SDPBackend.CUDNN_ATTENTION)
    else:
        peers |= shared.eager_and_compiled(_eager, quick)
    if shared.installed("flash_attn"):
        peers["flash-attn"] = _flash_attn
    for dtype in shared.dtypes(device, quick):
        for shape in shared.of_widths(device, GPU, CPU, quick):
            for backward in (False, True):
                yield _problem(shape, dtype, peers, backward)


def _problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, peers: dict[str, Provider], backward: bool
) -> Problem:
    batch, seq, heads, head_dim = shape

    def inputs(device: torch.device) -> Inputs:
        return tuple(shared.randn(*shape, dtype=dtype, device=device, grad=backward) for _ in range(3))

    products = 5 if backward else 2
    tensors = 8 if backward else 4
    return Problem(
        "flash_attention",
        f"{batch}x{seq}x{heads}x{head_dim}",
        dtype,
        inputs,
        dict(peers),
        _by_heads,
        bytes_moved=tensors * batch * seq * heads * head_dim * dtype.itemsize,
        flops=products * batch * heads * seq * seq * head_dim,
        backward=backward,
    )
