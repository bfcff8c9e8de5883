"""The benchmark: what it times, what it refuses to time, how runs are compared and shown."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

import gptkern.cli
from gptkern.bench import compare, html, inspect, plots, results, session, suites, tables, timing
from gptkern.bench.ceilings import Ceilings
from gptkern.bench.problem import TOLERANCE, Problem, Unavailable, error, expected_of
from gptkern.bench.run import Results, Row, run
from gptkern.bench.suites import _models
from gptkern.cli import bench as bench_command
from gptkern.ops import _cases
from gptkern.ops._aot import Report

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e10, matmul={"float32": 1e11, "bfloat16": 1e11, "float16": 1e11})
WHERE = {
    "time": "2026-01-01T00:00:00+00:00",
    "device": "a test, 2 cores",
    "python": "3.12.0",
    "threads": 2,
    "clock": "elapsed time",
    "commit": "0123456789ab",
    "versions": {"gptkern": "0.1.0", "torch": "2.11.0"},
}


def _row(provider: str, rounds: list[list[float]], shape: str = "8x8", suite: str = "layer_norm") -> Row:
    return Row(suite, shape, "float32", False, provider, 1e6, 1e6, 0.0, "", rounds)


def _noisy(seed: int, slowdown: float = 1.0, rounds: int = 9, samples: int = 3) -> Results:
    """A run of four problems on a busy machine: slow spells that last a round, and rare long samples."""
    draw = random.Random(seed)
    rows = []
    for problem in range(4):
        spells = [draw.lognormvariate(0, 0.3) for _ in range(rounds)]
        for provider, seconds in (("gptkern", 1e-3 * slowdown), ("eager", 2e-3)):
            times = [
                [
                    seconds * spell * draw.lognormvariate(0, 0.02) * (3 if draw.random() < 0.05 else 1)
                    for _ in range(samples)
                ]
                for spell in spells
            ]
            rows.append(_row(provider, times, f"{problem}x8"))
    return Results(WHERE, CEILINGS, rows)


@pytest.mark.parametrize("seed", range(10))
def test_a_slowdown_of_a_tenth_is_found_and_an_unchanged_tree_passes(seed: int) -> None:
    before = _noisy(seed)
    assert compare.compare(before, _noisy(seed + 100, 1.1)).regressed
    unchanged = compare.compare(before, _noisy(seed + 100))
    assert not unchanged.regressed
    assert all(change.low <= change.ratio <= change.high for change in unchanged.changes)


def test_a_speedup_is_no_regression() -> None:
    found = compare.compare(_noisy(1), _noisy(101, 0.8))
    assert not found.regressed
    assert {c.verdict for c in found.changes if c.new.provider == "gptkern"} == {"faster"}


def test_a_peer_that_became_slower_is_no_regression() -> None:
    old, new = _noisy(1), _noisy(101)
    for row in new.rows:
        if row.provider == "eager":
            row.rounds = [[2 * seconds for seconds in round_] for round_ in row.rounds]
    new.environment = {**WHERE, "versions": {"gptkern": "0.1.0", "torch": "2.12.0"}}
    found = compare.compare(old, new)
    assert not any(change.relative for change in found.changes)
    assert not any(c.verdict == "faster" for c in found.changes if c.new.provider == "gptkern")


def test_what_broke_and_what_is_missing_is_told() -> None:
    old, new = _noisy(1), _noisy(2)
    new.rows[0].rounds, new.rows[0].problem = [], "wrong: relative error 1.0e+00"
    del new.rows[-1]
    found = compare.compare(old, new)
    assert found.regressed
    assert [row.key for row in found.broken] == [old.rows[0].key]
    assert [row.key for row in found.missing] == [old.rows[-1].key]


def test_runs_of_two_devices_are_not_compared() -> None:
    other = replace(_noisy(1), environment={**WHERE, "device": "another"})
    with pytest.raises(ValueError, match="different devices: a test, 2 cores and another"):
        compare.compare(_noisy(1), other)


def _sums(ours: Any, peer: Any = torch.sum) -> Problem:
    """Adding up a vector, by the provider ``ours`` and by a peer."""
    return Problem(
        "sums",
        "4096",
        torch.float32,
        lambda device: (torch.rand(4096, device=device),),
        {"gptkern": ours, "eager": peer},
        torch.sum,
        bytes_moved=4.0 * 4096,
        flops=4096.0,
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """CPU time is what is measured: it does not depend on what else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _busy(times: int) -> Any:
    """A provider of so many equal pieces of work, about 0.1 ms each."""
    matrix = torch.rand(192, 192)

    def ours(x: torch.Tensor) -> torch.Tensor:
        for _ in range(times):
            matrix @ matrix
        return x.sum()

    return ours


def _measured(ours: Any, peer: Any = torch.sum, **settings: Any) -> Results:
    return run([_sums(ours, peer)], CPU, CEILINGS, **{"rounds": 9, "samples": 3} | settings)


@pytest.mark.usefixtures("one_thread")
def test_a_planted_slowdown_is_found_in_a_real_run() -> None:
    # A core that is shared takes longer for such work, in CPU time too: the peer, whose samples come between
    # ours, does the same work, and so the spell falls on both.
    old, new = _measured(_busy(20), _busy(20)), _measured(_busy(30), _busy(20))
    assert old.environment["clock"] == "CPU time"
    assert compare.compare(old, new).regressed
    assert not compare.compare(new, old).regressed


@pytest.mark.usefixtures("one_thread")
def test_rounds_are_cut_to_what_the_time_allows() -> None:
    found = _measured(_busy(20), rounds=4, samples=1000, seconds=0.1)
    for row in found.rows:
        assert len(row.rounds) == 4
        assert all(1 <= len(round_) < 20 for round_ in row.rounds)


def test_a_wrong_provider_is_reported_and_not_timed() -> None:
    wrong, right = _measured(lambda x: 1.001 * x.sum()).rows
    assert wrong.problem.startswith("wrong: relative error 1.0e-03 against")
    assert not wrong.rounds and wrong.seconds is None and wrong.spread is None
    assert not right.problem and right.seconds is not None and right.seconds > 0


def _refusing(x: torch.Tensor) -> torch.Tensor:
    raise Unavailable("not here")


def _failing(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no memory\nmore")


def _too_large(x: torch.Tensor) -> torch.Tensor:
    raise OutOfResources(300_000, 232_448, "shared memory")


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        (_refusing, "not here"),
        (_failing, "failed: RuntimeError: no memory"),
        (_too_large, f"failed: OutOfResources: {OutOfResources(300_000, 232_448, 'shared memory')}"),
        (lambda x: x.sum() * float("nan"), "wrong: relative error inf against the float64 reference"),
        (lambda x: x[:2], "wrong: relative error inf against the float64 reference"),
    ],
)
def test_a_provider_that_fails_says_why(ours: Any, reason: str) -> None:
    row, peer = _measured(ours, rounds=1, samples=1).rows
    assert row.problem == reason and not row.rounds
    assert peer.rounds


def test_a_device_that_is_lost_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(timing, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        _measured(_failing, rounds=1, samples=1)


def test_a_reference_that_fails_leaves_nothing_timed() -> None:
    problem = _sums(torch.sum)
    problem.reference = _failing
    rows = run([problem], CPU, CEILINGS, rounds=1, samples=1).rows
    assert [row.problem for row in rows] == ["failed: RuntimeError: no memory"] * 2
    assert not any(row.rounds for row in rows)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    kept = _noisy(1)
    kept.rows.append(Row("sample", "1x8", "float32", False, "liger", 0.0, 0.0, None, "not here", []))
    path = tmp_path / "results.json"
    results.save(kept, path)
    assert results.load(path) == kept
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 0}', '{"format": 1, "rows": 3}'])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: not a results file of gptkern bench"):
        results.load(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        results.load(tmp_path / "absent.json")


def _shown() -> Results:
    rows = [
        _row("gptkern", [[2e-3] * 4]),
        _row("eager", [[5e-3] * 4]),
        Row("layer_norm", "8x8", "float32", False, "li<ger", 1e6, 1e6, None, "not here", []),
    ]
    for context, seconds in ((64, 1e-3), (1024, 3e-3)):
        rows.append(_row("gptkern", [[seconds] * 4], f"4x256, 1 at {context}", "decode_step"))
    return Results(WHERE, CEILINGS, rows)


def test_a_table_has_units_floors_and_ratios() -> None:
    ours, theirs, failed, *_ = map(tables.cells, tables.lines(_shown()))
    # 1 MB at 10 GB/s is 0.1 ms, a twentieth of 2 ms.
    assert ours == ("layer_norm 8x8 float32", "gptkern", "2 ms", "0%", "0.5 GB/s", "5%", "")
    assert theirs[2:] == ("5 ms", "0%", "0.2 GB/s", "2%", "2.50 x")
    assert tables.plain(_shown())[:4] == [
        "               time spread          rate floor  gptkern's speed",
        "layer_norm 8x8 float32",
        "  gptkern      2 ms     0%      0.5 GB/s    5%",
        "  eager        5 ms     0%      0.2 GB/s    2%  2.50 x",
    ]
    assert failed[1:] == ("li<ger", "not here", "", "", "", "")
    assert tables.seconds_text(1.5) == "1.5 s"
    assert tables.seconds_text(2.25e-6) == "2.25 µs"
    assert tables.seconds_text(3e-9) == "3 ns"


def test_the_written_files_hold_everything(tmp_path: Path) -> None:
    files = session.write(_shown(), tmp_path, {"Machine <code>": "a < b"})
    assert [path.name for path in files] == [
        "results.json",
        "results.md",
        "speed.png",
        "decode_by_context.png",
        "roofline.png",
        "report.html",
    ]
    text = (tmp_path / "results.md").read_text()
    assert "# gptkern bench: a test, 2 cores" in text and "copy 10 GB/s" in text
    assert "| layer_norm 8x8 float32 | eager | 5 ms | 0% | 0.2 GB/s | 2% | 2.50 x |" in text
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    installed = replace(_shown(), environment=WHERE | {"commit": None})
    assert "<dd>none: gptkern 0.1.0 as installed</dd>" in html.page(installed, [])
    assert ", an installed package, " in tables.markdown(installed)
    assert "http" not in page and "li&lt;ger" in page
    assert "<h2>Machine &lt;code&gt;</h2><pre>a &lt; b</pre>" in page


def test_the_report_leads_with_speed_against_the_best_peer() -> None:
    rows = [_row("gptkern", [[2e-3] * 4]), _row("eager", [[5e-3] * 4]), _row("sdpa", [[3e-3] * 4])]
    rows += [_row("gptkern", [[4e-3] * 4], "9x9"), _row("eager", [[1e-3] * 4], "9x9")]
    rows += [_row("gptkern", [[1e-3] * 4], "7x7"), _row("eager", [[8e-3] * 4], "7x7")]
    found = Results(WHERE, CEILINGS, rows[2:] + rows[:2])
    speeds = tables.speeds(found)
    assert [(speed.title, speed.ratio, speed.peer_name) for speed in speeds] == [
        ("layer_norm 7x7 float32", 8.0, "eager"),
        ("layer_norm 8x8 float32", 1.5, "sdpa"),
        ("layer_norm 9x9 float32", 0.25, "eager"),
    ]
    assert speeds[1].at_floor == pytest.approx(30)  # 3 ms over 0.1 ms
    page = html.page(found, [])
    assert page.index("Speed relative to the best peer") < page.index("<h2>Times")
    assert re.findall(r"<strong>([\d.]+ x)</strong> <span>([^<]*)<", page) == [
        ("8.00 x", "1 ms, eager 8 ms"),
        ("1.50 x", "2 ms, sdpa 3 ms"),
        ("0.25 x", "4 ms, eager 1 ms"),
    ]
    assert page.count('class=floor style="left') == 3 + 7
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    places = [float(place) for place in re.findall(r"left:([-\d.]+)%", page)]
    assert all(0 <= place <= 100 for place in places)


def test_without_matplotlib_all_but_the_pictures_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "gptkern.bench.plots")
    monkeypatch.setattr(bench_command, "_measured", lambda *_: _shown())
    monkeypatch.setattr(bench_command, "_sections", lambda *_: {})
    assert gptkern.cli.run(["bench", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "report.html"}
    assert "no pictures, which need matplotlib: pip install 'gptkern[bench]'" in capsys.readouterr().err


def test_no_picture_is_empty(tmp_path: Path) -> None:
    nothing = replace(_shown(), rows=_shown().rows[2:3])
    assert plots.draw(nothing, tmp_path) == []
    assert "Speed relative" not in html.page(nothing, [])
    one_context = replace(_shown(), rows=_shown().rows[:4])
    assert "decode_by_context" not in {path.stem for path in plots.draw(one_context, tmp_path)}
    assert html.page(nothing, []).count("<img") == 0


def _smallest(name: str) -> Problem:
    return next(iter(suites.problems(name, CPU, quick=True)))


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_provider_solves_the_suites_first_problem(name: str) -> None:
    problem = _smallest(name)
    assert problem.suite == name and problem.name.startswith(f"{name}/{problem.shape}/float32".split(",")[0])
    assert problem.providers.keys() >= {"gptkern"} and len(problem.providers) > 1
    assert problem.bytes_moved > 0 or problem.flops > 0
    inputs = problem.inputs(CPU)
    expected = expected_of(problem, inputs)
    for provider, solve in problem.providers.items():
        assert error(problem, solve, inputs, expected) <= TOLERANCE[problem.dtype], provider


def test_suites_that_share_a_model_leave_it_as_it_was() -> None:
    model = _models.theirs(_models.SMALL, torch.float32, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("train_step", "prefill", "train_step"):
        problem = _smallest(name)
        inputs = problem.inputs(CPU)
        expected_of(problem, inputs)
        problem.providers["transformers"](*inputs)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and not value.is_inference(), name


@pytest.mark.parametrize("name", suites.SUITES)
def test_no_two_problems_of_a_suite_have_one_name(name: str) -> None:
    for device in (CPU, torch.device("cuda")):
        if name == "sample" and device.type == "cuda" and not torch.cuda.is_available():
            continue  # its problems hold state on the device
        names = [problem.name for problem in suites.problems(name, device)]
        assert names and len(names) == len(set(names))


def test_the_command_names_every_suite() -> None:
    from gptkern.cli.bench import bench

    listed = (bench.__doc__ or "").partition("Suites:")[2].partition(".")[0]
    assert {name.strip() for name in listed.split(",")} == set(suites.SUITES)


def _failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = gptkern.cli.run(list(arguments))
    return code, capsys.readouterr().err


def test_an_op_that_launches_nothing_is_not_inspected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fake kernel of a registered op launches nothing: an empty table is no pass."""

    def registered(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.gptkern.layer_norm(x, weight, None, 1e-5, x.dtype)[0]
        return out

    def make(device: torch.device, dtype: torch.dtype) -> _cases.Call:
        return _cases.Call((torch.empty(4, 8, device=device), torch.empty(8, device=device)))

    monkeypatch.setattr(_cases, "cases", lambda op: [_cases.Case("4 x 8", registered, make)])
    code, text = _failure(capsys, "inspect", "layer_norm", "--arch", "90")
    assert code == 1
    assert "registered, case '4 x 8': no kernel was launched" in text
    monkeypatch.setattr(_cases, "cases", lambda op: [])
    code, text = _failure(capsys, "inspect", "layer_norm", "--arch", "90")
    assert (code, "layer_norm has no case for sm_90" in text) == (1, True)
    code, text = _failure(capsys, "inspect", "decode_embed", "--arch", "90", "--floor")
    assert (code, "decode_embed has no problems" in text) == (1, True)


def test_the_command_refuses_what_it_does_not_know(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, text = _failure(capsys, "bench", "nothing")
    assert code == 1 and "there is no suite 'nothing'; there are layer_norm" in text
    code, text = _failure(capsys, "bench", "compare", "one.json")
    assert code == 2 and "compare takes two files" in text
    path = str(tmp_path / "none.json")
    code, text = _failure(capsys, "bench", "compare", path, path)
    assert code == 1 and "none.json: No such file or directory" in text
    (tmp_path / "taken").write_text("")
    for arguments in (["--out", str(tmp_path / "taken")], ["--device", "gpu"], ["--device", "cuda:99"]):
        code, text = _failure(capsys, "bench", "layer_norm", "--quick", *arguments)
        assert code == 1 and arguments[1] in text
    code, text = _failure(capsys, "inspect", "nothing")
    assert code == 1 and "there is no op 'nothing'" in text
    code, text = _failure(capsys, "inspect", "--arch", "70")
    assert code == 1 and "no launch table serves sm_70" in text


def test_comparing_tells_and_exits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{name}.json") for name in ("old", "slow")]
    results.save(_noisy(1), Path(paths[0]))
    results.save(_noisy(101, 1.2), Path(paths[1]))
    assert gptkern.cli.run(["bench", "compare", *paths]) == 1
    assert "slower: layer_norm 0x8 float32, gptkern: 1.18" in capsys.readouterr().out
    assert gptkern.cli.run(["bench", "compare", paths[0], paths[0]]) == 0
    assert "8 compared, 8 the same within the noise" in capsys.readouterr().err
    assert gptkern.cli.run(["bench", "compare", *paths, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["regressed"] and found["broken"] == found["missing"] == []
    assert found["changes"][0].keys() == {"problem", "provider", "verdict", "ratio", "interval"}
    (tmp_path / "results.json").write_bytes(Path(paths[0]).read_bytes())
    assert gptkern.cli.run(["bench", "compare", str(tmp_path), str(tmp_path)]) == 0


def _report(**changed: Any) -> Report:
    fields: dict[str, Any] = {
        name: {"str": "", "int": 0, "bool": False}.get(str(field.type), ())
        for name, field in Report.__dataclass_fields__.items()
    }
    fields |= {"op": "linear", "case": "s", "dtype": "bfloat16", "kernel": "linear", "arch": 90}
    return Report(**fields | {"registers": 64} | changed)


def test_the_machine_codes_changes_are_told_kernel_by_kernel(tmp_path: Path) -> None:
    old = [_report(), _report(registers=80), _report(kernel="gone"), _report(op="other", kernel="elsewhere")]
    path = tmp_path / "baseline.json"
    inspect.save(old, path)
    assert inspect.load(path) == (old, triton.__version__)
    assert len(path.read_text().splitlines()) == len(old) + 2
    assert inspect.diff(old, old) == []
    new = [_report(), _report(registers=96, local_bytes=16), _report(kernel="added")]
    assert inspect.diff(old, new) == [
        "+ added sm_90 bfloat16 (s)",
        "- gone sm_90 bfloat16 (s)",
        "~ linear sm_90 bfloat16 (s): registers 80 -> 96, local_bytes 0 -> 16",
    ]
    path.write_text(json.dumps([{"op": "linear"}]))
    with pytest.raises(ValueError, match=r"baseline\.json: not a report of gptkern inspect"):
        inspect.load(path)


def test_saving_a_named_op_replaces_its_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [_report(op="gelu_mlp"), _report(arch=80), _report(), _report(op="rms_norm")]
    path = tmp_path / "baseline.json"
    inspect.save(before, path)
    found = [_report(registers=96), _report(registers=80)]
    monkeypatch.setattr(inspect, "compiled", lambda *_, **__: found)
    save = ["inspect", "linear", "--arch", "90", "--save", str(path)]
    assert gptkern.cli.run(save) == 0
    assert inspect.load(path)[0] == [*before[:2], *found, before[3]]
    path.write_text(path.read_text().replace(triton.__version__, "0.1"))
    code, text = _failure(capsys, *save)
    assert code == 1 and "was compiled by triton 0.1" in text
    assert gptkern.cli.run(["inspect", "--save", str(path)]) == 0
    assert inspect.load(path) == (found, triton.__version__)


def test_compiling_tells_which_op_it_has_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect._aot, "reports", lambda op, *_: iter([_report(op=op)]))
    told: list[str] = []
    inspect.compiled(["linear", "rms_norm"], (90,), progress=told.append)
    assert told == ["compiling linear (1 of 2)", "compiling rms_norm (2 of 2)"]


def test_floors_follow_from_the_datasheet() -> None:
    line = next(line for line in inspect.floors(["layer_norm"], 90) if "layer_norm/16384x768/bf" in line)
    # 2 x 16384 x 768 x 2 bytes at 3.35 TB/s
    assert line == "layer_norm/16384x768/bfloat16: 50.33 MB, 0 GFLOP, at least 15 µs (memory)"
