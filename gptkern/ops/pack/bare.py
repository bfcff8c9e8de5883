"""Launches without their tensors: what machine code depends on, to keep and to send to another process."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from gptkern.ops import _launch


@dataclass(frozen=True)
class Pointer:
    """A tensor's dtype and address."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """The address."""
        return self.address


def _bare(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(value.dtype, value.data_ptr())
    if hasattr(value, "block_shape"):
        descriptor = copy.copy(value)
        descriptor.base = _bare(value.base)
        return descriptor
    return value


def bare(launch: _launch.Launch) -> _launch.Launch:
    """The launch without its tensors."""
    return replace(launch, args=tuple(map(_bare, launch.args)))


Sent = tuple[str, str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


def sent(launch: _launch.Launch) -> Sent:
    """A bare launch as another process can be sent it: with its kernel's module and name."""
    function = launch.kernel.fn
    return function.__module__, function.__name__, launch.grid, launch.args, launch.kwargs


def received(parts: Sent) -> _launch.Launch:
    """The launch that ``sent`` made these parts of."""
    module, name, grid, args, kwargs = parts
    return _launch.Launch(getattr(importlib.import_module(module), name), grid, args, kwargs)
