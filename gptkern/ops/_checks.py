"""Argument errors, phrased alike everywhere: the function, the argument, what came, what is accepted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch

from gptkern.ops import _dispatch, _launch
from gptkern.ops._types import KvScales

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KERNEL_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(op: str, name: str, value: object, *, dim: int | None = None) -> None:
    """``value`` is a tensor, of ``dim`` dimensions where that is given."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}; a torch.Tensor is needed")
    if dim is not None and value.dim() != dim:
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; {dim} dimensions are needed")
    sign(op, name, value)


def opposite(value: torch.Tensor) -> bool:
    """True of a view with the negative bit, as ``z.conj().imag``, in a call that reads memory itself."""
    return not torch.compiler.is_compiling() and value.is_neg() and _dispatch.reads_memory(value)


def sign(op: str, name: str, value: torch.Tensor) -> None:
    """``value``'s memory has its elements, and not their opposites, where a kernel reads it."""
    if opposite(value):
        raise ValueError(
            f"{op}: {name} has the negative bit, as z.conj().imag has: its memory has the opposites of its "
            f"elements; call {name}.resolve_neg()"
        )


def dtype(op: str, name: str, value: torch.Tensor, accepted: Sequence[torch.dtype] = FLOATS) -> None:
    """``value``'s dtype is one of ``accepted``."""
    if value.dtype not in accepted:
        raise TypeError(f"{op}: {name} is {_names([value.dtype])}; accepted are {_names(accepted)}")


def same_device(op: str, **values: torch.Tensor | None) -> None:
    """All tensors are on one device, and have their elements in memory; None is skipped."""
    devices = {name: value.device for name, value in values.items() if value is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: tensors are on different devices: {devices}")
    for name, value in values.items():
        if value is not None:
            sign(op, name, value)


def shape(op: str, name: str, value: torch.Tensor, expected: Sequence[int], why: str = "") -> None:
    """``value`` has exactly the ``expected`` shape."""
    if tuple(value.shape) != tuple(expected):
        reason = f" ({why})" if why else ""
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; {tuple(expected)} is needed{reason}")


def last_dim_contiguous(op: str, name: str, value: torch.Tensor) -> None:
    """The last dimension has stride 1; the others may have any stride."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} has strides {value.stride()}; the last dimension must be contiguous "
            f"(stride 1): call {name}.contiguous() if a copy is acceptable"
        )


def strided_loops(
    op: str, name: str, value: torch.Tensor, apart: int, described: str
) -> tuple[int, int, int]:
    """(inner size, outer stride, inner stride) of all dimensions but the last ``apart``, for a kernel.

    Raises:
        ValueError: They do not collapse to two strided loops, or the last dimension is not contiguous.
    """
    last_dim_contiguous(op, name, value)
    loops: list[tuple[int, int]] = []
    for size, stride in zip(value.shape[:-apart], value.stride()[:-apart], strict=True):
        if size == 1:
            continue
        if loops and loops[-1][1] == size * stride:
            loops[-1] = (loops[-1][0] * size, stride)
        else:
            loops.append((size, stride))
    if len(loops) > 2:
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)} and strides {value.stride()}; its {described} must "
            f"collapse to at most two strided loops: call {name}.contiguous() if a copy is acceptable"
        )
    inner, stride_inner = loops[-1] if loops else (1, 0)
    return inner, loops[0][1] if len(loops) == 2 else 0, stride_inner


def number(op: str, name: str, value: object) -> float:
    """A setting as a number: a tensor of one element is read, and text is none."""
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, (str, bytes)):
        with suppress(TypeError, ValueError, RuntimeError):
            return float(value)  # type: ignore[arg-type]
    raise TypeError(f"{op}: {name} is {value!r}; a number is needed")


def positive(op: str, name: str, value: object, *, none: bool = False) -> None:
    """A setting above 0 and finite; with ``none`` it may be None."""
    if none and value is None:
        return
    if 0.0 < number(op, name, value) < math.inf:
        return
    raise ValueError(
        f"{op}: {name} is {value}; a positive, finite number is needed{', or None' if none else ''}"
    )


def finite(op: str, name: str, value: object) -> None:
    """A setting that is a finite number."""
    if not math.isfinite(number(op, name, value)):
        raise ValueError(f"{op}: {name} is {value}; a finite number is needed")


def whole(op: str, name: str, value: object, least: int | None, *, none: bool = False) -> None:
    """A setting that is an int of at least ``least``; with ``none`` it may be None."""
    if value is None and none:
        return
    bound = "an int" if least is None else f"an int of at least {least}"
    needed = f"{op}: {name} is {value!r}; {bound} is needed{', or None' if none else ''}"
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(needed)
    if least is not None and value < least:
        raise ValueError(needed)


def choice(op: str, name: str, value: object, accepted: Iterable[str]) -> None:
    """A setting that is one of the ``accepted`` words."""
    words = tuple(accepted)
    if not isinstance(value, str) or value not in words:
        error = ValueError if isinstance(value, str) else TypeError
        listed = f"{', '.join(map(repr, words[:-1]))} and {words[-1]!r}"
        raise error(f"{op}: {name} is {value!r}; accepted are {listed}")


def probability(op: str, name: str, value: object) -> None:
    """A setting that is a dropout probability in [0, 1)."""
    if not 0.0 <= number(op, name, value) < 1.0:
        raise ValueError(f"{op}: {name} is {value}; 0 <= {name} < 1 is needed")


def eps(op: str, value: object) -> None:
    """``value`` keeps the root of a variance plus it real."""
    if not 0.0 <= number(op, "eps", value) < math.inf:
        raise ValueError(f"{op}: eps is {value}; a finite number, 0 or more, is needed")


def fp8_device(op: str, name: str, device: torch.device) -> None:
    """``device``, on which ``name`` is fp8, converts e4m3: CPUs do, and GPUs from sm_89 on."""
    if device.type != "cpu" and _launch.arch(device) < 89:
        raise ValueError(f"{op}: {name} is fp8; that needs compute capability 8.9 or newer")


def kv_scales(op: str, value: KvScales, expected: Sequence[int], why: str = "") -> None:
    """Both factors of an fp8 cache are fp32 tensors of the ``expected`` shape."""
    for name, scale in zip(("k_scale", "v_scale"), value, strict=True):
        tensor(op, name, scale)
        dtype(op, name, scale, (torch.float32,))
        shape(op, name, scale, expected, why)
