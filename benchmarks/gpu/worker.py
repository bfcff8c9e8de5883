"""The process in which a session's stages run: stages come on standard input, events go to standard output.

Started by ``session.py``; what anything prints goes to standard error, which is the session's log.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any


def main() -> None:
    """Serve stages until standard input ends."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a stage prints is log

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    dry = "--dry" in sys.argv
    import torch
    from compilations import counting, triton_key

    from gptkern.bench import environment

    if not dry and not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device: torch sees none (--dry tries the code on a CPU)")
    device = torch.device("cpu" if dry else "cuda")
    tell(event="where", where=environment.describe(device) | {"triton_key": triton_key()})
    for line in sys.stdin:
        asked = json.loads(line)
        for name in asked["stages"]:
            kernels: Counter[str] = Counter()
            with counting(kernels):
                state = _run(name, device, dry, asked["seconds"], tell)
            if kernels.total():
                note = f"{kernels['compiled']} compiled, {kernels['found']} found in the cache"
                tell(event="row", row=_row(name="kernels", note=note))
            tell(event="end", state=state)


def _run(name: str, device: Any, dry: bool, seconds: float, tell: Callable[..., None]) -> str:
    from plan import STAGES
    from stages import Scope

    module, function = STAGES[name][0].split(":")
    # Rows that a stage has not come to are better missing than the stage killed.
    scope = Scope(device, dry, time.monotonic() + 0.9 * seconds)
    try:
        for row in getattr(importlib.import_module(module), function)(scope):
            tell(event="row", row=asdict(row))
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().splitlines() or [""]
        tell(event="row", row=_row(name=name, ok=False, note=f"{type(error).__name__}: {first[0]}"))
        if "CUDA error" in str(error) or "illegal" in str(error):
            tell(event="end", state="failed")
            os._exit(1)  # the context is gone; the session starts another process
        return "failed"
    return "done"


def _row(**fields: Any) -> dict[str, Any]:
    return {"ok": None, "value": None, "unit": "", "note": "", **fields}


if __name__ == "__main__":
    main()
