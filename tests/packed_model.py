"""What the tests of packs launch: cases of ops, and ``generate`` of a model that compiles in seconds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gptkern import packing
from gptkern.config import GPTConfig
from gptkern.gpt import GPT
from gptkern.ops import _cases
from gptkern.ops._launch import Launch
from gptkern.ops.pack.bare import bare


def model() -> GPT:
    """Fresh weights, which no launch reads."""
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=64, vocab_size=96, n_positions=48, bos_token_id=None, eos_token_id=None
    )
    return GPT(config).to(torch.bfloat16).eval()


def launches(arch: int, ops: list[str]) -> Iterator[tuple[str, Launch]]:
    """Every case of these ops in its first dtype, then the generation: (what launches it, the launch)."""
    for op in ops:
        for case in _cases.cases(op):
            if case.archs is None or arch in case.archs:
                for launch in _cases.record_case(case, case.dtypes[0], arch):
                    yield case.name, bare(launch)
    for launch in packing.model_launches(model(), arch):
        yield "generate", launch
