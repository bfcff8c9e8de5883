"""The sampler on a GPU gives the CPU's bits, in every size of cluster and with every filter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

import checks


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [67, 50257, 128256])
@pytest.mark.parametrize("batch", checks.BATCHES)
def test_bits_are_the_cpus(batch: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    assert not checks.sampler_differences(batch, vocab, dtype, device)


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = checks._drawn

    def spoilt(
        logits: torch.Tensor, settings: dict[str, float], where: torch.device | str
    ) -> list[torch.Tensor]:
        found = drawn(logits, settings, where)
        # The first filter's second counter on the device alone.
        if settings.get("top_k") == 50 and where != "cpu":
            found[-1][0, 2] += 1
        return found

    monkeypatch.setattr(checks, "_drawn", spoilt)
    found = checks.sampler_differences(3, 67, torch.float32, torch.device("cpu:0"))
    assert found == [settings for settings in checks.FILTERS if settings.get("top_k") == 50]
