"""Small calls of ops through the executor: values and gradients by the measure that the ops promise.

    python tests/ptx/ptx_kernels.py ARCH [--most N] OP[:BEGIN]...

Needs a process in which kernels are compiled, not interpreted. BEGIN chooses the calls whose names begin
so. Prints a line of JSON for each call.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any
from unittest import mock

import torch

from gptkern import backend, testing
from gptkern.ops import _cases, _launch, decode_attention, gated_mlp, gelu_mlp, layer_norm, rms_norm
from gptkern.ops._types import FP8, RmsNorm
from gptkern.ops.decode_attention.cases import _append, _attend
from gptkern.ops.decode_attention.op import append_kv
from gptkern.ops.decode_linear import decode_linear, decode_qkv, quantize
from gptkern.ops.decode_linear.cases import _qkv
from gptkern.ops.gelu_mlp.cases import inputs as mlp_inputs
from gptkern.ops.linear import linear_act
from gptkern.ops.linear_cross_entropy import linear_cross_entropy
from gptkern.ops.linear_cross_entropy.cases import _inputs as loss_inputs
from gptkern.testing.ptx import kernels
from gptkern.testing.ptx.launch import execute
from gptkern.testing.ptx.parse import parse


def _wide_rows(device: torch.device, dtype: torch.dtype) -> _cases.Call:
    def new(*shape: int) -> torch.Tensor:
        return _cases.tensor(*shape, device=device, dtype=dtype)

    return _cases.Call((new(2, 65535), new(65535), new(65535)))


def _many_rows(norm: Any, width: int) -> _cases.Make:
    def make(device: torch.device, dtype: torch.dtype) -> _cases.Call:
        x = _cases.tensor(70, width, device=device, dtype=dtype)
        weights = [_cases.tensor(width, device=device, dtype=dtype) for _ in range(1 + (norm is layer_norm))]
        return _cases.Call((x, *weights))

    return make


def _splits(device: torch.device, dtype: torch.dtype) -> _cases.Call:
    q, k, v = (torch.randn(shape, device=device).to(dtype) for shape in ((2, 4, 20), *[(40, 16, 2, 20)] * 2))
    table = torch.arange(40, dtype=torch.int32, device=device).view(2, 20)
    return _cases.Call((q, k, v, table, torch.tensor([300, 130], dtype=torch.int32, device=device)))


def _few_bits(rows: int, gated: bool, **options: Any) -> _cases.Make:
    """A matrix in few bits: gate and up behind a norm, or with a residual, k in parts."""

    def make(device: torch.device, dtype: torch.dtype) -> _cases.Call:
        def new(*shape: int) -> torch.Tensor:
            return _cases.tensor(*shape, device=device, dtype=dtype, requires_grad=False, scale=0.3)

        weight = quantize(new(66 if gated else 33, 256), **options)
        if gated:
            more = {"norm": RmsNorm(new(256), 1e-5), "activation": "silu", "gated": True}
            return _cases.Call((new(rows, 256), weight), more)
        return _cases.Call((new(rows, 256), weight, new(33)), {"residual": new(rows, 33)})

    return make


def _tiles(device: torch.device, dtype: torch.dtype) -> _cases.Call:
    sizes = ((70, 256), (512, 256), (512,))
    return _cases.Call(tuple(_cases.tensor(*size, device=device, dtype=dtype, scale=0.3) for size in sizes))


# Calls on a GPU of two multiprocessors: a few tiles are enough for the kernels of many.
MANY_TILES = "many tiles"

# fp8 is converted from sm_89 on.
FORMATS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "int8": ({"format": "int8"}, (80, 90)),
    "fp8": ({"format": "fp8"}, (90,)),
    "int4, groups of 64": ({"format": "int4", "group_size": 64}, (80, 90)),
    "int4, groups of 32, zeros": ({"format": "int4", "group_size": 32, "zero_point": True}, (80, 90)),
}
# Calls beside the ops' checks, for what these do not reach: many tiles, rows in chunks, sequences in splits,
# few bits of weights and of caches.
MORE = {
    "linear": [_cases.Case(MANY_TILES, linear_act, _tiles)],
    "gelu_mlp": [_cases.Case(MANY_TILES, gelu_mlp, mlp_inputs(265, 264, 528), archs=(90,))],
    "gated_mlp": [_cases.Case(MANY_TILES, gated_mlp, mlp_inputs(130, 264, 272, gate=2), archs=(90,))],
    "linear_cross_entropy": [
        _cases.Case(MANY_TILES, linear_cross_entropy, loss_inputs(260, 256, 300), archs=(90,))
    ],
    "layer_norm": [
        _cases.Case("rows in chunks", layer_norm, _wide_rows),
        _cases.Case("70 rows", layer_norm, _many_rows(layer_norm, 40)),
    ],
    "rms_norm": [_cases.Case("70 rows", rms_norm, _many_rows(rms_norm, 40))],
    "decode_attention": [
        _cases.Case("3 splits", decode_attention, _splits),
        _cases.Case("fp8", decode_attention, _attend(3, 4, 2, 24, 2, 16, fp8=True), archs=(90,)),
        _cases.Case("append, fp8", append_kv, _append(5, 2, 24, fp8=True), archs=(90,)),
    ],
    "decode_linear": [
        _cases.Case(f"{name}, {call}", decode_linear, _few_bits(*shape, **options), archs=archs)
        for name, (options, archs) in FORMATS.items()
        for call, shape in (("residual, 17 rows", (17, False)), ("gate and up, 3 rows", (3, True)))
    ]
    + [_cases.Case("qkv, fp8 cache", decode_qkv, _qkv(5, 64, 2, fp8=True), archs=(90,))],
}


# Calls that launch each kernel at least once.
ONCE = (
    "linear:gelu_tanh, 65",
    "linear:many tiles",
    "gelu_mlp:gelu_tanh, 33",
    "gelu_mlp:many tiles",
    "gated_mlp:silu, 33",
    "flash_attention:causal",
    "decode_linear:residual",
    "decode_linear:qkv, 5",
    "decode_attention:3 splits",
    "decode_attention:append",
    "decode_embed",
    "layer_norm:layer_norm (3, 17)",
    "layer_norm:rows in chunks",
    "rms_norm:rms_norm (3",
    "rotary:halves, partial, norm",
    "linear_cross_entropy:5 tokens",
    "linear_cross_entropy:many tiles",
)


def calls(op: str, arch: int | None = None) -> list[_cases.Case]:
    """The small calls of an op, on an architecture where one is given."""
    every = _cases.checks(op) + MORE.get(op, [])
    return [case for case in every if arch is None or case.archs is None or arch in case.archs]


def _tensors(case: _cases.Case, dtype: torch.dtype, exact: bool = False) -> list[torch.Tensor]:
    """Results and gradients of a call, then its floating arguments, which it may have written."""
    torch.manual_seed(0)
    call = case.make(torch.device("cpu"), dtype)
    call = testing._double(call) if exact else call
    found = testing._run(case.op, call)
    given = _cases.tensors((call.args, call.kwargs))
    return found + [tensor for tensor in given if tensor.is_floating_point() and not tensor.requires_grad]


def _compare(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    if found.dtype != FP8:
        return testing.assert_accurate(found, plain, exact, what)
    # Numbers that differ in bf16's last bit may be rounded to neighbours of e4m3.
    torch.testing.assert_close(found.float(), plain.float(), rtol=2**-3, atol=2**-9)
    assert (found.view(torch.uint8) != plain.view(torch.uint8)).float().mean() < 0.02, what


def failure(
    case: _cases.Case, dtype: torch.dtype, arch: int, seen: Counter[str], forms: set[str] | None = None
) -> str:
    """The reason why a call fails; empty if it does not. ``forms`` gets those of its instructions."""

    def done(launch: _launch.Launch) -> None:
        seen[launch.name] += 1

    def noted(ptx: str, *args: Any, **options: Any) -> None:
        if forms is not None:
            forms.update(instruction.opcode for instruction in parse(ptx).instructions)
        execute(ptx, *args, **options)

    processors = 2 if case.name == MANY_TILES else 132
    with backend("reference"):
        plain = _tensors(case, dtype)
        try:
            exact = _tensors(case, dtype, exact=True)
        except (TypeError, ValueError):  # a step with a cache has tables that stay float32
            exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in plain]
    try:
        with (
            mock.patch.object(kernels, "execute", noted),
            mock.patch.object(_launch, "multiprocessors", return_value=processors),
            kernels.executed(arch, done=done),
        ):
            found = _tensors(case, dtype)
        for index, (a, b, c) in enumerate(zip(found, plain, exact, strict=True)):
            _compare(a, b, c, f"tensor {index} of results, gradients and arguments")
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
    for word in asked.ops:
        op, _, begin = word.partition(":")
        for case in [case for case in calls(op, asked.arch) if case.name.startswith(begin)][: asked.most]:
            seen: Counter[str] = Counter()
            forms: set[str] = set()
            why = failure(case, torch.bfloat16, asked.arch, seen, forms)
            row = {"op": op, "case": case.name, "kernels": seen, "forms": sorted(forms), "failure": why}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
