"""Results as pictures: speed against the best peer, decode time by context, the roofline."""

from __future__ import annotations

import io
from collections import defaultdict
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from gptkern.bench.run import Results, Row
from gptkern.bench.tables import seconds_text, speeds
from gptkern.durable import write_file

# Okabe and Ito's palette, which colour-blind readers can tell apart; gptkern is always the first.
_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]


def draw(results: Results, folder: Path) -> list[Path]:
    """Write all pictures as PNG into ``folder``; those with nothing to show are left out."""
    pictures = [_speed(results, folder), _by_context(results, folder), _roofline(results, folder)]
    return [picture for picture in pictures if picture is not None]


def _speed(results: Results, folder: Path) -> Path | None:
    """gptkern's speed relative to the best peer, a bar a problem, the largest first; floors as red lines."""
    found = speeds(results)[::-1]
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.32 * len(found)), layout="constrained")
    for place, speed in enumerate(found):
        colour = _COLOURS[0] if speed.ratio >= 1 else _COLOURS[5]
        axis.barh(place, speed.ratio - 1, left=1, height=0.7, color=colour)
        label = f"{speed.ratio:.2f} x   {seconds_text(speed.ours)}"
        axis.annotate(label, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        if speed.at_floor is not None:
            axis.plot([speed.at_floor] * 2, [place - 0.45, place + 0.45], color="#c0392b", linewidth=1.5)
    axis.axvline(1, color="#444444", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g} x")
    axis.set_yticks(range(len(found)), [speed.title for speed in found], fontsize=8)
    axis.set_ylim(-0.6, len(found) - 0.4)
    axis.set_xlabel(
        "speed relative to the best peer (1 x = as fast; red: at this machine's copy or matrix rate)"
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"gptkern on {results.environment['device']}")
    return _save(folder, "speed.png")


def _by_context(results: Results, folder: Path) -> Path | None:
    """Time of a decode pass over the context, a line for each model, batch, dtype and provider."""
    series: dict[tuple[str, str, str], dict[int, Row]] = defaultdict(dict)
    for row in results.rows:
        model, _, context = row.shape.rpartition(" at ")
        if row.suite == "decode_step" and row.rounds:
            series[model, row.dtype, row.provider][int(context)] = row
    lines = {name: rows for name, rows in series.items() if len(rows) > 1}
    if not lines:
        return None
    _, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    for colour, ((model, dtype, provider), rows) in zip(cycle(_COLOURS), lines.items(), strict=False):
        contexts = sorted(rows)
        times = [(rows[context].seconds or 0.0) * 1e3 for context in contexts]
        style = "o-" if provider == "gptkern" else "s--"
        axis.plot(contexts, times, style, color=colour, label=f"{provider}: {model} {dtype}")
    axis.set(xscale="log", xlabel="tokens of context", ylabel="milliseconds a pass")
    ticks = sorted({context for rows in lines.values() for context in rows})
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.set_xticks([], minor=True)
    axis.set_ylim(bottom=0)
    axis.set_title(f"A decode pass on {results.environment['device']}, by context")
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=8)
    return _save(folder, "decode_by_context.png")


def _roofline(results: Results, folder: Path) -> Path | None:
    """Achieved rate over operations per byte, gptkern's rows, under this machine's two ceilings."""
    rows = [r for r in results.rows if r.provider == "gptkern" and r.rounds and r.flops and r.bytes_moved]
    if not rows:
        return None
    ceilings = results.ceilings
    _, axis = plt.subplots(figsize=(10, 6), layout="constrained")
    intensities = [row.flops / row.bytes_moved for row in rows]
    reach = [
        min(intensities) / 4,
        max([*intensities, *(m / ceilings.copy for m in ceilings.matmul.values())]) * 4,
    ]
    for colour, dtype in zip(_COLOURS, sorted({row.dtype for row in rows}), strict=False):
        peak = ceilings.matmul[dtype]
        knee = peak / ceilings.copy
        xs = sorted({reach[0], min(max(knee, reach[0]), reach[1]), reach[1]})
        axis.plot(xs, [min(x * ceilings.copy, peak) for x in xs], color=colour, label=f"ceiling, {dtype}")
    suites = list(dict.fromkeys(row.suite for row in rows))
    for suite, marker in zip(suites, "osD^vPX*<>", strict=False):
        chosen = [row for row in rows if row.suite == suite]
        axis.scatter(
            [row.flops / row.bytes_moved for row in chosen],
            [row.flops / (row.seconds or 1.0) for row in chosen],
            marker=marker,
            s=40,
            color="#444444",
            label=suite,
            zorder=3,
        )
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axis.set_title(f"gptkern under the ceilings of {results.environment['device']}")
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=8)
    return _save(folder, "roofline.png")


def _save(folder: Path, name: str) -> Path:
    path = folder / name
    picture = io.BytesIO()
    plt.savefig(picture, format="png", dpi=110)
    plt.close()
    write_file(path, picture.getvalue())
    return path
