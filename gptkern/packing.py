"""The launches of models and ops on a GPU, recorded without one: the contents of a pack.

Launches are recorded from ``generate`` over batches and prompts that meet every specialisation: one row and
several, lengths that 16 divides and others. Nothing is computed: small results are made zero, so that the
host's part of generation has numbers to go on with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gptkern.config import GPTConfig
from gptkern.gpt import GPT
from gptkern.ops import _cases, _launch
from gptkern.quantization import Quantization
from gptkern.quantize import quantize_model

BATCHES = (1, 2, 3, 8, 16)
PROMPTS = (1, 7, 16, 33, 160)
_NEW = 3
# Results up to this size and of these dtypes are read on the host, or by what reads them next.
_ZEROED, _ZEROED_DTYPES = 1 << 23, (torch.float32, torch.float16, torch.bfloat16, torch.int64)


@contextmanager
def recorded(arch: int) -> Iterator[list[_launch.Launch]]:
    """Collect what CPU tensors would launch on a GPU of ``arch``; the launches' small results are zero."""
    found: list[_launch.Launch] = []

    def observer(launch: _launch.Launch) -> bool:
        found.append(launch)
        for value in launch.args:
            if isinstance(value, torch.Tensor) and value.dtype in _ZEROED_DTYPES and value.numel() <= _ZEROED:
                value.detach().zero_()
        return False

    with _launch.record(arch), _launch.observe(observer):
        yield found


def op_launches(arch: int) -> Iterator[_launch.Launch]:
    """Those of every op's cases, gradients included."""
    for op in _cases.ops():
        for case in _cases.cases(op):
            if case.archs is None or arch in case.archs:
                for dtype in case.dtypes:
                    yield from _cases.record_case(case, dtype, arch)


def model_launches(model: GPT, arch: int) -> Iterator[_launch.Launch]:
    """Those of ``model.generate``."""
    context = model.spec.context
    for batch in BATCHES:
        for prompt in PROMPTS:
            if prompt + _NEW <= context:
                ids = torch.zeros(batch, prompt, dtype=torch.long)
                with recorded(arch) as launches:
                    model.generate(ids, max_new_tokens=_NEW, eos_token_id=None)
                yield from launches


# Kernels do not depend on the number of layers: one has them all.
_SIZES = {"gpt2": (12, 768), "gpt2-medium": (16, 1024), "gpt2-large": (20, 1280), "gpt2-xl": (25, 1600)}
_WEIGHTS = (None, "int8", "fp8", "int4")


def standard_launches(arch: int) -> Iterator[_launch.Launch]:
    """Those of the package's own pack: every op's cases, GPT-2's four sizes and the embedded model."""
    yield from op_launches(arch)
    yield from model_launches(GPT.from_pretrained("embedded", device="cpu"), arch)
    for heads, width in _SIZES.values():
        for weights in _WEIGHTS:
            model = GPT(GPTConfig(n_layer=1, n_head=heads, n_embd=width)).to(torch.bfloat16).eval()
            if weights is not None:
                quantize_model(model, Quantization.make(model.config, weights, None, None))
            yield from model_launches(model, arch)
