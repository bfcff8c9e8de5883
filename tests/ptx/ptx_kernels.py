"""Small calls of ops through the executor: values and gradients by the measure that the ops promise.

    python tests/ptx/ptx_kernels.py ARCH [--most N] OP...

Needs a process in which kernels are compiled, not interpreted. Prints a line of JSON for each call.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

import torch

from gptkern import backend, testing
from gptkern.ops import _cases, _launch
from gptkern.testing.ptx.kernels import executed


def failure(case: _cases.Case, dtype: torch.dtype, arch: int, seen: Counter[str]) -> str:
    """The reason why a call fails; empty if it does not."""

    def done(launch: _launch.Launch) -> None:
        seen[launch.name] += 1

    call = case.make(torch.device("cpu"), dtype)
    with backend("reference"):
        plain = testing._run(case.op, call)
        try:
            exact = testing._run(case.op, testing._double(call))
        except (TypeError, ValueError):  # a step with a cache has tables that stay float32
            exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in plain]
    try:
        with executed(arch, done=done):
            found = testing._run(case.op, call)
        for index, (a, b, c) in enumerate(zip(found, plain, exact, strict=True)):
            testing.assert_accurate(a, b, c, f"tensor {index} of results and gradients")
    except (Exception, AssertionError) as error:  # whatever it is, it is this call's
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int)
    parser.add_argument("ops", nargs="+")
    parser.add_argument("--most", type=int, help="calls of an op")
    asked = parser.parse_args()
    for op in asked.ops:
        for case in _cases.checks(op)[: asked.most]:
            torch.manual_seed(0)
            seen: Counter[str] = Counter()
            why = failure(case, torch.bfloat16, asked.arch, seen)
            print(json.dumps({"op": op, "case": case.name, "kernels": seen, "failure": why}), flush=True)


if __name__ == "__main__":
    main()
