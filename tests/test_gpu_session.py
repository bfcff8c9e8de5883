"""The GPU session's clock, its worker and its table; a dry run of both sessions."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


session, plan = _module("session"), _module("plan")


class Clock:
    """Seconds that pass when a stage says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _row(**fields: Any) -> dict[str, Any]:
    return {"name": "x", "ok": None, "value": None, "unit": "", "note": "", **fields}


class Stages:
    """A worker whose stages take given seconds, and end, hang or die."""

    def __init__(self, clock: Clock, takes: dict[str, float], ends: dict[str, str] | None = None) -> None:
        self.clock, self.takes, self.ends = clock, takes, ends or {}
        self.limits: dict[str, float] = {}

    def __call__(self, stages: Sequence[str], limit: float) -> Iterator[dict[str, Any] | None]:
        (name,) = stages
        self.limits[name] = limit
        yield {"event": "row", "row": _row(name=name, ok=True)}
        self.clock.now += min(self.takes[name], limit)
        if self.takes[name] > limit:
            yield None
        elif self.ends.get(name) != "dies":
            yield {"event": "end", "state": self.ends.get(name, "done")}


def _states(results: Sequence[Any]) -> dict[str, str]:
    return {result.stage: result.state for result in results}


def test_stages_are_left_out_when_the_clock_says_so() -> None:
    clock = Clock()
    worker = Stages(clock, {"a": 40.0, "b": 30.0, "c": 5.0})
    results = session.run([("a", 40), ("b", 60), ("c", 5)], worker, budget=65, clock=clock)
    # After a, 20 of 60 seconds are left: less than half of b's, enough for c.
    assert _states(results) == {"a": "done", "b": "no time left", "c": "done"}
    assert [result.seconds for result in results] == [40.0, 0.0, 5.0]
    assert worker.limits == {"a": 60.0, "c": 10.0}
    assert not session.failed(results)


def test_a_stage_that_hangs_or_dies_costs_itself_alone() -> None:
    clock = Clock()
    worker = Stages(
        clock, {"hangs": 99.0, "dies": 1.0, "fails": 1.0, "ends": 1.0}, {"dies": "dies", "fails": "failed"}
    )
    results = session.run([(name, 5) for name in worker.takes], worker, budget=100, clock=clock)
    assert _states(results) == {"hangs": "hung", "dies": "died", "fails": "failed", "ends": "done"}
    assert worker.limits["hangs"] == 10.0
    assert session.failed(results)
    assert all(len(result.rows) == 1 for result in results), "rows that came before are kept"


def test_a_wrong_check_fails_the_session_and_is_shown_in_full() -> None:
    result = session.Result("ops", "done", 3.0, [_row(ok=True), _row(name="flash", ok=False, note="error 2")])
    times = session.Result("times", "done", 1.0, [_row(name="copy", value=12.5, unit="us", note="3.0 TB/s")])
    assert session.failed([result]) and not session.failed([times])
    shown = session.table([result, times])
    assert "1 of 2 right" in shown
    assert "WRONG  flash: error 2" in shown
    assert "12.5 us" in shown and "3.0 TB/s" in shown


def test_every_stage_of_the_plan_exists() -> None:
    for name, (where, seconds) in plan.STAGES.items():
        module, function = where.split(":")
        assert f"def {function}(scope: Scope)" in (FOLDER / f"{module}.py").read_text(), name
        assert seconds > 0
    assert {stage for stages in plan.SESSIONS.values() for stage in stages} == set(plan.STAGES)
    for name, stages in plan.SESSIONS.items():
        assert sum(plan.STAGES[stage][1] for stage in stages) <= session.BUDGET - session.RESERVE, name


def test_every_file_of_the_tests_stage_is_there() -> None:
    assert [name for name in plan.TESTS if not (ROOT / name).is_file()] == []


def test_a_worker_that_dies_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "worker.py"
    stand_in.write_text(
        "import json, os, sys, time\n"
        "for line in sys.stdin:\n"
        "    (name,) = json.loads(line)['stages']\n"
        "    if name == 'dies': os._exit(3)\n"
        "    if name == 'hangs': time.sleep(60)\n"
        "    print(json.dumps({'event': 'end', 'state': 'done'}), flush=True)\n"
    )
    monkeypatch.setattr(session, "HERE", tmp_path)
    process = session.Process(tmp_path / "log", dry=True)
    try:
        results = session.run([("dies", 9), ("hangs", 0.5), ("ends", 9)], process, budget=60)
    finally:
        process.close()
    assert _states(results) == {"dies": "died", "hangs": "hung", "ends": "done"}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_dry_run(name: str, tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu_session.sh"
    command = ["bash", str(script), name, str(tmp_path), "--dry", "--budget", "800"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + (tmp_path / f"{name}.log").read_text()[-4000:]
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["dry"] and found["where"]["device_type"] == "cpu"
    assert {stage["stage"]: stage["state"] for stage in found["stages"]} == dict.fromkeys(
        plan.SESSIONS[name], "done"
    )
    checked = {stage["stage"]: len(stage["rows"]) for stage in found["stages"]}
    assert all(count or stage == "launch_costs" for stage, count in checked.items()), checked
