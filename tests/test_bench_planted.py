"""A slowdown of a tenth, planted in a kernel's CPU path, is found by a real run; an unchanged tree passes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gptkern.bench import compare, session
from gptkern.bench.run import Results
from gptkern.ops.layer_norm import reference

CPU = torch.device("cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """CPU time is what is measured: it does not depend on what else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _measured() -> Results:
    return session.run_suites(["layer_norm"], CPU, quick=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("attempt", range(10))
def test_a_planted_tenth_is_found_and_an_unchanged_tree_passes(
    attempt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, unchanged = _measured(), _measured()
    plain = reference.layer_norm

    def slower(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        plain(x[: -(-len(x) // 10)], weight, bias, eps)
        return plain(x, weight, bias, eps)

    monkeypatch.setattr(reference, "layer_norm", slower)
    assert not compare.compare(before, unchanged).regressed
    assert compare.compare(before, _measured()).regressed
