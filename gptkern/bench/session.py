"""A whole bench run: ceilings, suites, files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gptkern.bench import ceilings, html, plots, results, suites, tables
from gptkern.bench.run import Results, run
from gptkern.durable import make_folder, write_file

# Rounds, samples a round, seconds a problem: rounds are what comparing two runs resamples.
_QUICK = (9, 5, 2.0)
_FULL = (12, 8, 20.0)


def run_suites(
    names: Sequence[str],
    device: torch.device,
    quick: bool,
    progress: Callable[[str], None] = lambda _: None,
) -> Results:
    """Measure the ceilings, then the suites of these names, all of them where there are none.

    Raises:
        ValueError: There is no such suite.
    """
    problems = [
        problem for name in names or suites.SUITES for problem in suites.problems(name, device, quick)
    ]
    progress("ceilings of this machine")
    found = ceilings.measure(device)
    rounds, samples, seconds = _QUICK if quick else _FULL
    return run(problems, device, found, rounds=rounds, samples=samples, seconds=seconds, progress=progress)


def write(found: Results, folder: Path, sections: dict[str, str] | None = None) -> list[Path]:
    """Write results.json, results.md, the plots and report.html into ``folder``; the files written."""
    make_folder(folder)
    results.save(found, folder / "results.json")
    write_file(folder / "results.md", tables.markdown(found))
    pictures = plots.draw(found, folder)
    write_file(folder / "report.html", html.page(found, pictures, sections))
    return [folder / "results.json", folder / "results.md", *pictures, folder / "report.html"]
