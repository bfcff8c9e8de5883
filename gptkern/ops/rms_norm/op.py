"""RMS normalisation, alone and fused with the residual addition before it."""

from __future__ import annotations

import torch

from gptkern.ops._dispatch import call_key, traced, use_kernel
from gptkern.ops._launch import Plans
from gptkern.ops.layer_norm.checks import check, check_kernel
from gptkern.ops.layer_norm.launch import Forward, Settings, forward_plan
from gptkern.ops.layer_norm.op import add_norm, new_seed, norm, out_dtype
from gptkern.ops.rms_norm import reference, register  # noqa: F401  (register: torch.ops.gptkern.rms_norm)

_plans: Plans[Forward] = Plans()


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, *, unit_offset: bool = False
) -> torch.Tensor:
    """RMS normalisation over the last dimension (Zhang and Sennrich 2019).

    ``x / sqrt(mean(x**2) + eps) * weight``, with the mean in fp32 whatever the dtypes.

    Args:
        x: ``(..., width)``, width 1 to 65536; fp32, fp16 or bf16 (float64 on a CPU). The last
            dimension is contiguous; the leading ones must collapse to at most two strided loops, and a
            stride of 0 is allowed.
        weight: ``(width,)``, of the same or another floating dtype: fp32 beside halves is used as it is;
            None: none.
        eps: Added to the mean square.
        unit_offset: The factors are ``1 + weight`` (Gemma), not ``weight``.

    Returns:
        Contiguous, of ``x``'s shape and dtype; under autocast of autocast's dtype.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, layout or device that is not accepted.
    """
    key = call_key((x, weight), eps, unit_offset)
    plan = _plans.get(key)
    if plan is not None:
        return norm(plan, x, weight, None)
    check("rms_norm", x, None, weight, None, eps)
    dtype = out_dtype(x, None)
    if not use_kernel(x):
        return reference.rms_norm(x, weight, eps, unit_offset).to(dtype)
    check_kernel("rms_norm", x=x, weight=weight)
    if traced(x):
        out: torch.Tensor = torch.ops.gptkern.rms_norm(x, weight, eps, dtype, unit_offset)[0]
        return out
    settings = Settings("rms_norm", False, eps, 0.0, dtype, unit_offset)
    return norm(_plans.keep(key, forward_plan(x, None, settings)), x, weight, None)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    dropout_p: float = 0.0,
    unit_offset: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``new_residual = residual + dropout(x)`` and its RMS normalisation, in one pass over memory.

    Args:
        x: ``(..., width)``, as in ``rms_norm``.
        residual: The same shape, of the same or another floating dtype, any layout that ``x`` may have.
        weight, eps, unit_offset: As in ``rms_norm``.
        dropout_p: Probability that an element of ``x`` is dropped, in [0, 1), rounded by the kernel
            to a multiple of 2**-16. 0 outside training.

    Returns:
        (normed, new_residual), both contiguous. ``new_residual`` has the wider of the two dtypes, and
        ``normed`` is exactly its RMS norm: of the same dtype, under autocast of autocast's.

    Raises:
        TypeError, ValueError: as ``rms_norm``.
    """
    key = call_key((x, residual, weight), eps, dropout_p, unit_offset)
    plan = _plans.get(key)
    if plan is not None:
        return add_norm(plan, x, residual, weight, None)
    check("add_rms_norm", x, residual, weight, None, eps, dropout_p)
    dtype = out_dtype(x, residual)
    if not use_kernel(x):
        normed, total = reference.add_rms_norm(x, residual, weight, eps, dropout_p, unit_offset)
        return normed.to(dtype), total
    check_kernel("add_rms_norm", x=x, residual=residual, weight=weight)
    if traced(x):
        seed = new_seed(x, dropout_p)
        op = torch.ops.gptkern.add_rms_norm
        normed, total, _ = op(x, residual, weight, eps, dropout_p, seed, dtype, unit_offset)
        return normed, total
    settings = Settings("add_rms_norm", False, eps, dropout_p, dtype, unit_offset)
    return add_norm(_plans.keep(key, forward_plan(x, residual, settings)), x, residual, weight, None)
