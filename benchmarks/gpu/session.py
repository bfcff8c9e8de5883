"""A short loan of a GPU, spent well: checks first, then figures, each stage by its worth until time is up.

    python benchmarks/gpu/session.py first OUT             # is it right, and what does it cost: 330 s
    python benchmarks/gpu/session.py second OUT            # backward, tuning, sanitizers, soak, the drop-in
    python benchmarks/gpu/session.py second OUT ops sampler   # these stages first: what failed before
    python benchmarks/gpu/session.py first OUT --dry       # the same code on a CPU at tiny sizes

OUT gets NAME.json (device, versions, commit, every row) as it goes, and the logs; a table is printed last.
Stages run in a worker process: one that dies, hangs or loses the device costs its own stage alone. The exit
code is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUDGET = 330.0
# What is kept for the last stage's end and the table.
RESERVE = 5.0
# How many times what it was expected to take a stage may take.
PATIENCE = 2.0

Event = dict[str, Any]
# From the stages to run, with their limits in seconds, to the worker's events; None: nothing for so long.
Worker = Callable[[Sequence[str], float], Iterator[Event | None]]


@dataclass
class Result:
    """What became of a stage.

    Attributes:
        state: "done", or why it is not: "failed", "hung", "died", "no time left".
        rows: As the worker told them.
    """

    stage: str
    state: str = "no time left"
    seconds: float = 0.0
    rows: list[Event] = field(default_factory=list)


def run(
    plan: Sequence[tuple[str, float]],
    worker: Worker,
    *,
    budget: float = BUDGET,
    patience: float = PATIENCE,
    clock: Callable[[], float] = time.monotonic,
    told: Callable[[list[Result], Event | None], None] = lambda results, event: None,
) -> list[Result]:
    """Run stages in order, each in the worker, a fresh one after a stage that was lost.

    Args:
        plan: Stages and the seconds that each is expected to take; left out where half of that is not left.
        patience: How many times what a stage was expected to take it may take.
        told: Called after every event and stage, with all results so far.
    """
    began = clock()
    results = [Result(name) for name, _ in plan]
    for result, (name, seconds) in zip(results, plan, strict=True):
        left = budget - RESERVE - (clock() - began)
        if left < seconds / 2:
            continue
        limit = min(left, patience * seconds)
        started = clock()
        result.state = "died"
        for event in worker([name], limit):
            if event is None:
                result.state = "hung"
                break
            if event["event"] == "row":
                result.rows.append(event["row"])
            elif event["event"] == "end":
                result.state = event["state"]
                break
            told(results, event)
        result.seconds = clock() - started
        told(results, None)
    return results


class Process:
    """A worker process, kept between stages, replaced after one that it did not survive."""

    def __init__(self, log: Path, dry: bool) -> None:
        self._log, self._dry = log, dry
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __call__(self, stages: Sequence[str], limit: float) -> Iterator[Event | None]:
        """The events of these stages; None, and the end of the process, where they outlast ``limit``."""
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(json.dumps({"stages": list(stages), "seconds": limit}) + "\n")
        process.stdin.flush()
        deadline = time.monotonic() + limit
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.close()
                yield None
                return
            if line is None:
                self.close()
                return
            yield json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            command = [sys.executable, str(HERE / "worker.py"), *(["--dry"] if self._dry else [])]
            paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
            if self._dry:
                environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
            self._lines = queue.Queue()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log.open("a"),
                env=environment,
                text=True,
            )
            threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()
        return self._process

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)


def table(results: Sequence[Result]) -> str:
    """A short table: figures line by line, checks by their number, what failed in full."""
    lines = []
    for result in results:
        checks = [row["ok"] for row in result.rows if row["ok"] is not None]
        counted = f"  {sum(checks)} of {len(checks)} right" if checks else ""
        lines.append(f"{result.stage:<20} {result.state:<13} {result.seconds:5.0f} s{counted}")
        for row in result.rows:
            if row["ok"] is False:
                lines.append(f"    WRONG  {row['name']}: {row['note'] or row['value']}")
            elif row["ok"] is None:
                value = "" if row["value"] is None else f"{row['value']:10.1f} {row['unit']}"
                lines.append(f"    {row['name']:<52} {value:<16} {row['note']}")
    return "\n".join(lines)


def failed(results: Sequence[Result]) -> bool:
    """Whether a check was wrong or a stage was lost; one that there was no time for is neither."""
    wrong = any(row["ok"] is False for result in results for row in result.rows)
    return wrong or any(result.state not in ("done", "no time left") for result in results)


def main() -> int:
    """The command."""
    import plan

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(plan.SESSIONS))
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("stages", nargs="*", help="stages to run before the others")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds in all (default: %(default).0f)"
    )
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny, kernels interpreted")
    asked = parser.parse_intermixed_args()
    unknown = set(asked.stages) - set(plan.STAGES)
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(plan.STAGES)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    wanted = [*asked.stages, *(name for name in plan.SESSIONS[asked.name] if name not in asked.stages)]
    path = asked.out / f"{asked.name}.json"
    where: Event = {}

    def told(results: list[Result], event: Event | None) -> None:
        if event is not None and event["event"] == "where":
            where.update(event["where"])
        if event is None:
            kept = {"where": where, "dry": asked.dry, "stages": [vars(result) for result in results]}
            path.write_text(json.dumps(kept, indent=1))
            print(table([result for result in results if result.state != "no time left"][-1:]), flush=True)

    process = Process(asked.out / f"{asked.name}.log", asked.dry)
    try:
        seconds = [(name, plan.STAGES[name][1]) for name in wanted]
        # An interpreter on a busy machine has no seconds to keep to.
        patience = 20 * PATIENCE if asked.dry else PATIENCE
        results = run(seconds, process, budget=asked.budget, patience=patience, told=told)
    finally:
        process.close()
    print(f"\n{where}\n{table(results)}")
    return int(failed(results))


if __name__ == "__main__":
    sys.exit(main())
