"""The extension's calls. It checks what it is given; which argument is at fault, ``checks`` says better."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from gptkern import _native as native
from gptkern.ops import _dispatch, _launch
from gptkern.ops.sample.params import SamplerState, SamplingParams

_warned = False


def serves(logits: torch.Tensor) -> bool:
    """Whether the extension runs on these logits; where it is missing, the reference does, and says so."""
    global _warned
    if _dispatch._backend == "reference":
        return False
    if native.extension is not None and (native.extension.has_cuda or logits.device.type != "cuda"):
        return True
    missing = "gptkern._C is not built" if native.extension is None else "gptkern._C was built without CUDA"
    if os.environ.get("GPTKERN_STRICT") == "1":
        raise RuntimeError(f"sample: {missing}, and GPTKERN_STRICT=1 allows no fallback")
    if not _warned:
        _warned = True
        warnings.warn(f"sample: {missing}; sampling falls back to plain PyTorch, which is slow", stacklevel=3)
    return False


def traced(logits: torch.Tensor) -> bool:
    """Whether nothing is to be computed, or not yet: tensors without memory, or a graph being traced."""
    return torch.compiler.is_compiling() or isinstance(logits, FakeTensor) or logits.is_meta


def _machine(logits: torch.Tensor, rows: int, state: SamplerState | None) -> dict[str, Any]:
    """Threads, and what a call on CUDA needs besides its tensors; the workspace is kept in the state."""
    threads = {"threads": torch.get_num_threads()}
    if not logits.is_cuda:
        return threads
    needed = native.extension.workspace_bytes(rows, logits.shape[-1])
    workspace = None if state is None else state.workspace
    if workspace is None or workspace.numel() < needed or workspace.device != logits.device:
        workspace = torch.empty(needed, dtype=torch.uint8, device=logits.device)
        if state is not None:
            state.workspace = workspace
    return threads | {
        "stream": torch.cuda.current_stream(logits.device).cuda_stream,
        "workspace": workspace,
    }


def sample(
    logits: torch.Tensor,
    params: SamplingParams,
    state: SamplerState,
    width: int,
    commit: int,
    **out: torch.Tensor | None,
) -> int:
    """Sample, verify drafts or write distributions: the first bad row on the CPU, -1 if none and on CUDA.

    ``out`` are the tensors that ``_C.sample`` writes, and the drafts where there are any.
    """
    with _launch.on_device(logits):
        bad: int = native.extension.sample(
            logits,
            values=params.values,
            bias_ids=params.bias_ids,
            bias_values=params.bias_values,
            banned_ids=params.banned_ids,
            eos_ids=params.eos_ids,
            bitmask=params.bitmask,
            counters=state.counters,
            counts=state.counts,
            width=width,
            commit=commit,
            **out,
            **_machine(logits, logits.shape[0], state),
        )
    return bad


def top_k(
    logits: torch.Tensor, k: int, tokens: torch.Tensor, logprobs: torch.Tensor, status: torch.Tensor
) -> int:
    """The k most likely tokens of each row of ``logits`` ``(rows, vocab)``; returns as :func:`sample`."""
    with _launch.on_device(logits):
        bad: int = native.extension.top_k(
            logits,
            k,
            tokens=tokens,
            logprobs=logprobs,
            status=status,
            **_machine(logits, logits.shape[0], None),
        )
    return bad
