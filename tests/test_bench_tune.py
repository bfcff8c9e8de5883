"""The tuner: what it tries, what it takes, what it writes. Times are invented: here nothing is measured."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import gptkern.cli
from gptkern.bench import environment, launch_file, tune
from gptkern.ops import _cases, _launch
from gptkern.ops.layer_norm.op import layer_norm


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_table_is_written_as_it_was_read(arch: int, tmp_path: Path) -> None:
    path = _launch.table_file(arch)
    table, header = launch_file.read(path)
    assert header.startswith(f"# Launch configurations for sm_{arch}")
    launch_file.write(table, header, tmp_path / "copy.toml")
    assert (tmp_path / "copy.toml").read_text() == path.read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["copy.toml"]


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("no = table = at all")
    for name in ("other.toml", "absent.toml"):
        with pytest.raises(ValueError, match=rf"{name}: not a launch table"):
            launch_file.read(tmp_path / name)


def test_neighbours_differ_in_one_thing_and_keep_conditions_and_switches() -> None:
    row = {"max_m": 64, "dtype": "half", "BLOCK_M": 64, "TMA": False, "num_warps": 16, "num_stages": 1}
    found = list(tune.neighbours(row))
    changed = [{name: each[name] for name in row if each[name] != row[name]} for each in found]
    assert changed == [{"BLOCK_M": 32}, {"BLOCK_M": 128}, {"num_warps": 8}, {"num_stages": 2}]
    assert all(list(each) == list(row) for each in found)


def _distance(row: dict[str, Any]) -> float:
    return 1 + abs(math.log2(row["BLOCK"] / 512)) + abs(row["num_stages"] - 3)


def test_climbing_reaches_the_best_through_several_steps() -> None:
    best, ratio = tune.climb({"BLOCK": 64, "num_stages": 1}, _distance, lambda row: True)
    assert best == {"BLOCK": 512, "num_stages": 3}
    assert ratio == pytest.approx(1 / 6)


def test_climbing_passes_over_what_fails_spills_or_gains_nothing() -> None:
    start = {"BLOCK": 64, "num_stages": 3}
    assert tune.climb(start, lambda row: 1.0 if row == start else math.inf, lambda row: True) == (start, 1.0)
    assert tune.climb(start, _distance, lambda row: False) == (start, 1.0)
    assert tune.climb(start, lambda row: 1.0 - 1e-4 * row["BLOCK"] / 64, lambda row: True) == (start, 1.0)


def _norm(rows: int, width: int) -> _cases.Make:
    def make(device: torch.device, dtype: torch.dtype) -> _cases.Call:
        def value(*shape: int) -> torch.Tensor:
            return _cases.tensor(*shape, device=device, dtype=dtype)

        return _cases.Call((value(rows, width), value(width), value(width)))

    return make


@pytest.fixture
def arch(device: torch.device) -> int:
    return _launch.arch(device)


@pytest.fixture
def places(arch: int, monkeypatch: pytest.MonkeyPatch) -> list[tune.Place]:
    """The rows of layer norm at a small width, forward and backward."""
    small = [_cases.Case("small", layer_norm, _norm(5, 96), dtypes=(torch.float32,))]
    monkeypatch.setattr(_cases, "cases", lambda op: small)
    return tune.places(["layer_norm"], arch)


@pytest.mark.kernels
def test_places_are_the_rows_that_the_cases_ask_for(places: list[tune.Place]) -> None:
    assert [place.name for place in places] == [
        "norm_forward, row 1",
        "norm_backward, row 1",
        "norm_weight_grad, row 1",
    ]
    assert all(len(place.cases) == 1 for place in places)


@pytest.mark.kernels
def test_a_row_is_timed_by_the_launches_that_it_decides(
    places: list[tune.Place], device: torch.device
) -> None:
    backward = places[1]
    bench = tune._Bench(backward, device, lambda call: 1.0)
    case = backward.cases[0]
    decided = bench._decided(case, backward.row)
    launches, _ = tune._run(case, device)
    assert [launches[i].name for i in decided] == ["norm_backward_kernel"]


@pytest.mark.kernels
def test_a_candidate_with_other_results_is_no_candidate(
    places: list[tune.Place], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = tune._Bench(places[0], device, lambda call: 1.0)
    row = places[0].row
    assert bench.measure(row) == 1.0
    assert bench.measure({**row, "num_warps": 2 * row["num_warps"]}) == 1.0
    run = tune._run

    def wrong(case: tune.Case, device: torch.device) -> Any:
        launches, results = run(case, device)
        return launches, [result * 1.01 for result in results]

    monkeypatch.setattr(tune, "_run", wrong)
    assert bench.measure(row) == math.inf
    assert bench.measure({**row, "BLOCK": "no such argument"}) == math.inf


@pytest.mark.kernels
def test_the_tuned_rows_are_written_with_where_they_were_measured(
    places: list[tune.Place],
    arch: int,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune._Bench, "sound", lambda self, row: True)
    path = tmp_path / "table.toml"
    shutil.copyfile(_launch.table_file(arch), path)
    before, _ = launch_file.read(path)
    # More warps are faster, in this invented world.
    monkeypatch.setattr(tune._Bench, "measure", lambda self, row: 1.0 / row["num_warps"])
    found = list(tune.tune(places[:1], path, device))
    assert [(place.name, row["num_warps"]) for place, row, _ in found] == [("norm_forward, row 1", 16)]
    after, _ = launch_file.read(path)
    row = after["norm_forward"].pop(0)
    assert row == {**before["norm_forward"].pop(0), "num_warps": 16, "measured": tune.note(device)}
    assert after == before
    assert _launch.table(arch)["norm_forward"][0]["num_warps"] != 16

    assert tune.pending(places, path, device, again=False) == places[1:]
    assert tune.pending(places, path, device, again=True) == places
    monkeypatch.setattr(environment, "device_name", lambda device: "another")
    assert tune.pending(places, path, device, again=False) == places
    launch_file.write({**after, "norm_backward": []}, "# rows are missing", path)
    with pytest.raises(ValueError, match="its rows of norm_backward are not those of the package"):
        tune.pending(places[1:2], path, device, again=False)


@pytest.mark.kernels
def test_trying_a_row_is_undone(places: list[tune.Place], arch: int, device: torch.device) -> None:
    place = places[0]
    before = dict(place.row)
    asked = {"width": 96}
    with (
        pytest.raises(KeyError),
        _launch.replaced_row(arch, place.kernel, place.index, {**before, "num_warps": 1}),
    ):
        assert _launch.config(place.kernel, device, **asked)["num_warps"] == 1
        raise KeyError
    assert place.row == before
    assert _launch.config(place.kernel, device, **asked)["num_warps"] == before["num_warps"]


def test_the_command_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gptkern.cli.run(["tune", "nothing"]) == 1
    assert "there is no op 'nothing'; there are decode_attention" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gptkern.cli.run(["tune", "--table", str(tmp_path / "new.toml")]) == 1
        assert "a CUDA GPU is needed" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
