"""The costs that decide between one launch and many: a grid barrier, a graph node, a dependent launch.

    pytest benchmarks/bench_launch_costs.py --benchmark-enable -n 0 -s

Each cost is the slope between one of them and a hundred more, without the fixed cost of a replay.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import launch_cost_kernels as kernels
import pytest
import torch

from gptkern.ops import _launch, _pdl

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MORE, SAMPLES = 100, 50


def barrier(per_sm: int) -> float:
    """Microseconds of a barrier of ``per_sm`` programs a multiprocessor."""
    device = torch.device("cuda")
    counters = torch.zeros(64, dtype=torch.int32, device=device)
    grid = (per_sm * _launch.multiprocessors(device),)

    def call(count: int) -> None:
        _launch.launch(
            kernels.barriers_kernel, grid, counters, count, num_warps=4, launch_cooperative_grid=True
        )

    few, many = _microseconds(lambda: call(1)), _microseconds(lambda: call(1 + MORE))
    assert not counters.any()
    return (many - few) / MORE


def node(dependent: bool) -> float:
    """Microseconds that one more empty kernel in a graph takes, launched as a dependent one or not."""
    device = torch.device("cuda")
    options = {**_pdl.options(device)} if dependent else {"PDL": False}
    x = torch.zeros(1, device=device)
    grid = (_launch.multiprocessors(device),)

    def captured(count: int) -> torch.cuda.CUDAGraph:
        _launch.launch(kernels.empty_kernel, grid, x, num_warps=4, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                _launch.launch(kernels.empty_kernel, grid, x, num_warps=4, **options)
        return graph

    few, many = (_microseconds(captured(count).replay) for count in (1, 1 + MORE))
    return (many - few) / MORE


def _microseconds(call: Callable[[], object]) -> float:
    for _ in range(5):
        call()
    times = []
    for _ in range(SAMPLES):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e3)
    return median(times)


@pytest.mark.parametrize("per_sm", [1, 2])
def test_a_grid_barrier(benchmark: BenchmarkFixture, per_sm: int) -> None:
    _report(benchmark, f"a barrier of {per_sm} programs a multiprocessor", lambda: barrier(per_sm))


@pytest.mark.parametrize("dependent", [False, True])
def test_a_graph_node(benchmark: BenchmarkFixture, dependent: bool) -> None:
    if dependent and not _pdl.options(torch.device("cuda"))["PDL"]:
        pytest.skip("programmatic dependent launch needs sm_90")
    name = "a dependent launch in a graph" if dependent else "a graph node"
    _report(benchmark, name, lambda: node(dependent))


def _report(benchmark: BenchmarkFixture, name: str, measure: Callable[[], float]) -> None:
    cost = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["microseconds"] = cost
    print(f"\n{name}: {cost:.2f} us ({torch.cuda.get_device_name()})")
