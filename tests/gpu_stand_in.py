"""A plugin of pytest that stands in for a GPU: which tests would give a kernel CPU tensors there?

CUDA says that it is there, ``device`` is the meta device, whose tensors have shapes and no values, and
questions about values have the right answer: a test goes on to its end, at next to no cost. Its result means
nothing; the tensors that it gives to kernels do. ``GPU_STAND_IN`` names the file for the tests found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx.experimental._config

META = torch.device("meta")
MIXED = ("different devices", "the same device", "the expected device")

found: dict[str, list[str]] = {"refused": [], "mixed": [], "silent": [], "reached": []}


def _valued(name: str, owner: Any, answer: Any) -> None:
    """Make ``owner.name`` return ``answer`` for tensors without values."""
    plain = getattr(owner, name)

    def answering(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
            return answer
        return plain(*args, **kwargs)

    setattr(owner, name, answering)


def pytest_configure(config: pytest.Config) -> None:
    torch.cuda.is_available = lambda: True
    for name in ("equal", "allclose"):
        _valued(name, torch, True)
    _valued("assert_close", torch.testing, None)
    for name, answer in (("__bool__", True), ("item", 1), ("__float__", 1.0), ("__int__", 1), ("tolist", [])):
        _valued(name, torch.Tensor, answer)
    torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True
    # These take long and pass nothing new to a kernel.
    torch.compile = lambda function=None, **_: function if function is not None else torch.compile
    torch.library.opcheck = lambda *_, **__: {}
    torch.autograd.gradcheck = lambda *_, **__: True

    import gptkern.testing
    from gptkern.ops import _dispatch

    _valued("assert_accurate", gptkern.testing, None)
    uses_kernel = _dispatch._uses_kernel

    def watched(tensor: torch.Tensor) -> bool:
        name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        if tensor.is_meta and _dispatch._backend != "reference":
            found["reached"].append(name)
        if tensor.device.type == "cpu" and _dispatch._backend != "reference":
            found["refused" if _dispatch._backend == "kernel" else "silent"].append(name)
        return uses_kernel(tensor)

    _dispatch._uses_kernel = watched


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> torch.device | None:
    if fixturedef.argname != "device":
        return None
    fixturedef.cached_result = (META, fixturedef.cache_key(request), None)
    return META


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    if call.excinfo is not None and any(words in str(call.excinfo.value) for words in MIXED):
        found["mixed"].append(item.nodeid)
    return (yield)


def pytest_sessionfinish() -> None:
    tests = {kind: sorted(set(names)) for kind, names in found.items()}
    Path(os.environ["GPU_STAND_IN"]).write_text(json.dumps(tests, indent=1))
