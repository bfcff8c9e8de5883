"""What a GPU would launch for models and ops, recorded without one: the contents of a pack.

Launches are recorded from ``generate`` over batches and prompts that meet every specialisation: one row and
several, lengths that 16 divides and others. Nothing is computed: small results are made zero, so that the
host's part of generation has numbers to go on with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gptkern.gpt import GPT
from gptkern.ops import _cases, _launch

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
    context = model.config.n_positions
    for batch in BATCHES:
        for prompt in PROMPTS:
            if prompt + _NEW <= context:
                ids = torch.zeros(batch, prompt, dtype=torch.long)
                with recorded(arch) as launches:
                    model.generate(ids, max_new_tokens=_NEW, eos_token_id=None)
                yield from launches
