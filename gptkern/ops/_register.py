"""Registration of the ops with ``torch.library``, for torch.compile and export: one library for all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

_LIBRARY = torch.library.Library("gptkern", "FRAGMENT")


def register(
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    devices: Iterable[str] = ("CUDA", "CPU"),
) -> None:
    """Make ``torch.ops.gptkern.<name>`` of a schema, ``"name(Tensor x, ...) -> Tensor"``.

    Args:
        kernel: The implementation on each of ``devices``.
        fake: Outputs of the right shapes, dtypes and strides without values.
        setup_context, backward: The gradient, as ``torch.library.register_autograd`` takes it.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for device in devices:
        _LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"gptkern::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"gptkern::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )


def tensor_or_empty(value: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A registered op returns tensors, never None: an empty one stands for it."""
    return like.new_empty(0) if value is None else value


def kernel_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The ``backward`` of an ``autograd.Function`` that launches kernels, differentiable once.

    Gradients come as autograd made them: one with the negative bit, as behind a conjugate, is copied first,
    as its memory has the opposites of its elements.
    """

    @functools.wraps(backward)
    def resolved(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return backward(ctx, *(None if grad is None else grad.resolve_neg() for grad in grads))

    once: Callable[..., Any] = torch.autograd.function.once_differentiable(resolved)
    return once
