"""Results as tables: what each provider took, how near to the floor, against which peer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gptkern.bench.ceilings import Ceilings
from gptkern.bench.run import Results, Row

OURS = "gptkern"


@dataclass(frozen=True)
class Line:
    """One row of a table, in people's units.

    Attributes:
        rate: Achieved rate of what the problem is bound by.
        of_floor: The floor over the measured time, both from this machine's ceilings; None for
            problems without a count of bytes and operations.
        ratio: gptkern's speed over this provider's: above 1 gptkern is faster.
    """

    row: Row
    time: str
    rate: str
    of_floor: float | None
    ratio: float | None


def lines(results: Results) -> list[Line]:
    """A line for each row, in order."""
    ours = {row.key[:-1]: row.seconds for row in results.rows if row.provider == OURS}
    return [_line(row, ours.get(row.key[:-1]), results.ceilings) for row in results.rows]


def seconds_text(seconds: float) -> str:
    """A time with three digits and its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _line(row: Row, ours: float | None, ceilings: Ceilings) -> Line:
    if row.seconds is None:
        return Line(row, "", "", None, None)
    floor = ceilings.floor(row.bytes_moved, row.flops, row.dtype)
    return Line(
        row,
        seconds_text(row.seconds),
        _rate(row, ceilings),
        floor / row.seconds if floor > 0 else None,
        row.seconds / ours if ours else None,
    )


def memory_bound(row: Row, ceilings: Ceilings) -> bool:
    """True if the bytes take longer than the operations, at this machine's ceilings."""
    return row.bytes_moved / ceilings.copy >= row.flops / ceilings.matmul[row.dtype]


def _rate(row: Row, ceilings: Ceilings) -> str:
    assert row.seconds is not None
    if not row.bytes_moved and not row.flops:
        return ""
    if memory_bound(row, ceilings):
        return f"{row.bytes_moved / row.seconds / 1e9:.3g} GB/s"
    rate = row.flops / row.seconds
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


@dataclass(frozen=True)
class Speed:
    """gptkern against the fastest peer on one problem.

    Attributes:
        ours, peer: Seconds.
        ratio: How many times as fast as the peer gptkern is; below 1 it is slower.
        at_floor: What ``ratio`` would be at the floor; None without a count of bytes and operations.
    """

    title: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    at_floor: float | None


def speeds(results: Results) -> list[Speed]:
    """gptkern's speed on every problem that a peer solves, too: the largest ratio first."""
    found = []
    for title, rows, floor in _problems(results):
        ours = next((seconds for provider, seconds in rows if provider == OURS), None)
        peers = [(seconds, provider) for provider, seconds in rows if provider != OURS]
        if ours and peers:
            peer, name = min(peers)
            found.append(Speed(title, ours, peer, name, peer / ours, peer / floor if floor else None))
    return sorted(found, key=lambda speed: -speed.ratio)


def times(results: Results) -> list[tuple[str, list[tuple[str, float]], float]]:
    """(problem, its providers and their seconds, the least seconds or 0): in the order of ``speeds``."""
    order = {speed.title: place for place, speed in enumerate(speeds(results))}
    found = [
        (title, sorted(rows, key=lambda row: row[1]), floor) for title, rows, floor in _problems(results)
    ]
    return sorted(found, key=lambda problem: order.get(problem[0], len(order)))


def _problems(results: Results) -> list[tuple[str, list[tuple[str, float]], float]]:
    rows: dict[str, list[tuple[str, float]]] = {}
    floors: dict[str, float] = {}
    for row in results.rows:
        if row.seconds is not None:
            rows.setdefault(row.title, []).append((row.provider, row.seconds))
            floors[row.title] = results.ceilings.floor(row.bytes_moved, row.flops, row.dtype)
    return [(title, measured, floors[title]) for title, measured in rows.items()]


HEADER = ("problem", "provider", "time", "spread", "rate", "floor / time", "gptkern's speed")


def cells(line: Line) -> tuple[str, ...]:
    """A line's cells, under HEADER."""
    row = line.row
    if row.problem:
        return row.title, row.provider, row.problem, "", "", "", ""
    return (
        row.title,
        row.provider,
        line.time,
        "" if row.spread is None else f"{row.spread:.0%}",
        line.rate,
        "" if line.of_floor is None else f"{line.of_floor:.0%}",
        "" if line.ratio is None or row.provider == OURS else f"{line.ratio:.2f} x",
    )


def markdown(results: Results) -> str:
    """The whole run as a Markdown document."""
    where, ceilings = results.environment, results.ceilings
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings.matmul.items())
    persisting = where.get("persisting_l2")
    head = [
        f"# gptkern bench: {where['device']}",
        "",
        f"{where['time']}, {versions}, Python {where['python']}, {_commit(where)}, "
        f"CPU threads: {where['threads']}, {where['clock']}.",
        "",
        f"Measured ceilings: copy {ceilings.copy / 1e9:.4g} GB/s (read + written); matrix product {rates}.",
        "Time is the median, spread the interquartile range over it. The floor is the larger of bytes over",
        "the copy rate and operations over the matrix rate; causal attention counts half its square.",
        "gptkern's speed is relative to the row's provider: 2 x is half its time, below 1 x it is slower.",
        *([f"Persisting lines of L2: {persisting}."] if persisting else []),
        "",
    ]
    return "\n".join([*head, *_table(map(cells, lines(results))), ""])


def _commit(where: dict[str, Any]) -> str:
    """The checkout's commit; an installed package has none."""
    return f"commit {where['commit']}" if where["commit"] else "an installed package"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rule = "|" + "|".join("---" for _ in HEADER) + "|"
    return ["| " + " | ".join(HEADER) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def plain(results: Results) -> list[str]:
    """The measurements as lines of 80 columns at most where names are short: a heading a problem."""
    found = lines(results)
    width = max((len(line.row.provider) for line in found), default=0)
    shown, title = (
        [f"  {'':{width}} {'time':>9} {'spread':>6} {'rate':>13} {'floor':>5}  gptkern's speed"],
        "",
    )
    for line in found:
        if line.row.title != title:
            title = line.row.title
            shown.append(title)
        _, provider, time, spread, rate, of_floor, ratio = cells(line)
        if line.row.problem:
            shown.append(f"  {provider:{width}} {line.row.problem}")
        else:
            shown.append(
                f"  {provider:{width}} {time:>9} {spread:>6} {rate:>13} {of_floor:>5}  {ratio}".rstrip()
            )
    return shown
