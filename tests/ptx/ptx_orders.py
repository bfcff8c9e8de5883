"""Kernels of several blocks under many orders of these: no deadlock, no race, and the same bits.

    python tests/ptx/ptx_orders.py ARCH ORDERS NAME...

NAME is one of ``CALLS``, or a model of ``ptx_steps``. Prints a line of JSON for each such kernel.
"""

from __future__ import annotations

import json
import math
import sys

import ptx_recorded
import ptx_steps

from gptkern import backend

# name -> (op, the check whose call launches it)
CALLS = {
    "linear": ("linear", "gelu_tanh, 65 tokens"),
    "decode": ("decode_linear", "residual, 17 x 100 to 33"),
    "qkv": ("decode_linear", "qkv, 5 x 40"),
    "decode_attention": ("decode_attention", "3 splits"),
    "attention": ("flash_attention", "grouped"),
    "norm": ("layer_norm", "add_layer_norm"),
    "rotary": ("rotary", "halves, partial, norm"),
    "loss": ("linear_cross_entropy", "133 tokens"),
    "gated": ("gated_mlp", "ragged tiles"),
}


def launches(name: str, arch: int) -> list[ptx_recorded.Recorded]:
    """The launches of several blocks."""
    every = [ptx_steps.step(name, arch)[0]] if name in ptx_steps.MODELS else []
    every = every or ptx_recorded.of_check(*CALLS[name], arch)
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
