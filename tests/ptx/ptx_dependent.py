"""A decode step's launches, each begun before the one before it has ended, with and without their waits.

    python tests/ptx/ptx_dependent.py [CHANGE KERNEL]

CHANGE is ``removed`` (no ``griddepcontrol.wait`` in KERNEL) or ``late`` (it stands behind the first load).
Prints a line of JSON: the launches in their order, and the reason why the step fails, empty if it does not.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any
from unittest import mock

import torch

from gptkern import GPT, GPTConfig, backend
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.ops import _launch
from gptkern.testing.ptx import kernels
from gptkern.testing.ptx.launch import execute

WAIT = re.compile(r"^\s*griddepcontrol\.wait;", re.MULTILINE)
LOAD = re.compile(r"^[^\n/]*\b(?:ld\.global|cp\.async\.c)[^\n]*;$", re.MULTILINE)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8]]


def changed(ptx: str, change: str) -> str:
    """The text without its wait, or with the wait behind the load that follows it."""
    (wait,) = WAIT.finditer(ptx)
    without = ptx[: wait.start()] + ptx[wait.end() :]
    if change == "removed":
        return without
    load = LOAD.search(without, wait.start())
    assert load is not None
    return without[: load.end()] + wait.group(0) + without[load.end() :]


def make_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=61, n_positions=64, n_layer=2, n_head=2, n_embd=64))
    return model.to(torch.bfloat16).eval()


def prefilled(model: GPT) -> KVCache:
    cache = KVCache.for_config(
        model.config, max_seqs=3, max_len=40, page_size=16, dtype=model.dtype, device=model.device
    )
    with torch.no_grad(), backend("reference"):
        for prompt in PROMPTS:
            (sequence,) = cache.allocate()
            step = cache.extend([len(prompt)], [sequence])
            model.transformer(torch.tensor(prompt), step.positions, step)
            step.commit()
    return cache


def failure(change: str, kernel: str, launched: list[str]) -> str:
    """The reason why a step fails."""

    def done(launch: _launch.Launch) -> None:
        launched.append(launch.name)

    def text(ptx: str, *args: Any, **options: Any) -> None:
        execute(changed(ptx, change) if kernel and f"entry {kernel}(" in ptx else ptx, *args, **options)

    model = make_model()
    tokens = torch.tensor([7, 8, 9])
    with backend("reference"):
        expected = GraphExecutor(model, prefilled(model))(tokens)
    step = GraphExecutor(model, prefilled(model))
    try:
        with mock.patch.object(kernels, "execute", text), kernels.executed(90, done=done):
            found = step(tokens)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    except (Exception, AssertionError) as error:  # whatever it is, it is this step's
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    """The command."""
    change, kernel = sys.argv[1:] or ("", "")
    launched: list[str] = []
    why = failure(change, kernel, launched)
    print(json.dumps({"launches": launched, "failure": why}))


if __name__ == "__main__":
    main()
