"""Persistent decode steps through the executor: all layers in one cooperative launch, with few programs.

    python tests/ptx/ptx_steps.py ARCH MODEL...

For each model the logits of a step are compared with the reference's. Prints a line of JSON for each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import ptx_recorded
import torch

from gptkern import GPT, backend
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.persistent import PersistentExecutor
from gptkern.ops import _launch
from gptkern.quantization import Quantization
from gptkern.quantize import quantize_model
from gptkern.testing.ptx.parse import parse

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_persistent_step import filled, make_kin, make_model

PROGRAMS = 3
LENGTHS = [7, 1, 4]
_CPU = torch.device("cpu")


def made(name: str) -> GPT:
    """A model of one or two layers, by its family or by the format of its matrices."""
    torch.manual_seed(0)
    if name == "gpt2":
        return make_model(_CPU, torch.bfloat16)
    if name == "wide":  # k in parts, which the last program adds up
        return make_model(_CPU, torch.bfloat16, n_layer=1, n_embd=160)
    if name in ("int8", "int4", "fp8"):
        model = make_kin("llama", _CPU, torch.bfloat16, num_hidden_layers=1, intermediate_size=128)
        options = {"group_size": 32} if name == "int4" else {}
        quantize_model(model, Quantization.make(model.config, name, **options))
        return model
    family = {"llama": "llama", "qwen3": "qwen3, normed heads wider than width / heads"}[name]
    return make_kin(family, _CPU, torch.bfloat16, num_hidden_layers=1)


MODELS = ("gpt2", "wide", "llama", "qwen3", "int8", "int4", "fp8")


def step(name: str, arch: int) -> tuple[ptx_recorded.Recorded, torch.Tensor, torch.Tensor]:
    """(the one launch, its logits, the reference's)."""
    model, tokens = made(name), torch.tensor([3, 1, 4])
    caches = [filled(model, LENGTHS) for _ in range(2)]
    with backend("reference"):
        expected = GraphExecutor(model, caches[0])(tokens)
    logits: list[torch.Tensor] = []

    # The kernel reaches weights, and tables of angles, by their addresses.
    also = [item.detach() for item in (*model.parameters(), *model.buffers())]

    def call() -> None:
        executor = PersistentExecutor(model, caches[1])
        assert executor._program is not None
        also.extend(item.detach() for item in executor._program.tensors())
        logits.append(executor(tokens))

    with mock.patch.object(_launch, "multiprocessors", return_value=PROGRAMS), torch.no_grad():
        (launch,) = ptx_recorded.recorded(call, arch, also)
    return launch, logits[0], expected


def failure(name: str, arch: int, forms: set[str]) -> str:
    """The reason why a step fails; empty if it does not. ``forms`` gets those of its instructions."""
    try:
        launch, found, expected = step(name, arch)
        forms.update(instruction.opcode for instruction in parse(launch.text).instructions)
        # The reference rounds weights of few bits, scaled, to bf16; the kernel scales whole sums. Its logits
        # are those of the interpreted kernel to the bit.
        tolerance = 0.08 if name in ("int8", "int4") else 0.03
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    except (Exception, AssertionError) as error:  # whatever it is, it is this step's
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    """The command."""
    arch, *models = sys.argv[1:]
    for name in models:
        row: dict[str, Any] = {"op": "decode_step", "case": name, "kernels": {"persistent_step_kernel": 1}}
        forms: set[str] = set()
        why = failure(name, int(arch), forms)
        print(json.dumps(row | {"forms": sorted(forms), "failure": why}), flush=True)


if __name__ == "__main__":
    main()
