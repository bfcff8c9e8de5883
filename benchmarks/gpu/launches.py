"""A kernel launch as a line of JSON, and back as arguments that specialise a kernel as those did.

Triton compiles a kernel once for every combination of argument types, of integers that are 1 or divide by 16,
of pointers that do, and of compile-time values. A line keeps that and no more, so that two launches with the
same line are served by the same machine code. Neither way needs PyTorch.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The least integers that Triton passes in 64 bits, signed and unsigned.
_LONG, _UNSIGNED = 1 << 31, 1 << 63


def line(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, interpreted: bool = False) -> str:
    """The launch of ``kernel`` with these arguments.

    Args:
        interpreted: It took place under Triton's interpreter, and stands for the compiled one on sm_90 or
            newer: a dependent launch, or where programs wait for each other a cooperative one.

    Raises:
        TypeError: A compile-time value that JSON cannot hold.
    """
    function = kernel.fn
    names = list(inspect.signature(function).parameters.values())
    described = [
        _exact(value) if "constexpr" in str(parameter.annotation) else _kind(value)
        for value, parameter in zip(args, names, strict=False)
    ]
    options = {name: _exact(value) for name, value in sorted(kwargs.items())}
    if interpreted and "PDL" in options:
        options |= {"PDL": True, "launch_pdl": True}
    if interpreted and "COMPILED" in options:
        options |= {"COMPILED": True, "launch_cooperative_grid": True}
    return json.dumps([function.__module__, function.__name__, described, options])


def _kind(value: Any) -> Any:
    """What of a run-time argument a kernel is compiled for."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"int": value if value == 1 else _alike(value)}
    if isinstance(value, float):
        return {"float": 0.5}
    if hasattr(value, "block_shape"):
        made = {"descriptor": _dtype(value.base), "block": list(value.block_shape)}
        if hasattr(value, "layout"):  # Gluon's: the layout of its tiles in shared memory
            made["layout"] = [value.layout.swizzle_byte_width, value.layout.element_bitwidth]
        return made
    return {"tensor": _dtype(value), "aligned": value.data_ptr() % 16 == 0}


def _alike(value: int) -> int:
    """An integer of the same width that 16 divides where it divides ``value``."""
    base = _UNSIGNED if value >= _UNSIGNED else _LONG if not -_LONG <= value < _LONG else 0
    return base + (16 if value % 16 == 0 else 3)


def _exact(value: Any) -> Any:
    """A compile-time value."""
    if isinstance(value, tuple | list):
        return {"tuple": [_exact(item) for item in value]}
    if type(value).__module__.startswith("triton.language"):
        return {"dtype": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a launch passes {value!r} by name: no compile-time value that a line of JSON can hold")


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class StandIn:
    """What a kernel's specialisation asks of a tensor."""

    def __init__(self, dtype: str, *, aligned: bool = True) -> None:
        self.dtype = dtype
        self._address = 1024 if aligned else 1025

    def data_ptr(self) -> int:
        """An address that 16 divides, or not."""
        return self._address


@dataclass
class Recorded:
    """A launch read back: where the kernel is, and arguments that specialise it alike."""

    module: str
    kernel: str
    args: list[Any]
    kwargs: dict[str, Any]


def read(text: str) -> Recorded:
    """The launch that ``line`` wrote."""
    module, kernel, args, kwargs = json.loads(text)
    return Recorded(module, kernel, [_back(a) for a in args], {name: _back(v) for name, v in kwargs.items()})


def _back(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(map(_back, value["tuple"]))
    if "dtype" in value:
        import triton.language as tl

        return tl.dtype(value["dtype"])
    if "tensor" in value:
        return StandIn(value["tensor"], aligned=value["aligned"])
    if "descriptor" in value:
        return _descriptor(value["descriptor"], value["block"], value.get("layout"))
    (number,) = value.values()
    return number


def _descriptor(dtype: str, block: list[int], layout: list[int] | None) -> Any:
    # By __new__: their own checks ask for a real tensor.
    if layout is None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        found: Any = TensorDescriptor.__new__(TensorDescriptor)
    else:
        from triton.experimental.gluon.language import NVMMASharedLayout
        from triton.experimental.gluon.nvidia import hopper

        found = hopper.TensorDescriptor.__new__(hopper.TensorDescriptor)
        found.layout = NVMMASharedLayout(*layout, rank=len(block))
    found.base, found.block_shape, found.padding = StandIn(dtype), block, "zero"
    found.shape, found.strides = [4096] * len(block), [*[4096] * (len(block) - 1), 1]
    found.round_f32_to_tf32 = False
    return found


def lines(files: Iterable[Path]) -> list[str]:
    """All different lines of these files, sorted."""
    return sorted({text for file in files for text in file.read_text().splitlines()})
