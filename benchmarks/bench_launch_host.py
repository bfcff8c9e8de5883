"""The host's time of one launch, from a pack and by Triton, without a GPU.

    pytest benchmarks/bench_launch_host.py --benchmark-enable -n 0

``pack`` is all of it: arguments are described, the machine code is looked up, parameters are laid out, and a
stand-in for the driver is called. ``triton`` is what Triton does before it calls its launcher: arguments are
bound and described, the compiled kernel is looked up. Its launcher's own time comes on top, and needs a GPU.
On a machine that others use, the minimum of the rounds is what to read.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import fake_driver
from packed_model import model

from gptkern import packing
from gptkern.ops import _aot
from gptkern.ops._launch import Launch
from gptkern.ops.pack import build, signature
from gptkern.ops.pack.bare import Pointer

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ARCH, LAUNCHES = 90, 1000


def _tensor(value: Any) -> Any:
    """A tensor for a pointer without one, as a call has it."""
    if isinstance(value, Pointer):
        return torch.empty(1024, dtype=torch.uint8)[: 16 * value.dtype.itemsize].view(value.dtype)
    if hasattr(value, "block_shape"):
        value = copy.copy(value)
        value.base = _tensor(value.base)
    return value


def _launches() -> dict[str, Launch]:
    """A launch of each kernel of a small model's generation."""
    found: dict[str, Launch] = {}
    for launch in packing.model_launches(model(), ARCH):
        if launch.name not in found:
            found[launch.name] = replace(launch, args=tuple(map(_tensor, launch.args)))
    return found


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> fake_driver.FakeDriver:
    """A driver that does nothing."""
    made = fake_driver.FakeDriver(fake_driver.build(tmp_path_factory.mktemp("driver")))
    made.silence()
    return made


@pytest.mark.parametrize("way", ["pack", "triton"])
@pytest.mark.parametrize("launch", _launches().values(), ids=lambda launch: launch.name)
def test_launch_host(
    benchmark: BenchmarkFixture, driver: fake_driver.FakeDriver, launch: Launch, way: str
) -> None:
    """A thousand launches a round."""
    benchmark.group = f"{launch.name}, {len(launch.args) + len(launch.kwargs)} arguments"
    benchmark.extra_info["launches"] = LAUNCHES
    with _aot._compiling_for(ARCH):
        if way == "triton":

            def call() -> None:
                for _ in range(LAUNCHES):
                    launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.kwargs)
        else:
            (binary,) = build.binaries([launch], ARCH)[signature.name_of(launch.kernel)]
            packed = signature.empty(launch.kernel)
            packed.add(binary.key, binary.image, binary.facts)

            def call() -> None:
                for _ in range(LAUNCHES):
                    packed.launch(launch.grid, launch.args, launch.kwargs, 0, 0)

        call()
        benchmark.pedantic(call, rounds=25, iterations=1)
