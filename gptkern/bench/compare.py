"""Comparing two runs: changes beyond the noise, by a bootstrap over rounds.

gptkern is compared by its time over its peers' in the same round wherever the peers are the same
code in both runs: a slow spell of the machine falls on all of them and cancels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import geometric_mean, median, quantiles

from gptkern.bench.run import Results, Row
from gptkern.bench.tables import OURS

# A change counts when its whole interval lies beyond this.
TOLERANCE = 0.04
_RESAMPLES = 2000
_COVERAGE = 0.99


@dataclass(frozen=True)
class Change:
    """One row in both runs: the new time over the old, with its bootstrap interval.

    ``relative`` says that both times were taken over the peers' in the same round.
    """

    old: Row
    new: Row
    ratio: float
    low: float
    high: float
    relative: bool

    @property
    def verdict(self) -> str:
        """``slower``, ``faster`` or ``same``."""
        if self.low > 1.0 + TOLERANCE:
            return "slower"
        return "faster" if self.high < 1.0 - TOLERANCE else "same"


@dataclass(frozen=True)
class Comparison:
    """Two runs, row by row.

    Attributes:
        broken: Rows that were measured in the old run and failed in the new one.
        missing: Rows that the new run does not have.
    """

    changes: list[Change]
    broken: list[Row]
    missing: list[Row]

    @property
    def regressed(self) -> bool:
        """True if gptkern itself became slower, or broke, anywhere."""
        slower = any(c.verdict == "slower" and c.new.provider == OURS for c in self.changes)
        return slower or any(row.provider == OURS for row in self.broken)


def compare(old: Results, new: Results) -> Comparison:
    """Compare the rows that both runs have.

    Raises:
        ValueError: The runs were made on different devices.
    """
    devices = [results.environment["device"] for results in (old, new)]
    if devices[0] != devices[1]:
        raise ValueError(f"bench compare: the runs are of different devices: {devices[0]} and {devices[1]}")
    later = {row.key: row for row in new.rows}
    same_peers = _peer_versions(old) == _peer_versions(new)
    changes, broken, missing = [], [], []
    for row in old.rows:
        match = later.get(row.key)
        if not row.rounds:
            continue
        if match is None:
            missing.append(row)
        elif not match.rounds:
            broken.append(match)
        else:
            yardsticks = _yardsticks(row, old, new) if same_peers else None
            changes.append(_change(row, match, yardsticks))
    return Comparison(changes, broken, missing)


def _peer_versions(results: Results) -> dict[str, str]:
    versions: dict[str, str] = results.environment["versions"]
    return {name: version for name, version in versions.items() if name != OURS}


def _yardsticks(row: Row, *runs: Results) -> tuple[list[float], list[float]] | None:
    """The peers' geometric mean time in each round of both runs; None where they share no peer."""
    if row.provider != OURS:
        return None
    peers = [
        {other.provider: other for other in results.rows if other.rounds and other.key[:-1] == row.key[:-1]}
        for results in runs
    ]
    common = sorted((peers[0].keys() & peers[1].keys()) - {OURS})
    if not common:
        return None
    old, new = (
        [geometric_mean(times) for times in zip(*(_round_times(of[name]) for name in common), strict=False)]
        for of in peers
    )
    return old, new


def _change(old: Row, new: Row, yardsticks: tuple[list[float], list[float]] | None) -> Change:
    before, after = (_round_times(row) for row in (old, new))
    if yardsticks is not None:
        before, after = (
            [time / peer for time, peer in zip(times, peers, strict=False)]
            for times, peers in zip((before, after), yardsticks, strict=True)
        )
    draw = random.Random(0)
    ratios = sorted(
        median(draw.choices(after, k=len(after))) / median(draw.choices(before, k=len(before)))
        for _ in range(_RESAMPLES)
    )
    tail = round((1.0 - _COVERAGE) / 2 * _RESAMPLES)
    return Change(
        old, new, median(after) / median(before), ratios[tail], ratios[-1 - tail], yardsticks is not None
    )


def _round_times(row: Row) -> list[float]:
    """One time a round: its lower quartile, which other work on the machine moves least."""
    return [quantiles(round_, n=4)[0] if len(round_) > 1 else round_[0] for round_ in row.rounds]
