"""Which implementation a call takes, and that errors leave the choice as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gptkern
from gptkern.ops import _dispatch, _launch, layer_norm

X, W = torch.randn(3, 17), torch.ones(17)


def _launches() -> tuple[list[str], Any]:
    names: list[str] = []

    def keep(item: _launch.Launch) -> bool:
        names.append(item.name)
        return True

    return names, _launch.observe(keep)


@pytest.mark.skipif(not _dispatch.INTERPRETED, reason="kernels are not interpreted here")
def test_cpu_tensors_run_the_kernel_under_the_interpreter() -> None:
    names, observed = _launches()
    with observed:
        layer_norm(X, W)
        with gptkern.backend("reference"):
            layer_norm(X, W)
            with gptkern.backend("kernel"):
                layer_norm(X, W)
    assert names == ["norm_forward_kernel"] * 2


def test_an_error_inside_restores_the_choice() -> None:
    before = _dispatch.use_kernel(X)
    with pytest.raises(RuntimeError, match="inside"), gptkern.backend("reference"):
        raise RuntimeError("inside")
    assert _dispatch.use_kernel(X) == before


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="got 'cuda'; accepted are"), gptkern.backend("cuda"):  # type: ignore[arg-type]
        pass


def test_without_the_interpreter_cpu_tensors_run_the_reference() -> None:
    program = """
import torch, gptkern
from gptkern.ops import _launch, layer_norm
with _launch.observe(lambda launch: 1 / 0):
    layer_norm(torch.randn(3, 17), torch.ones(17))
try:
    with gptkern.backend("kernel"):
        layer_norm(torch.randn(3, 17), torch.ones(17))
except RuntimeError as error:
    print(error)
"""
    root = Path(gptkern.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert "needs TRITON_INTERPRET=1" in done.stdout


def test_needs_grad_follows_grad_mode() -> None:
    weight = W.clone().requires_grad_()
    assert _dispatch.needs_grad(X, None, weight)
    assert not _dispatch.needs_grad(X, None)
    with torch.no_grad():
        assert not _dispatch.needs_grad(X, weight)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
def test_vmap_runs_the_kernel_for_each_sample(mapped: tuple[int | None, int | None]) -> None:
    """Whichever argument is mapped, results and gradients are those of one call a sample."""
    x, weight = torch.randn(3, 5, 17, requires_grad=True), torch.randn(3, 17, requires_grad=True)
    given = [t if dim == 0 else t[0] for t, dim in zip((x, weight), mapped, strict=True)]
    names, observed = _launches()
    with observed:
        got = torch.vmap(layer_norm, in_dims=mapped)(*given)
    assert names == ["norm_forward_kernel"] * 3
    calls = [[t if dim is None else t[i] for t, dim in zip(given, mapped, strict=True)] for i in range(3)]
    expected = torch.stack([layer_norm(*call) for call in calls])
    assert torch.equal(got, expected)
    grad = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad(got, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_autocast_dtype() -> None:
    assert _dispatch.autocast_dtype(X) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert _dispatch.autocast_dtype(X) == torch.bfloat16
        assert _dispatch.autocast_dtype(X.to("meta")) is None
