"""Results as pictures: bars by provider, decode time by context, the roofline."""

from __future__ import annotations

import io
from collections import defaultdict
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from gptkern.bench.run import Results, Row
from gptkern.durable import write_file

# Okabe and Ito's palette, which colour-blind readers can tell apart; gptkern is always the first.
_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]
_BARS_A_PANEL = 10


def draw(results: Results, folder: Path) -> list[Path]:
    """Write all pictures as PNG into ``folder``; those with nothing to show are left out."""
    pictures = [_bars(results, suite, folder) for suite in dict.fromkeys(row.suite for row in results.rows)]
    pictures += [_by_context(results, folder), _roofline(results, folder)]
    return [picture for picture in pictures if picture is not None]


def _colours(results: Results) -> dict[str, str]:
    names = sorted({row.provider for row in results.rows}, key=lambda name: (name != "gptkern", name))
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def _bars(results: Results, suite: str, folder: Path) -> Path | None:
    """Time of every provider over gptkern's, a group of bars for each problem."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in results.rows:
        if row.suite == suite and row.rounds:
            direction = " backward" if row.backward else ""
            groups[f"{row.shape}\n{row.dtype}{direction}"].append(row)
    groups = {name: rows for name, rows in groups.items() if any(r.provider == "gptkern" for r in rows)}
    if not groups:
        return None
    colours = _colours(results)
    names = list(groups)
    panels = [names[i : i + _BARS_A_PANEL] for i in range(0, len(names), _BARS_A_PANEL)]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(12, 4 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _bar_panel(axis, {name: groups[name] for name in panel}, colours)
    figure.suptitle(f"{suite} on {results.environment['device']}: time over gptkern's (higher is slower)")
    return _save(folder, f"{suite}.png")


def _bar_panel(axis: Axes, groups: dict[str, list[Row]], colours: dict[str, str]) -> None:
    providers = [
        name for name in colours if any(r.provider == name for rows in groups.values() for r in rows)
    ]
    width = 0.8 / len(providers)
    for place, provider in enumerate(providers):
        xs, ys = [], []
        for index, rows in enumerate(groups.values()):
            times = {row.provider: row.seconds for row in rows}
            ours, theirs = times["gptkern"], times.get(provider)
            if ours and theirs:
                xs.append(index - 0.4 + width * (place + 0.5))
                ys.append(theirs / ours)
        axis.bar(xs, ys, width * 0.92, label=provider, color=colours[provider])
    axis.axhline(1.0, color="#444444", linewidth=0.8)
    axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axis.set_xlim(-0.5, max(len(groups), 3) - 0.5)
    # Room above the bars for the legend.
    axis.set_ylim(top=1.2 * axis.get_ylim()[1])
    axis.legend(fontsize=8, ncols=min(6, len(providers)), loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)


def _by_context(results: Results, folder: Path) -> Path | None:
    """Time of a decode step over the context, a line for each model, batch, dtype and provider."""
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
    axis.set(xscale="log", xlabel="tokens of context", ylabel="milliseconds a step")
    ticks = sorted({context for rows in lines.values() for context in rows})
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.set_xticks([], minor=True)
    axis.set_ylim(bottom=0)
    axis.set_title(f"A decode step on {results.environment['device']}, by context")
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
