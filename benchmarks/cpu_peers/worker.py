"""A peer's side of ``bench_cpu_peers.py``: a process that generates when it is asked to, and times it.

A worker is a script that is run by the peer's interpreter with the folder of the models, a format and a
number of threads. It asks for nothing but the standard library and the peer's own packages. A line of JSON
for each request comes in and goes out:

    {"ids": [[...], ...], "new": 8}   ->   {"seconds": 0.1, "tokens": [[...], ...]}

Before the first of them it says ``{"versions": {...}}``, or ``{"missing": "why"}`` and ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

# The new tokens of each row, greedy, ``new`` of them whatever they are.
Generate = Callable[[list[list[int]], int], list[list[int]]]
# From the folder of the models, the format and the number of threads.
Open = Callable[[Path, str, int], Generate]


class Missing(Exception):
    """The peer does not have a format, or does not work here: why."""


def serve(make: Open, *packages: str) -> None:
    """Answer requests until there are no more; ``packages`` are those whose versions are told."""
    # Libraries print to the standard output: the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    folder, form, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    try:
        generate = make(folder, form, threads)
        answer(versions={name: version(name) for name in packages})
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return answer(
            missing=lines[0] if isinstance(error, Missing) else f"{type(error).__name__}: {lines[0]}"
        )
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        tokens = generate(request["ids"], request["new"])
        answer(seconds=time.perf_counter() - start, tokens=tokens)
