"""Example calls of every op: one registry for the ahead-of-time build, ``gptkern inspect`` and the checks.

An op takes part by its file ``gptkern/ops/<op>/cases.py``, found by name, with two lists:

``CASES``
    Calls at the shapes of real models (GPT-2 124M to 1.5B, training and decode), one for every
    row of the launch tables. They are never computed: the ahead-of-time build (``_aot``) makes
    them on meta tensors and compiles what they would launch for sm_80, sm_89, sm_90 and sm_100.
``CHECKS``
    Calls with small shapes, the nasty ones among them. Each op's own test computes them, and a session
    on a GPU.

Example::

    def _inputs(rows: int, width: int) -> Make:
        def make(device: torch.device, dtype: torch.dtype) -> Call:
            x = tensor(rows, width, device=device, dtype=dtype)
            weight = tensor(width, device=device, dtype=dtype)
            return Call((x, weight), {"eps": 1e-5})
        return make

    CASES = [Case("layer_norm 65536 x 768", layer_norm, _inputs(65536, 768))]
    CHECKS = [Case("layer_norm 3 x 17", layer_norm, _inputs(3, 17))]
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gptkern.ops import _launch


@dataclass
class Call:
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


Make = Callable[[torch.device, torch.dtype], Call]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Args:
        name: what it shows.
        op: the public function.
        make: fresh arguments on a device in a dtype. What requires grad is differentiated.
        dtypes: the dtypes in which it is compiled ahead of time; one is enough for most cases.
        mma_sync: names of kernels whose tile is too narrow for ``wgmma`` on sm_90 by design (decode,
            where one sequence is one row): ``mma.sync`` is accepted from them.
        spills: bytes a thread that may spill by architecture, where no launch row that keeps its promises has
            none; the case says why.
        archs: the architectures it is compiled for, where not all of them serve it.
        serialised: names of kernels in which ptxas cannot overlap ``wgmma`` instructions and which are
            accepted so; the case says why.
    """

    name: str
    op: Callable[..., Any]
    make: Make
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    mma_sync: frozenset[str] = frozenset()
    serialised: frozenset[str] = frozenset()
    archs: tuple[int, ...] | None = None
    spills: Mapping[int, int] = field(default_factory=dict)


def tensor(
    *shape: int,
    device: torch.device,
    dtype: torch.dtype,
    requires_grad: bool = True,
    scale: float = 1.0,
) -> torch.Tensor:
    """A normally distributed tensor; on the meta device no numbers at all."""
    value = torch.randn(shape, device=device, dtype=torch.float32)
    return (value * scale).to(dtype).requires_grad_(requires_grad)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a result or an argument list, nested tuples, lists and dicts included."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [t for item in value for t in tensors(item)]
    return []


def ops() -> list[str]:
    """Names of the ops that have cases."""
    import gptkern.ops

    return [
        module.name
        for module in pkgutil.iter_modules(gptkern.ops.__path__)
        if module.ispkg and importlib.util.find_spec(f"gptkern.ops.{module.name}.cases")
    ]


def cases(op: str) -> list[Case]:
    """The calls of ``op`` at the shapes of real models."""
    return list(importlib.import_module(f"gptkern.ops.{op}.cases").CASES)


def checks(op: str) -> list[Case]:
    """The small calls of ``op`` that are computed and compared."""
    return list(importlib.import_module(f"gptkern.ops.{op}.cases").CHECKS)


def record_case(case: Case, dtype: torch.dtype, arch: int) -> list[_launch.Launch]:
    """The launches of ``case`` on ``arch``: without gradients, then with them and the backward pass.

    Raises:
        ValueError: The case launches nothing.
    """
    with _launch.record(arch) as launches:
        call = case.make(torch.device("meta"), dtype)
        with torch.no_grad():
            case.op(*call.args, **call.kwargs)
        call = case.make(torch.device("meta"), dtype)
        inputs = [t for t in tensors((call.args, call.kwargs)) if t.requires_grad]
        if inputs:
            outputs = [t for t in tensors(case.op(*call.args, **call.kwargs)) if t.requires_grad]
            torch.autograd.grad(outputs, inputs, [torch.empty_like(t) for t in outputs], allow_unused=True)
    if not launches:
        raise ValueError(
            f"{getattr(case.op, '__name__', case.op)}, case {case.name!r}: no kernel was launched on "
            f"meta tensors for sm_{arch}. An op that calls torch.ops there reaches its fake kernel: outside "
            "torch.compile it must launch through gptkern.ops._launch.launch"
        )
    return launches
