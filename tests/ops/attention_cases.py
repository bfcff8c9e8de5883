"""What the tests of attention share: cases, inputs, and the measure of an error."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.ops.flash_attention import reference

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


class Case(NamedTuple):
    batch: int
    seq_q: int
    seq_k: int
    heads: int
    heads_k: int
    head_dim: int
    dtype: torch.dtype = F32
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    tiles: tuple[int, int] = (32, 32)


def inputs(case: Case, device: torch.device) -> list[torch.Tensor]:
    def make(seq: int, heads: int) -> torch.Tensor:
        values = torch.randn(case.batch, seq, heads, case.head_dim, device=device)
        return values.to(case.dtype).requires_grad_()

    return [make(case.seq_q, case.heads), make(case.seq_k, case.heads_k), make(case.seq_k, case.heads_k)]


def span(causal: bool, window: int | None) -> tuple[int | None, int | None]:
    left = None if window is None else window - 1
    return left, 0 if causal else left


def plain(
    qkv: list[torch.Tensor],
    dtype: torch.dtype,
    do: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    sides: tuple[int | None, int | None] = (None, 0),
    scale: float | None = None,
    softcap: float | None = None,
) -> dict[str, torch.Tensor]:
    """The reference's out, lse and gradients, computed in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in qkv]
    out, lse = reference.attention(*leaves, *sides, scale, softcap)
    total = (out * do.to(dtype)).sum()
    if dlse is not None:
        total = total + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(total, leaves)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True))


def assert_close(
    got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], rough: dict[str, torch.Tensor]
) -> None:
    """flash-attn's measure: at most twice the plain expression's error, plus one ulp of the output's scale.

    Four times for dq and dk in fp32. Where a query sees few keys, dp - delta cancels. Plain autograd
    subtracts the same products and gets an exact 0; delta = rowsum(do * out) is rounded apart from
    dp = do v^T, and what is left is of the size of fp32's own rounding. In fp16 and bf16 the rounding
    of the weights hides it.
    """
    for name, value in got.items():
        assert value.shape == exact[name].shape, name
        finite = exact[name].isfinite()
        assert torch.equal(value.double()[~finite], exact[name][~finite]), f"{name}: infinities differ"
        if not finite.any():
            continue
        values, exacts, roughs = (t.double()[finite] for t in (value, exact[name], rough[name]))
        ulp = torch.finfo(value.dtype).eps * exacts.abs().max()
        factor = 4 if value.dtype == F32 and name in ("dq", "dk") else 2
        error, allowed = (values - exacts).abs().max(), factor * (roughs - exacts).abs().max() + ulp
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
