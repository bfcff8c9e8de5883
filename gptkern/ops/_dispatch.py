"""The choice of an implementation for a call: the Triton kernel or the PyTorch reference.

CUDA tensors run the kernel. CPU tensors run the reference, or the kernel under Triton's
interpreter when ``TRITON_INTERPRET=1`` was set before Triton was imported; it is then mended first, as
alone it computes bf16 wrongly (see ``_interpreter``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor

from gptkern import _native
from gptkern.ops import _launch

Backend = Literal["auto", "reference", "kernel"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")  # as Triton
if INTERPRETED:
    from gptkern.ops import _interpreter

    _interpreter.install()

_backend: Backend = "auto"


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force every op called inside to one implementation, to debug or to compare.

    ``"reference"`` is the plain PyTorch expression on any device; ``"kernel"`` is the Triton
    kernel, which on CPU tensors needs ``TRITON_INTERPRET=1``; ``"auto"`` is the default choice.
    The setting is process-wide, not per thread: it is a tool for debugging.
    """
    global _backend
    if name not in ("auto", "reference", "kernel"):
        raise ValueError(f"backend: got {name!r}; accepted are 'auto', 'reference' and 'kernel'")
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


_answers: list[bool] | None = None


@contextmanager
def kernel_answers() -> Iterator[list[bool]]:
    """Collect the answers of ``use_kernel`` to the ops called in the block: an empty list if none asks."""
    global _answers
    previous, _answers = _answers, []
    try:
        yield _answers
    finally:
        _answers = previous


def use_kernel(tensor: torch.Tensor) -> bool:
    """True if a call on ``tensor`` runs the Triton kernel (the tensors' agreement is checked apart)."""
    answer = _uses_kernel(tensor)
    if _answers is not None:
        _answers.append(answer)
    return answer


def _uses_kernel(tensor: torch.Tensor) -> bool:
    if _backend == "reference":
        return False
    device = tensor.device.type
    if device == "cuda":
        return True
    if device == "meta":  # a recorded launch: see _launch.record
        return True
    if device == "cpu":
        if _launch.recording():
            return True
        if _backend == "kernel" and not INTERPRETED:
            raise RuntimeError(
                "backend('kernel') on CPU tensors needs TRITON_INTERPRET=1 in the environment "
                "before triton is imported"
            )
        return INTERPRETED
    raise ValueError(f"tensors are on device {device!r}; gptkern's ops run on 'cuda' and 'cpu'")


def reads_memory(tensor: torch.Tensor) -> bool:
    """True if a call on ``tensor`` launches a kernel here, past PyTorch's dispatcher."""
    return tensor.device.type in ("cpu", "cuda") and _uses_kernel(tensor) and not traced(tensor)


def traced(tensor: torch.Tensor) -> bool:
    """True if the registered op takes a call on ``tensor``, as its arguments hold no memory to launch on.

    So it is under ``torch.compile``, of fake tensors, of meta tensors where no launches are recorded, and
    under ``torch.vmap``, which calls the registered op for each sample.
    """
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor):
        return True
    # The stack holds the running vmap: any argument may be the mapped one, not ``tensor`` alone.
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return tensor.device.type == "meta" and not _launch.recording()


_describe = None if _native.extension is None else _native.extension.describe
# Settings of other types, as a tensor of one element, may change their value, or have no hash.
_PLAIN = frozenset({bool, int, float, str, type(None)})


def call_key(tensors: tuple[torch.Tensor | None, ...], *settings: object) -> object:
    """A key of calls that are checked, routed and launched alike, for ``_launch.Plans``.

    It holds each tensor's dtype, device, alignment, sizes and strides, and the arguments that are no tensors
    with their types, as a kernel takes 2 and 2.0 apart: a call whose key was seen needs no second check.
    None, which is the key of no call: there is more that decides, as autocast or a trace, an argument is no
    plain tensor with memory, or a setting is no plain value.
    """
    if (
        torch.compiler.is_compiling()
        or _describe is None
        or _answers is not None
        or _launch._observer is not None  # each launch that is looked at is worked out anew
        or torch._C._is_any_autocast_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return None
    described, types = _describe(*tensors), tuple(map(type, settings))
    if described is None or not _PLAIN.issuperset(types):
        return None
    return described, _backend, _launch._recorded_arch, settings, types


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """True if autograd must see this call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype of matrix products on ``tensor``'s device under autocast, or None outside autocast."""
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None
