"""The benchmark suite: measure, compare, see. ``gptkern bench`` is its command.

``run_suites`` measures, ``write`` writes the report, ``load`` reads one's results.
"""

from typing import TYPE_CHECKING

from gptkern._lazy import lazily

if TYPE_CHECKING:
    from gptkern.bench.results import load
    from gptkern.bench.run import Results
    from gptkern.bench.session import run_suites, write

_HOMES = {
    "Results": "gptkern.bench.run",
    "load": "gptkern.bench.results",
    "run_suites": "gptkern.bench.session",
    "write": "gptkern.bench.session",
}

__all__ = ["Results", "load", "run_suites", "write"]

__getattr__, __dir__ = lazily(__name__, _HOMES)
