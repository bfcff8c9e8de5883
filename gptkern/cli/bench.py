"""``gptkern bench``: measure this machine, compare two measurements."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptkern.bench.suites import SUITES
from gptkern.cli import _options as o
from gptkern.cli import terminal
from gptkern.durable import make_folder

if TYPE_CHECKING:
    from gptkern.bench.compare import Comparison
    from gptkern.bench.run import Results, Row


def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="Suites; all of them if none is named. Or: compare OLD NEW, two folders or results.json."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure a few small shapes alone: about two minutes.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Write results.json, results.md, report.html and pictures into this folder."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default as many as PyTorch takes.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the results, or compare's findings, as JSON.")
    ] = False,
) -> int:
    """Time the kernels and the model against their peers and against this machine's ceilings.

    First the machine's ceilings are measured: the rate of a large copy, and of a large matrix product.
    Every provider's result is checked against a float64 reference before it is timed, and again after.

    Suites: {suites}.

    Examples:

    - `gptkern bench --quick --out report` measures a little of everything and writes report/report.html

    - `gptkern bench flash_attention layer_norm` runs two suites in full

    - `gptkern bench compare old/results.json new/results.json` lists the changes beyond the noise, and
      exits with 1 if gptkern became slower: for use in CI

    Pictures need matplotlib: `pip install 'gptkern[bench]'`. Without it the report is written without them.
    """
    if what and what[0] == "compare":
        return _compare(what[1:], json_)
    import torch

    from gptkern.bench import results, session

    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(o.chosen_device(device))
    if out is not None:
        make_folder(out)  # refused before the measurements, which take minutes
    outcome = _measured(what or [], where, quick)
    if json_:
        print(results.text(outcome), end="")
    else:
        _print(outcome)
    if out is not None:
        for path in session.write(outcome, out, _sections(where, quick)):
            print(terminal.visible(path, sys.stderr), file=sys.stderr)
        if find_spec("matplotlib") is None:
            terminal.tell("no pictures, which need matplotlib: pip install 'gptkern[bench]'")
    return 0


# The list of suites is written once, where they are.
bench.__doc__ = (bench.__doc__ or "").replace("{suites}", ", ".join(SUITES))


def _measured(names: list[str], device: object, quick: bool) -> Results:
    import torch
    from rich.console import Console

    from gptkern.bench import session

    assert isinstance(device, torch.device)
    console = Console(stderr=True)
    with console.status("starting") as status:
        return session.run_suites(names, device, quick, lambda text: status.update(text))


def _print(outcome: Results) -> None:
    from gptkern.bench.tables import plain

    ceilings = outcome.ceilings
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings.matmul.items())
    terminal.write(f"{outcome.environment['device']}")
    terminal.write(f"copy {ceilings.copy / 1e9:.4g} GB/s (read + written), matrix product {rates} TFLOP/s\n")
    terminal.write("\n".join(plain(outcome)))
    terminal.write("\nfloor: the least time at these rates, over the time. speed: 2 x is half the row's time")


def _sections(device: object, quick: bool) -> dict[str, str]:
    """On a machine without a GPU, the report carries what the compiler made of the GPU kernels."""
    if str(device) != "cpu":
        return {}
    from gptkern.bench import inspect

    return {
        "The GPU kernels' machine code, sm_90 (compiled ahead of time, not run)": inspect.table(
            (90,), 2 if quick else None
        )
    }


def _compare(files: list[str], as_json: bool) -> int:
    if len(files) != 2:
        raise typer.BadParameter("compare takes two files: gptkern bench compare OLD.json NEW.json")
    from gptkern.bench.compare import compare
    from gptkern.bench.results import load

    comparison = compare(*(load(Path(name)) for name in files))
    if as_json:
        print(json.dumps(_as_json(comparison)))
        return int(comparison.regressed)
    for change in comparison.changes:
        if change.verdict != "same":
            terminal.write(
                f"{change.verdict}: {change.new.title}, {change.new.provider}: {change.ratio:.3f} x the time "
                f"({change.low:.3f} to {change.high:.3f})"
            )
    for row in comparison.broken:
        terminal.write(f"broken: {row.title}, {row.provider}: {row.problem}")
    for row in comparison.missing:
        terminal.write(f"not measured again: {row.title}, {row.provider}")
    same = sum(change.verdict == "same" for change in comparison.changes)
    print(f"{len(comparison.changes)} compared, {same} the same within the noise", file=sys.stderr)
    return int(comparison.regressed)


def _as_json(comparison: Comparison) -> dict[str, Any]:
    def named(row: Row) -> dict[str, str]:
        return {"problem": row.title, "provider": row.provider}

    return {
        "regressed": comparison.regressed,
        "changes": [
            {
                **named(change.new),
                "verdict": change.verdict,
                "ratio": change.ratio,
                "interval": [change.low, change.high],
            }
            for change in comparison.changes
        ],
        "broken": [{**named(row), "why": row.problem} for row in comparison.broken],
        "missing": [named(row) for row in comparison.missing],
    }
