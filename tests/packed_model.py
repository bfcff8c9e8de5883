"""The launches in tests of packs: cases of ops, training, ``generate`` of a model that compiles soon."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gptkern import packing
from gptkern.config import GPTConfig
from gptkern.gpt import GPT
from gptkern.ops._launch import Launch
from gptkern.train.settings import PRECISIONS


def model() -> GPT:
    """Fresh weights, which no launch reads."""
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=64, vocab_size=96, n_positions=48, bos_token_id=None, eos_token_id=None
    )
    return GPT(config).to(torch.bfloat16).eval()


def launches(arch: int, parts: list[str]) -> Iterator[tuple[str, Launch]]:
    """Every case of the ops among ``parts``, then generation: (what launches it, the launch).

    A part "training" is training of the embedded model's shape, "embedded" its generation; without that one
    the generation is of a small model.
    """
    ops = [part for part in parts if part not in ("training", "embedded")]
    for launch in packing.op_launches(arch, ops):
        yield "a case", launch
    if "training" in parts:
        config = GPT.from_pretrained("embedded", device="cpu").config
        for precision in PRECISIONS:
            for launch in packing.training_launches(GPT(config), arch, precision):
                yield f"training in {precision}", launch
    generating = GPT.from_pretrained("embedded", device="cpu") if "embedded" in parts else model()
    for launch in packing.model_launches(generating, arch):
        yield "generate", launch
