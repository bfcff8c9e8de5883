"""Linear layers with a fused epilogue, in plain PyTorch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": _gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "none": _identity,
}


def linear_act(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def linear_residual(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    return residual + F.linear(x, weight, bias)


def activation_backward(dout: torch.Tensor, pre: torch.Tensor, activation: str) -> torch.Tensor:
    """``dout * activation'(pre)`` by the formulas of PyTorch's autograd, for use when it is off."""
    backward = {
        "gelu_tanh": lambda: torch.ops.aten.gelu_backward(dout, pre, approximate="tanh"),
        "gelu": lambda: torch.ops.aten.gelu_backward(dout, pre),
        "relu": lambda: torch.ops.aten.threshold_backward(dout, pre, 0),
        "silu": lambda: torch.ops.aten.silu_backward(dout, pre),
        "none": lambda: dout,
    }
    dpre: torch.Tensor = backward[activation]()
    return dpre


def linear_backward(
    dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, pre: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias) of matrices ``x (tokens, in)`` and ``dout (tokens, out)``."""
    dpre = activation_backward(dout, pre, activation)
    return dpre @ weight, dpre.t() @ x, dpre.sum(0)
