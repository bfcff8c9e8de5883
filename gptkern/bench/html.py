"""report.html: a run on one page that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from gptkern.bench.run import Results
from gptkern.bench.tables import HEADER, OURS, cells, lines

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd }
th { position: sticky; top: 0; background: #fff }
tr.ours td { font-weight: 600 }
tr.failed td { color: #a33 }
img { max-width: 100%; margin: 1rem 0 }
pre { overflow-x: auto }
dt { font-weight: 600 } dd { margin: 0 0 .4rem 0 }
"""


def page(results: Results, pictures: Sequence[Path], sections: dict[str, str] | None = None) -> str:
    """The report as one HTML document, pictures inside it.

    Args:
        sections: Further parts, preformatted text by title.
    """
    where, ceilings = results.environment, results.ceilings
    facts = {
        "Device": where["device"],
        "Measured": where["time"],
        "Versions": ", ".join(f"{name} {version}" for name, version in where["versions"].items()),
        "Commit": where["commit"] or "unknown",
        "Copy ceiling": f"{ceilings.copy / 1e9:.4g} GB/s, read + written",
        "Matrix ceilings": ", ".join(f"{n} {r / 1e12:.3g} TFLOP/s" for n, r in ceilings.matmul.items()),
    }
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>gptkern bench: {escape(where['device'])}</title>",
        f"<style>{_STYLE}</style><h1>gptkern bench</h1><dl>",
        *(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items()),
        "</dl>",
        *(_picture(path) for path in pictures),
        "<h2>All measurements</h2>",
        _table(results),
        *(f"<h2>{escape(title)}</h2><pre>{escape(text)}</pre>" for title, text in (sections or {}).items()),
        "</html>",
    ]
    return "\n".join(parts)


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
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
