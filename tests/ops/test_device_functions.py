"""Device functions compile with every Triton from 3.6 on, also where only a newer one is at hand to try."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import gptkern.ops


def _device_functions() -> Iterator[tuple[str, Any]]:
    for module in pkgutil.walk_packages(gptkern.ops.__path__, "gptkern.ops."):
        if module.name.rpartition(".")[2].startswith(("kernels", "_device", "_pdl")):
            for name, found in vars(importlib.import_module(module.name)).items():
                if type(found).__module__.startswith("triton.runtime") and hasattr(found, "fn"):
                    yield f"{module.name}.{name}", found.fn


def test_no_default_is_a_string() -> None:
    """Triton 3.6 makes compile-time values of defaults that are numbers or booleans; a string fails."""
    functions = dict(_device_functions())
    assert len(functions) > 30
    strings = [
        f"{name}: {parameter}"
        for name, function in functions.items()
        for parameter in inspect.signature(function).parameters.values()
        if isinstance(parameter.default, str)
    ]
    assert strings == []
