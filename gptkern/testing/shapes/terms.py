"""The largest terms of the sums behind an op's results and gradients: an ulp of them is accepted."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from gptkern.ops._cases import Call
from gptkern.testing import attention_terms, norm_terms
from gptkern.testing.shapes.drawing import Trial

# The upstream gradients are normally distributed: none of a trial's passes 5 or so.
_UPSTREAM = 5.0
Terms = Callable[[Trial, Call], list[float]]


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().nan_to_num(0.0, 0.0, 0.0)


def _largest(x: torch.Tensor) -> float:
    return float(_finite(x).abs().max()) if x.numel() else 0.0


def _over_rows(trial: Trial, rows: int) -> float:
    """The error of a sum over rows, in terms: their root, or where all rows are alike their number."""
    return float(rows if trial.values in ("denormal", "low", "equal") else rows**0.5)


def attention(trial: Trial, call: Call) -> list[float]:
    """The terms of dq, dk and dv, with the largest score there can be for the largest lse."""
    q, k, v = (_finite(x if x.dim() == 4 else x[None]) for x in call.args[:3])
    lse = (q.abs().amax() * k.abs().amax() * q.shape[-1] ** 0.5).reshape(1)
    grad = torch.full((*q.shape[:-1], v.shape[-1]), _UPSTREAM)
    # The ulps are those of the op's dtype.
    q, k, v, grad = (x.to(call.args[0].dtype) for x in (q, k, v, grad))
    return [0.0, *attention_terms(q, k, v, grad, lse).values()]


def norm(residual: bool, centered: bool) -> Terms:
    def terms(trial: Trial, call: Call) -> list[float]:
        x, *rest = (_finite(t) for t in call.args)
        weight, total = (rest[1], x + rest[0]) if residual else (rest[0], x)
        eps, grad = 1e-5 if centered else 1e-6, torch.full_like(x, _UPSTREAM)
        of = norm_terms(total, weight, grad, eps, centered=centered)
        rows = _over_rows(trial, len(x))
        inputs = [of["dx"]] * (1 + residual)
        return [
            of["out"],
            *([0.0] * residual),
            *inputs,
            rows * of["dweight"],
            *([rows * _UPSTREAM] * centered),
        ]

    return terms


def _derivative(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(activation, its derivative)."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "gelu": F.gelu,
        "relu": F.relu,
        "silu": F.silu,
        "none": lambda y: y,
    }
    x = x.requires_grad_()
    y = functions[activation](x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def linear(trial: Trial, call: Call) -> list[float]:
    """A product's terms are those of its largest row and column."""
    x, weight, bias, *_ = (_finite(t) for t in call.args)
    _, slope = _derivative(x @ weight.T + bias, trial.options.get("activation", "none"))
    dpre, rows = _UPSTREAM * _largest(slope), _over_rows(trial, len(x))
    out = max(_largest(x) * _largest(weight), _largest(bias))
    return [out, dpre * _largest(weight), rows * dpre * _largest(x), rows * dpre]


def mlp(gated: bool) -> Terms:
    def terms(trial: Trial, call: Call) -> list[float]:
        x, w_fc, b_fc, w_proj, b_proj = (_finite(t) for t in call.args)
        pre = x @ w_fc.T + b_fc
        gate, up = pre.chunk(2, -1) if gated else (pre, torch.ones_like(pre))
        active, slope = _derivative(gate, trial.options["activation"])
        dhidden, rows = _UPSTREAM * _largest(w_proj) * w_proj.shape[0] ** 0.5, _over_rows(trial, len(x))
        dpre = dhidden * max(_largest(slope * up), _largest(active) if gated else 0.0)
        hidden = _largest(active * up)
        out = max(hidden * _largest(w_proj), _largest(b_proj))
        first = [dpre * _largest(w_fc), rows * dpre * _largest(x), rows * dpre]
        return [out, *first, rows * _UPSTREAM * hidden, rows * _UPSTREAM]

    return terms


def loss(trial: Trial, call: Call) -> list[float]:
    """A logit's gradient is at most 1, times the upstream one."""
    hidden, weight, targets = call.args
    each = (
        _UPSTREAM / max(1, int((targets != -100).sum()))
        if trial.options["reduction"] == "mean"
        else _UPSTREAM
    )
    return [0.0, each * _largest(weight), _over_rows(trial, len(hidden)) * each * _largest(hidden)]
