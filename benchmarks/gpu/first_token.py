"""The seconds from a process's start to its first token, with Triton or where no Triton can be imported.

    python benchmarks/gpu/first_token.py BEGAN cuda [--no-triton]

BEGAN is ``time.monotonic()`` of the process that started this one. Prints a line of JSON: the seconds, the
tokens, and the kernels that Triton compiled because no pack held them.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.abc import MetaPathFinder
from typing import Any

PROMPT, NEW = "First Citizen:", 24


class NoTriton(MetaPathFinder):
    """Refuses every import of Triton."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """An error for Triton, nothing for others."""
        if name.partition(".")[0] == "triton":
            raise ImportError("Triton is hidden")


def main() -> None:
    """The command."""
    began, device = float(sys.argv[1]), sys.argv[2]
    if "--no-triton" in sys.argv:
        sys.meta_path.insert(0, NoTriton())
    from gptkern import GPT
    from gptkern.ops.pack.loader import loader

    stream = iter(GPT.from_pretrained(device=device).stream(PROMPT, max_new_tokens=NEW, do_sample=False))
    text = next(stream)
    seconds = time.monotonic() - began
    told = {"seconds": seconds, "text": text + "".join(stream), "compiled": sorted(loader().compiled)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
