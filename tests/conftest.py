"""Settings and fixtures of all tests: the implementation that runs, seeds, threads, data.

Where there is no CUDA, kernels run under Triton's interpreter, for tests in ``tests/ops`` and for
tests marked ``kernels`` alone; every other test runs on the PyTorch references, which are fast.
A test changes that with ``with gptkern.backend("kernel")`` or ``"reference"``.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton

import gptkern
from gptkern import _native
from gptkern.ops._dispatch import INTERPRETED

if INTERPRETED:
    # Triton asks for the setting whenever a kernel is defined. It is kept in this process alone:
    # subprocesses that tests start (command line, ahead-of-time compilation) must not inherit it.
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    os.environ.pop("TRITON_INTERPRET", None)

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


# In CI the same examples each time: a new one that fails is found by whoever works on the code.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    # NumPy warns of inf and NaN arithmetic that a GPU does in silence, masked lanes included.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if HERE / "ops" in item.path.parents:
            item.add_marker(pytest.mark.kernels)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    # Around the whole protocol, so that fixtures of every scope see the same implementation.
    interpreted = INTERPRETED and item.get_closest_marker("kernels") is not None
    with gptkern.backend("auto" if interpreted or not INTERPRETED else "reference"):
        return (yield)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed every test, so that its random numbers do not depend on the tests before."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device on which kernels are tested: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_device(device: torch.device) -> Generator[None]:
    """Makes ``device`` the default of the test's tensors: ``pytest.mark.usefixtures("on_device")``.

    Random numbers from a generator are drawn on the CPU, by ``device="cpu"``, and moved.
    """
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("no GPU, and kernels are not interpreted here")
    with device:
        yield


@pytest.fixture(params=["avx2", "avx512", "avx512_bf16"])
def decode_path(request: pytest.FixtureRequest) -> Generator[None]:
    """The CPU's decoder on each instruction set that the processor has."""
    extension = _native.extension
    assert extension is not None
    best = extension.decode_path()
    try:
        extension.use_decode_path(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield
    extension.use_decode_path(best)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of tokenizers and text that tests read."""
    named = os.environ.get("GPTKERN_SHARED_DATA")
    folder = Path(named) if named else HERE.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; GPTKERN_SHARED_DATA names another place")
    return folder
