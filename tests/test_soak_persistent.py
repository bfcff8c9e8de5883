"""The soak of the persistent step, on a small model: it runs, and finds what differs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gptkern import GPTConfig
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.persistent import PersistentExecutor

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "soak_persistent.py"
CONFIG = GPTConfig(vocab_size=37, n_positions=140, n_layer=1, n_head=2, n_embd=32)

pytestmark = pytest.mark.kernels


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak_persistent", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cycles_are_compared(script: ModuleType, device: torch.device) -> None:
    assert script.soak(CONFIG, device, torch.float32, batch=2, steps=5, cycle=2) == 2


def test_a_difference_is_found(
    script: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = GraphExecutor.__call__

    def spoilt(self: GraphExecutor, tokens: torch.Tensor) -> torch.Tensor:
        return plain(self, tokens) + isinstance(self, PersistentExecutor)

    monkeypatch.setattr(GraphExecutor, "__call__", spoilt)
    with pytest.raises(ValueError, match="the steps from 0 on differ"):
        script.soak(CONFIG, device, torch.float32, batch=1, steps=1)


def test_no_package_is_needed_that_a_gpu_session_lacks() -> None:
    """A checkout on a borrowed machine has torch and what torch brings, not the command line's packages."""
    code = "import runpy, sys; sys.modules |= {'rich': None, 'typer': None}; runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would start")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--steps", "1"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr
