"""report.html: a run on one page that needs nothing beside it, on screens of any width, light and dark."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from gptkern.bench.run import Results
from gptkern.bench.tables import HEADER, OURS, Speed, cells, lines, seconds_text, speeds, times

_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #5a6370; --page: #fff; --rule: #d8dde3;
  --track: #eef1f4; --ours: #0072b2; --slower: #b5541c; --peer: #9aa5b1; --floor: #c0392b }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ec; --soft: #a3adb8; --page: #14171a;
  --rule: #343a41; --track: #22272c; --ours: #4aa8e0; --slower: #e08a52; --peer: #6c7783; --floor: #ff7b6b }
  img { filter: invert(.92) hue-rotate(180deg) } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 1.5rem auto; max-width: 64rem; padding: 0 1rem }
h2 { margin: 2.2rem 0 .3rem } h3 { margin: 1.4rem 0 .2rem; font-size: 1rem }
p { margin: .3rem 0; color: var(--soft) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; overflow-wrap: anywhere }
dt { font-weight: 600 } dd { margin: 0 }
.bar { display: grid; grid-template-columns: minmax(0, 20rem) minmax(0, 1fr); gap: 0 1rem;
  align-items: center; padding: .15rem 0; font-variant-numeric: tabular-nums }
.bar .what { overflow-wrap: anywhere; line-height: 1.25 }
.bar .value { font-size: .85rem; line-height: 1.3 }
.value span { color: var(--soft) }
.track { position: relative; height: .9rem; background: var(--track) }
.track i, .track b { position: absolute; top: 0; bottom: 0 }
.track .ours { background: var(--ours) } .track .slower { background: var(--slower) }
.track .peer { background: var(--peer) }
.track b { width: 2px; margin-left: -1px; background: var(--text) }
.track b.floor { background: var(--floor); top: -.15rem; bottom: -.15rem }
.legend i { display: inline-block; width: .9rem; height: .6rem; margin: 0 .3rem 0 .8rem }
.legend b { display: inline-block; width: 2px; height: .9rem; margin: 0 .4rem 0 .8rem;
  vertical-align: middle }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--rule); white-space: nowrap }
tr.ours td { font-weight: 600 } tr.failed td { color: var(--slower) }
img { max-width: 100%; margin: 1rem 0 } pre { overflow-x: auto }
@media (max-width: 40rem) { .bar { grid-template-columns: 1fr; padding: .35rem 0 }
  dl { grid-template-columns: 1fr } dd { margin-bottom: .3rem } }
"""


def page(results: Results, pictures: Sequence[Path], sections: dict[str, str] | None = None) -> str:
    """The report as one HTML document, pictures inside it.

    Args:
        results: The run.
        pictures: PNG files.
        sections: Further parts, preformatted text by title.
    """
    device = escape(results.environment["device"])
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>gptkern bench: {device}</title>",
        f"<style>{_STYLE}</style><h1>gptkern bench</h1>",
        _facts(results),
        _speed_section(results),
        *map(_picture, pictures),
        _time_section(results),
        "<h2>All measurements</h2>",
        _table(results),
        *(f"<h2>{escape(title)}</h2><pre>{escape(text)}</pre>" for title, text in (sections or {}).items()),
        "</html>",
    ]
    return "\n".join(part for part in parts if part)


def _facts(results: Results) -> str:
    where, ceilings = results.environment, results.ceilings
    versions = where["versions"]
    facts = {
        "Device": where["device"],
        "Measured": where["time"],
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Commit": where["commit"] or f"none: gptkern {versions.get('gptkern', '')} as installed",
        "Copy ceiling": f"{ceilings.copy / 1e9:.4g} GB/s, read + written",
        "Matrix ceilings": ", ".join(f"{n} {r / 1e12:.3g} TFLOP/s" for n, r in ceilings.matmul.items()),
    }
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


def _speed_section(results: Results) -> str:
    """A bar a problem: how many times as fast as the best peer, the fastest problem first."""
    found = speeds(results)
    if not found:
        return ""
    values = [0.9, 1.1, *(speed.ratio for speed in found)]
    values += [speed.at_floor for speed in found if speed.at_floor is not None]
    low, high = math.log2(min(values)), math.log2(max(values))

    def place(value: float) -> float:
        """Percent from the left; each doubling takes the same width."""
        return 100 * (math.log2(value) - low) / (high - low)

    bars = "\n".join(_speed_bar(speed, place) for speed in found)
    return (
        "<h2>Speed relative to the best peer</h2>"
        "<p>Right of the peer's line gptkern is faster, left of it slower; each doubling takes the same "
        "width. The floor is the speed at which the work would run at this machine's measured copy or matrix "
        "rate: work that stays in a cache may pass it.</p>"
        '<p class=legend><i style="background:var(--ours)"></i>faster'
        '<i style="background:var(--slower)"></i>slower<b style="background:var(--text)"></b>the best peer'
        f'<b style="background:var(--floor)"></b>floor</p>\n{bars}'
    )


def _speed_bar(speed: Speed, place: Callable[[float], float]) -> str:
    peer = place(1.0)
    low, high = sorted((peer, place(speed.ratio)))
    kind = "ours" if speed.ratio >= 1 else "slower"
    floor = "" if speed.at_floor is None else f'<b class=floor style="left:{place(speed.at_floor):.1f}%"></b>'
    value = (
        f"<strong>{speed.ratio:.2f} x</strong> <span>{seconds_text(speed.ours)}, "
        f"{escape(speed.peer_name)} {seconds_text(speed.peer)}</span>"
    )
    bar = f'<i class={kind} style="left:{low:.1f}%;width:{max(high - low, 0.3):.1f}%"></i>'
    return _bar(speed.title, value, f'{bar}<b style="left:{peer:.1f}%"></b>{floor}')


def _time_section(results: Results) -> str:
    """Every provider's time, the fastest first, a group a problem; the best problems' groups first."""
    parts = []
    for title, rows, floor in times(results):
        longest = max(seconds for _, seconds in rows)
        mark = "" if not floor else f'<b class=floor style="left:{min(100 * floor / longest, 100):.1f}%"></b>'
        parts.append(f"<h3>{escape(title)}</h3>")
        for provider, seconds in rows:
            kind = "ours" if provider == OURS else "peer"
            track = f'<i class={kind} style="left:0;width:{100 * seconds / longest:.1f}%"></i>{mark}'
            parts.append(_bar(provider, f"<strong>{seconds_text(seconds)}</strong>", track))
    if not parts:
        return ""
    head = "<h2>Times</h2><p>Medians, the shorter the better; the red line is the floor.</p>"
    return "\n".join([head, *parts])


def _bar(what: str, value: str, track: str) -> str:
    return (
        f"<div class=bar><div class=what>{escape(what)}</div>"
        f"<div><div class=value>{value}</div><div class=track>{track}</div></div></div>"
    )


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'


def _table(results: Results) -> str:
    body = []
    for line in lines(results):
        kind = "failed" if line.row.problem else "ours" if line.row.provider == OURS else ""
        body.append(
            f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells(line)) + "</tr>"
        )
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
