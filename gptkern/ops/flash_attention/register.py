"""Attention for autograd and ``torch.library``: ``torch.ops.gptkern.flash_attention`` and its backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from gptkern.ops._dispatch import use_kernel
from gptkern.ops._register import kernel_backward, register
from gptkern.ops.flash_attention import checks, launch, reference
from gptkern.ops.flash_attention.launch import UNLIMITED, Extras, Maybe, Options, Packed


class FlashAttention(torch.autograd.Function):
    """The kernels as autograd sees them in eager mode; ``torch.library``'s own way costs more host time."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packed: Packed | None,
        extras: Extras,
        o: Options,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = launch.forward(q, k, v, packed, extras, o)
        ctx.save_for_backward(q, k, v, out, lse, *(packed or (None, None))[:2], *extras)
        ctx.max_seqlens = None if packed is None else packed[2:]
        ctx.options = o
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @kernel_backward
    def backward(ctx: Any, do: Maybe, dlse: Maybe) -> Any:
        q, k, v, out, lse, cu_q, cu_k, *extras = ctx.saved_tensors
        packed = None if cu_q is None else Packed(cu_q, cu_k, *ctx.max_seqlens)
        do = torch.zeros_like(out) if do is None else do
        grads = launch.backward(do, dlse, q, k, v, out, lse, packed, Extras(*extras), ctx.options)
        return *grads, None, None, None


def _sides(o: Options) -> tuple[int | None, int | None]:
    left, right = (None if side == UNLIMITED else side for side in (o.window_left, o.window_right))
    return left, right


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed | None, extras: Extras, o: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by the reference, in fp32 at least: scores rounded before the softmax lose digits."""
    settings = (*_sides(o), o.scale, o.softcap or None, o.dropout_p, extras.slopes)
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v)]
    if packed is None:
        out, lse = reference.attention(wide[0], wide[1], wide[2], *settings, extras.bias)
    else:
        out, lse = reference.attention_varlen(wide[0], wide[1], wide[2], packed.cu_q, packed.cu_k, *settings)
    return out.to(q.dtype), lse


def attention_without_scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed | None, o: Options
) -> torch.Tensor | None:
    """The reference's result through PyTorch's own attention, None where that does not express the call."""
    if o.softcap or q.shape[-1] != v.shape[-1]:
        return None
    settings = (*_sides(o), o.scale, o.dropout_p)
    if packed is None:
        if not reference.sees_a_key(q.shape[1], k.shape[1], *settings[:2]):
            return None
        return reference.attention_cpu(q, k, v, *settings)
    q_starts, k_starts = packed.cu_q.tolist(), packed.cu_k.tolist()
    lengths = zip(pairwise(q_starts), pairwise(k_starts), strict=True)
    if not all(reference.sees_a_key(b - a, d - c, *settings[:2]) for (a, b), (c, d) in lengths if b > a):
        return None
    return reference.attention_varlen_cpu(q, k, v, q_starts, k_starts, *settings)


def flat_arguments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed | None, extras: Extras, o: Options
) -> tuple[Any, ...]:
    """A call as the schema names its arguments."""
    cu_q, cu_k, max_q, max_k = (None, None, q.shape[1], k.shape[1]) if packed is None else packed
    return (q, k, v, cu_q, cu_k, *extras, max_q, max_k, *o)


def _packed(cu_q: Maybe, cu_k: Maybe, max_seqlens: tuple[int, int]) -> Packed | None:
    if cu_q is None and cu_k is None:
        return None
    return Packed(cu_q, cu_k, *max_seqlens)  # type: ignore[arg-type]  # a None is refused by name


@contextmanager
def _seeded(seed: Maybe) -> Iterator[None]:
    """PyTorch's CPU generator in a state that ``seed`` alone decides: backward draws the same mask."""
    with torch.random.fork_rng(devices=(), enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(int(seed))
        yield


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: Maybe,
    cu_k: Maybe,
    seed: Maybe,
    slopes: Maybe,
    bias: Maybe,
    max_q: int,
    max_k: int,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    packed, extras, o = _packed(cu_q, cu_k, (max_q, max_k)), Extras(seed, slopes, bias), Options(*options)
    checks.check_registered("flash_attention", q, k, v, packed, (max_q, max_k), extras, o)
    if use_kernel(q):
        return launch.forward(q, k, v, packed, extras, o)
    with _seeded(seed):
        out, lse = reference_attention(q, k, v, packed, extras, o)
    return out.contiguous(), lse.to(torch.float32).contiguous()


def _backward(
    do: torch.Tensor,
    dlse: Maybe,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_q: Maybe,
    cu_k: Maybe,
    seed: Maybe,
    slopes: Maybe,
    bias: Maybe,
    max_q: int,
    max_k: int,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    op = "flash_attention_backward"
    packed, extras, o = _packed(cu_q, cu_k, (max_q, max_k)), Extras(seed, slopes, bias), Options(*options)
    checks.check_registered(op, q, k, v, packed, (max_q, max_k), extras, o)
    checks.check_gradients(op, q, v, packed is not None, do=do, dlse=dlse, out=out, lse=lse)
    if use_kernel(q):
        return launch.backward(do, dlse, q, k, v, out, lse, packed, extras, o)
    with torch.enable_grad(), _seeded(seed):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        results = reference_attention(inputs[0], inputs[1], inputs[2], packed, extras, o)
        grads = (do, torch.zeros_like(results[1]) if dlse is None else dlse.to(results[1].dtype))
        return tuple(t.contiguous() for t in torch.autograd.grad(results, inputs, grads))


def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: Maybe, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    lse_shape = launch.lse_shape(q, cu_q is not None)
    return q.new_empty(launch.out_shape(q, v)), q.new_empty(lse_shape, dtype=torch.float32)


def _fake_backward(
    do: torch.Tensor, dlse: Maybe, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_q, cu_k, seed, slopes, bias, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, seed, slopes, bias)


def _autograd_backward(ctx: Any, do: torch.Tensor, dlse: torch.Tensor) -> tuple[Maybe, ...]:
    grads = torch.ops.gptkern.flash_attention_backward(do, dlse, *ctx.saved_tensors, *ctx.settings)
    return *grads, *[None] * (5 + len(ctx.settings))


_SETTINGS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, Tensor? alibi_slopes, Tensor? attn_bias, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt window_left, SymInt window_right, float scale, "
    "float softcap, float dropout_p"
)
register(
    f"flash_attention(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)",
    _forward,
    fake=_fake_forward,
    setup_context=_setup_context,
    backward=_autograd_backward,
)
register(
    "flash_attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_fake_backward,
)
