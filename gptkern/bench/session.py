"""A whole bench run: ceilings, suites, files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from gptkern.bench import ceilings, html, results, suites, tables
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
    rates = ceilings.measure(device)
    rounds, samples, seconds = _QUICK if quick else _FULL
    return run(problems, device, rates, rounds=rounds, samples=samples, seconds=seconds, progress=progress)


def write(outcome: Results, folder: Path, sections: dict[str, str] | None = None) -> list[Path]:
    """Write results.json, results.md, report.html and, with matplotlib, pictures into ``folder``.

    Returns:
        The files written.
    """
    make_folder(folder)
    results.save(outcome, folder / "results.json")
    write_file(folder / "results.md", tables.markdown(outcome))
    pictures: list[Path] = []
    if find_spec("matplotlib") is not None:
        from gptkern.bench import plots

        pictures = plots.draw(outcome, folder)
    # The page has bars of its own: of the pictures only those of something else.
    others = [picture for picture in pictures if picture.name != "speed.png"]
    write_file(folder / "report.html", html.page(outcome, others, sections))
    return [folder / "results.json", folder / "results.md", *pictures, folder / "report.html"]
