"""The launch table and the recorder of launches."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from gptkern.ops import _launch, add_layer_norm, layer_norm

META = torch.device("meta")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A table of one kernel, in the place of every architecture's."""
    rows = {
        "kernel": [
            {"max_rows": 16, "dtype": "half", "BLOCK": 32, "num_warps": 2, "measured": "H200"},
            {"dtype": "half", "BLOCK": 64, "num_warps": 4},
            {"max_rows": 8, "BLOCK": 16, "num_warps": 1},
        ]
    }
    monkeypatch.setattr(_launch, "table", lambda arch: rows)
    _launch._row.cache_clear()
    yield rows
    _launch._row.cache_clear()


def test_the_first_row_that_applies_wins(table: dict[str, Any]) -> None:
    def config(**shape: Any) -> dict[str, Any]:
        return _launch.config("kernel", META, **shape)

    assert config(rows=16, dtype="half") == {"BLOCK": 32, "num_warps": 2}
    assert config(rows=17, dtype="half") == {"BLOCK": 64, "num_warps": 4}
    assert config(rows=8, dtype="fp32") == {"BLOCK": 16, "num_warps": 1}
    with pytest.raises(ValueError, match=r"kernel: no launch row for .*'rows': 9.* on sm_90"):
        config(rows=9, dtype="fp32")
    with pytest.raises(ValueError, match="other: no launch row"):
        _launch.config("other", META, rows=1)


def test_rows_asked_for_are_remembered(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "row_lookups", set())
    with _launch.record(100):
        _launch.config("kernel", META, rows=17, dtype="half")
    assert _launch.row_lookups == {(100, "kernel", 1)}


@pytest.mark.parametrize(
    ("arch", "file"),
    [
        *((arch, "sm80") for arch in (80, 86, 87, 89, 120, 121)),
        (90, "sm90"),
        *((arch, "sm100") for arch in (100, 103, 110)),
    ],
)
def test_the_table_of_an_architecture(arch: int, file: str) -> None:
    path = Path(_launch.__file__).parent / "tables" / f"{file}.toml"
    assert _launch.table(arch) == tomllib.loads(path.read_text())


def test_recording_launches_nothing() -> None:
    x, weight = torch.empty(5, 64, device=META), torch.empty(64, device=META)
    with _launch.record(80) as launches:
        out = layer_norm(x, weight)
    assert out.shape == x.shape
    (launch,) = launches
    assert launch.name == "norm_forward_kernel"
    assert launch.grid == (1,)
    assert launch.kwargs["WIDTH"] == 64
    assert launch.args[0] is x


def test_no_rows_launch_nothing() -> None:
    with _launch.record(90) as launches:
        layer_norm(torch.empty(0, 64, device=META), torch.empty(64, device=META))
    assert launches == []


def test_observers_nest_and_end(device: torch.device) -> None:
    seen: list[str] = []
    x, weight = torch.empty(5, 64, device=META), torch.empty(64, device=META)
    with _launch.observe(lambda launch: bool(seen.append(launch.name))):
        with _launch.record(90) as launches:
            layer_norm(x, weight)
        real = torch.empty(5, 64, device=device)
        add_layer_norm(real, real, real[0])
    assert len(launches) == 1
    assert seen == ["norm_forward_kernel"]
    assert _launch._observer is None
