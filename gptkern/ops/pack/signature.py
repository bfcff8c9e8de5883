"""The part that each parameter of a kernel has in its machine code."""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from pathlib import Path
from typing import Any

from gptkern import _native

# The roles of csrc/launch/kernel.h.
_SPECIALISED, _TYPED, _CONSTANT = 0, 1, 2
# The options of a launch on which machine code or its attributes depend.
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl", "launch_cooperative_grid")


def name_of(kernel: Any) -> str:
    """The name by which a pack holds a kernel: ``module:function``, within the package."""
    function = kernel.fn
    return f"{function.__module__.removeprefix('gptkern.')}:{function.__name__}"


def parameters(kernel: Any) -> list[tuple[Any, ...]]:
    """(name, role, and the default if there is one) of each parameter, then of each option."""
    found: list[tuple[Any, ...]] = []
    typed = set(getattr(kernel, "do_not_specialize", None) or ())
    for position, parameter in enumerate(inspect.signature(kernel.fn).parameters.values()):
        role = _SPECIALISED
        if "constexpr" in str(parameter.annotation):
            role = _CONSTANT
        elif parameter.name in typed or position in typed:
            role = _TYPED
        default = () if parameter.default is parameter.empty else (parameter.default,)
        found.append((parameter.name, role, *default))
    return found + [(option, _CONSTANT, None) for option in _OPTIONS]


def empty(kernel: Any) -> Any:
    """A ``gptkern._C.PackedKernel`` for ``kernel``, still without machine code."""
    return _native.extension.PackedKernel(kernel.fn.__name__, parameters(kernel))


@cache
def sources() -> str:
    """Digest of the files from which kernels are compiled: a pack of other sources is of no use."""
    folder = Path(__file__).parents[1]
    files = [*folder.glob("_device*.py"), folder / "_pdl.py", *folder.glob("*/kernels*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
