"""``gptkern plot``: a run's curves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gptkern.cli import terminal
from gptkern.durable import no_link


def plot(
    run: Annotated[Path, typer.Argument(help="The folder of a run of `gptkern train`.")],
    out: Annotated[Path | None, typer.Option(help="The PNG; by default plot.png in that folder.")] = None,
) -> None:
    """Draw a training run's loss, learning rate and gradient norm.

    Example: `gptkern plot runs/shakespeare`
    """
    from gptkern.train.plot import plot_run

    path = out or no_link(run / "plot.png")
    plot_run(run, path)
    terminal.write(str(path))
