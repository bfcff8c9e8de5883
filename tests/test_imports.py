"""The rules of who loads what, each in a process of its own; and the numbers that C++ and Python share."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptkern import _C, _native
from gptkern.ops.sample import reference

_LIGHT = (
    "gptkern.tokenizer",
    "gptkern.config",
    "gptkern.checkpoint.hf",
    "gptkern.checkpoint.nanogpt",
    "gptkern.quantization",
    "gptkern._native",
)
_LOADED = "import {module}, sys; print([n for n in sys.modules if n.split('.')[0] == 'triton' or {rule}])"


@pytest.mark.parametrize("module", _LIGHT)
def test_light_modules_load_neither_triton_nor_ops(module: str) -> None:
    rule = "n.startswith(('gptkern.ops', 'torch._inductor', 'torch._dynamo'))"
    code = _LOADED.format(module=module, rule=rule)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_ops_know_nothing_of_the_model() -> None:
    below = "_at_import _checkout _lazy _warn _native _C quantization sampler_columns environment durable ops"
    below += " cpu_threads"
    allowed = tuple(f"gptkern.{name}" for name in below.split())
    rule = f"n.startswith('gptkern.') and not n.startswith({allowed})"
    code = f"import sys, gptkern.ops; print([n for n in sys.modules if {rule}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_numbers_are_those_of_the_extension() -> None:
    assert _native.extension is _C
    assert _native.load_error is None
    assert {name: _C.parameters[name] for name in _native.PARAMETERS} == dict(
        zip(_native.PARAMETERS, range(12), strict=True)
    )
    assert _native.COUNTERS == ("seed", "request", "step")
    statuses = [_native.NAN, _native.INFINITE, _native.NOTHING_ALLOWED, _native.NEEDS_COUNTS]
    statuses += [_native.BAD_TOKEN_ID, _native.BAD_DRAFT, _native.BAD_DRAFT_PROBS, _native.BAD_DRAFT_LENGTH]
    names = ("nan", "infinite", "nothing_allowed", "needs_counts", "bad_token_id", "bad_draft")
    assert statuses == [_C.statuses[name] for name in (*names, "bad_draft_probs", "bad_draft_length")]
    assert _C.activations == _native.ACTIVATIONS
    assert reference.IN_PROMPT == _native.IN_PROMPT == _C.in_prompt


def test_columns_follow_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "extension", SimpleNamespace(rows={"b": 0, "a": 1}))
    assert _native._columns("rows", "a", "b") == ("b", "a")
    with pytest.raises(ImportError, match=r"has the rows b, a; a, c are needed: build the extension again"):
        _native._columns("rows", "a", "c")
    with pytest.raises(ImportError, match="build the extension again"):
        _native._numbers("of a newer source", "a")
    monkeypatch.setattr(_native, "extension", None)
    assert _native._columns("rows", "a", "b") == ("a", "b")
    assert _native._number("max_vocab", 7) == 7


def test_an_extension_that_takes_other_arguments_is_refused_in_one_line() -> None:
    code = """
import importlib.machinery, importlib.util, sys
older = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("gptkern._C", None))
sys.modules["gptkern._C"] = older
import gptkern.cli
sys.exit(gptkern.cli.run(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"gptkern: gptkern._C has interface 0; {_C.interface} is needed: build the extension again, "
        "from the sources that gptkern's Python files come from\n"
    )


def test_what_python_passes_to_the_extension_has_a_number() -> None:
    """Where this fails, C++ reads something else: raise kInterface and _INTERFACE, note the new digest."""
    names = []
    for part in ("decode", "launch", "sampling"):
        source = (Path(__file__).parent.parent / "csrc" / part / "bindings.cpp").read_text()
        names += re.findall(r'(?:\bdef\(|py::arg\(|\.get\(|\w+\[)"(\w+)"', source)
    assert {"sample", "step", "machine", "workspace", "stages"} < set(names)
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]
    assert (_C.interface, digest) == (10, "495da0bc5df3")


def test_without_the_extension_sampling_falls_back_and_says_so() -> None:
    code = """
import sys, warnings
sys.modules["gptkern._C"] = None
import torch
from gptkern import _native
from gptkern.ops import SamplerState, SamplingParams, sample
assert _native.extension is None and "gptkern._C" in str(_native.load_error)
logits = torch.full((2, 9), -5.0)
logits[0, 3] = logits[1, 7] = 50.0
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    params = SamplingParams.make(2, 9, top_k=4, repetition_penalty=1.1)
    drawn = sample(logits, params, state=SamplerState.make(2, 9, seed=1, history=True))
assert drawn.tokens.tolist() == [3, 7]
assert any("gptkern._C is not built" in str(w.message) for w in told)
logits[0, 0] = float("nan")
try:
    sample(logits, params, state=SamplerState.make(2, 9, seed=1, history=True))
except ValueError as error:
    assert "logits[0] holds NaN" in str(error)
else:
    raise AssertionError("NaN was accepted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
