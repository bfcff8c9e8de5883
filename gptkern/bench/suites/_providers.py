"""Providers that several suites share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from gptkern.bench.problem import Provider


def compiled(function: Provider) -> Provider:
    """``function`` under ``torch.compile``, compiled on its first call."""
    return torch.compile(function, dynamic=False)


def installed(module: str) -> bool:
    """True if an optional peer can be imported."""
    return importlib.util.find_spec(module) is not None


def randn(
    *shape: int, dtype: torch.dtype, device: torch.device, grad: bool = False, scale: float = 1.0
) -> torch.Tensor:
    """Fresh normal values."""
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_(grad)


def of_widths(device: torch.device, gpu: list[Any], cpu: list[Any], quick: bool) -> list[Any]:
    """The shapes to run: a GPU's or a CPU's, the first two of them in a quick run."""
    shapes = gpu if device.type == "cuda" else cpu
    return shapes[:2] if quick else shapes


def dtypes(device: torch.device, quick: bool) -> list[torch.dtype]:
    """The dtypes to run: what people use on such a device."""
    if device.type == "cuda":
        return [torch.bfloat16] if quick else [torch.bfloat16, torch.float16]
    return [torch.float32] if quick else [torch.float32, torch.bfloat16]


def eager_and_compiled(function: Callable[..., Any], quick: bool) -> dict[str, Provider]:
    """The plain PyTorch expression as it is, and compiled where there is time to compile it."""
    providers: dict[str, Provider] = {"eager": function}
    if not quick:
        providers["torch.compile"] = compiled(function)
    return providers
