"""A run's log as a picture: loss, learning rate, gradient norm."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from gptkern.durable import write_file
from gptkern.train.errors import SettingsError
from gptkern.train.logs import read_log


def plot_run(folder: Path, path: Path) -> None:
    """Draw ``folder``'s ``log.jsonl`` to ``path``, a PNG.

    Raises:
        SettingsError: There is no log, or nothing in it yet.
    """
    rows = read_log(folder / "log.jsonl")
    if not rows:
        raise SettingsError(f"{folder / 'log.jsonl'}: no log of a run, or nothing in it yet")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates, norms = figure.subplots(3, 1, sharex=True)
    _line(losses, rows, "loss", "training")
    _line(losses, rows, "val_loss", "held out", marker="o")
    losses.set(ylabel="loss (nats)")
    # A folder's name may hold what matplotlib takes for mathematics.
    losses.set_title(folder.resolve().name, parse_math=False)
    losses.legend()
    _line(rates, rows, "lr")
    rates.set(ylabel="learning rate")
    _line(norms, rows, "grad_norm")
    norms.set(ylabel="gradient norm", xlabel="step")
    for axes in (losses, rates, norms):
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_lr(rates: list[float], losses: list[float], suggestion: float, path: Path) -> None:
    """Draw a range test to ``path``, a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.semilogx(rates, losses)
    axes.axvline(suggestion, color="tab:green", label=f"suggested: {suggestion:.1e}")
    axes.set(xlabel="learning rate", ylabel="loss, smoothed (nats)", title="Learning rate range test")
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())


def _line(axes: Any, rows: list[dict[str, Any]], key: str, label: str = "", **style: Any) -> None:
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    if found:
        axes.plot(*zip(*found, strict=True), label=label, **style)
