"""Kernels' addresses for all sizes at once, proved by a solver.

Of each kernel in ``specs.SPECS`` a launch is recorded and compiled to Triton's intermediate text; sizes and
the number of programs then become variables, and z3 is asked for numbers that break one of these:

* an access of a lane that its mask lets through lies in its tensor;
* no result of 32-bit arithmetic on the way to an address or a mask leaves int32;
* no two programs store to one address, and none loads what another stores.

``python -m gptkern.testing.bounds [KERNEL...]`` prints a line of JSON for each kernel. It needs
z3-solver, and a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import torch

from gptkern.ops import _aot, _cases
from gptkern.testing.bounds.prove import Finding, Kernel
from gptkern.testing.bounds.specs import BEYOND, SPECS
from gptkern.testing.bounds.ttir import parse

__all__ = ["BEYOND", "SPECS", "Finding", "kernel"]

_ARCH = 90


def kernel(name: str, seconds: int = 60, change: tuple[str, str] | None = None) -> Kernel:
    """The kernel ``name`` with its specification; ``findings()`` says what of it does not hold.

    Args:
        name: One of ``SPECS``.
        seconds: The solver's time for one claim.
        change: A piece of its intermediate text, and what to read in its place: a planted fault.

    Raises:
        NotImplementedError: The text has what the solver cannot be asked.
    """
    spec = SPECS[name]
    op, case_name = spec.case
    case = next(c for c in (*_cases.checks(op), *_cases.cases(op)) if c.name == case_name)
    recorded = _cases.record_case(case, torch.float32, _ARCH)
    launch = next(launch for launch in recorded if launch.name == name)
    text = _aot.compile_launch(launch, _ARCH).asm["ttir"]
    if change is not None:
        if change[0] not in text:
            raise ValueError(f"kernel: {name}'s text holds no {change[0]!r}")
        text = text.replace(*change)
    return Kernel(parse(text), launch.arguments, launch.grid, spec, seconds)
