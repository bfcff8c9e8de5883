"""Kernels of several blocks under many orders of these: no deadlock, no race, and the same bits.

    python tests/ptx/ptx_orders.py ARCH ORDERS NAME...

NAME is one of ``CALLS`` or of ``STEPS``. Prints a line of JSON for each such kernel.
"""

from __future__ import annotations

import json
import math
import sys
from unittest import mock

import ptx_recorded
import ptx_steps

from gptkern import backend
from gptkern.ops import _launch

# name -> (op, the check whose call launches it, multiprocessors). Few of these give each program several
# tiles; sequences are split where there are many.
CALLS = {
    "linear": ("linear", "gelu_tanh, 65 tokens", 2),
    "linear, many tiles": ("linear", "many tiles", 2),
    "gelu": ("gelu_mlp", "gelu_tanh, 33", 2),
    "gated": ("gated_mlp", "ragged tiles", 2),
    "decode": ("decode_linear", "qkv, head norm, 3 x 140", 2),
    "qkv": ("decode_linear", "qkv, 5 x 40", 2),
    "few bits": ("decode_linear", "int4, groups of 32, zeros, residual", 2),
    "decode_attention": ("decode_attention", "3 splits", 132),
    "attention": ("flash_attention", "grouped", 2),
    "attention, several tiles": ("flash_attention", "head dim 128, packed, window", 2),
    "norm": ("layer_norm", "70 rows", 2),
    "rows in chunks": ("layer_norm", "rows in chunks", 2),
    "rms_norm": ("rms_norm", "70 rows", 2),
    "rotary": ("rotary", "halves, partial, norm", 2),
    "loss": ("linear_cross_entropy", "133 tokens", 2),
    "loss, many tiles": ("linear_cross_entropy", "many tiles", 2),
}
# Models of ``ptx_steps``.
STEPS = ("gpt2", "wide", "llama", "int8")


def launches(name: str, arch: int) -> list[ptx_recorded.Recorded]:
    """The launches of several blocks."""
    if name in STEPS:
        every = [ptx_steps.step(name, arch)[0]]
    else:
        op, begin, processors = CALLS[name]
        with mock.patch.object(_launch, "multiprocessors", return_value=processors):
            every = ptx_recorded.of_check(op, begin, arch)
    return [launch for launch in every if math.prod(launch.grid) > 1]


def main() -> None:
    """The command."""
    arch, orders = int(sys.argv[1]), int(sys.argv[2])
    for name in sys.argv[3:]:
        with backend("auto"):
            for launch in launches(name, arch):
                row = {"call": name, "kernel": launch.name, "arch": arch, "blocks": math.prod(launch.grid)}
                differ = ptx_recorded.orders_that_differ(launch, orders)
                print(json.dumps(row | {"orders": orders, "differ": differ}), flush=True)


if __name__ == "__main__":
    main()
