"""results.json: every raw sample of a run, and where it was made."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptkern.bench.ceilings import Ceilings
from gptkern.bench.run import FORMAT, Results, Row
from gptkern.durable import write_file


def text(results: Results) -> str:
    """``results`` as JSON."""
    data = {
        "format": FORMAT,
        "environment": results.environment,
        "ceilings": asdict(results.ceilings),
        "rows": [asdict(row) for row in results.rows],
    }
    return json.dumps(data, indent=1) + "\n"


def save(results: Results, path: Path) -> None:
    """Write ``results`` whole or not at all."""
    write_file(path, text(results))


def load(path: Path) -> Results:
    """Read what ``save`` wrote; a folder stands for its ``results.json``.

    Raises:
        OSError: It cannot be read.
        ValueError: The file is not such a file; the message names it.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        data: Any = json.loads(path.read_text())
        if not isinstance(data, dict) or "format" not in data:
            raise ValueError("no format is named in it")
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, this version reads {FORMAT}")
        return Results(
            data["environment"], Ceilings(**data["ceilings"]), [Row(**row) for row in data["rows"]]
        )
    except (KeyError, TypeError, ValueError) as failure:
        raise ValueError(f"{path}: not a results file of gptkern bench: {failure}") from failure
