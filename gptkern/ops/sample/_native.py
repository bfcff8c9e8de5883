"""The extension's calls: tensors in, addresses out. Whoever calls has checked the arguments."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any

import torch

from gptkern.ops import _dispatch, _launch
from gptkern.ops.sample.params import SamplerState, SamplingParams


def _extension() -> Any:
    try:
        return importlib.import_module("gptkern._C")
    except ImportError:  # a source tree that was never built
        return None


_C = _extension()

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# csrc/arguments.h
KEEP_STATE, COMMIT, COMMIT_ONLY = 0, 1, 2
NAN, INFINITE, NOTHING_ALLOWED, NEEDS_COUNTS, BAD_TOKEN_ID, BAD_DRAFT = 1, 2, 3, 16, 17, 18

_warned = False


def serves(logits: torch.Tensor) -> bool:
    """Whether the extension runs on these logits; where it is missing, the reference does, and says so."""
    global _warned
    if _dispatch._backend == "reference":
        return False
    if _C is not None and (_C.has_cuda or logits.device.type != "cuda"):
        return True
    missing = "gptkern._C is not built" if _C is None else "gptkern._C was built without CUDA"
    if os.environ.get("GPTKERN_STRICT") == "1":
        raise RuntimeError(f"sample: {missing}, and GPTKERN_STRICT=1 allows no fallback")
    if not _warned:
        _warned = True
        warnings.warn(f"sample: {missing}; sampling falls back to plain PyTorch, which is slow", stacklevel=3)
    return False


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _width(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[1]


def _stream_and_workspace(logits: torch.Tensor, rows: int, state: SamplerState | None) -> tuple[int, int]:
    """What a call on CUDA needs besides its tensors; the workspace is kept in the state."""
    needed = _C.workspace_bytes(rows, logits.shape[-1])
    workspace = None if state is None else state.workspace
    if workspace is None or workspace.numel() < needed or workspace.device != logits.device:
        workspace = torch.empty(needed, dtype=torch.uint8, device=logits.device)
        if state is not None:
            state.workspace = workspace
    return torch.cuda.current_stream(logits.device).cuda_stream, workspace.data_ptr()


def sample(
    logits: torch.Tensor,
    params: SamplingParams,
    state: SamplerState,
    width: int,
    commit: int,
    *,
    status: torch.Tensor,
    tokens: torch.Tensor | None = None,
    logprobs: torch.Tensor | None = None,
    top_tokens: torch.Tensor | None = None,
    top_logprobs: torch.Tensor | None = None,
    probs: torch.Tensor | None = None,
    draft_tokens: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
    accepted: torch.Tensor | None = None,
) -> int:
    """Sample, verify drafts or write distributions: the first bad row on the CPU, -1 if none and on CUDA."""
    on_cuda = logits.device.type == "cuda"
    shape = logits.shape
    stream, workspace = _stream_and_workspace(logits, shape[0], state) if on_cuda else (0, 0)
    with _launch.on_device(logits):
        bad: int = _C.sample(
            on_cuda, stream, workspace, torch.get_num_threads(), commit,
            DTYPES[logits.dtype], shape[0], 1 if len(shape) == 2 else shape[1], shape[-1],
            logits.stride(0), 0 if len(shape) == 2 else logits.stride(1), width,
            logits.data_ptr(), params.values.data_ptr(), state.counters.data_ptr(), _pointer(state.counts),
            _pointer(params.bias_ids), _pointer(params.bias_values), _width(params.bias_ids),
            _pointer(params.banned_ids), _width(params.banned_ids),
            _pointer(params.eos_ids), _width(params.eos_ids),
            _pointer(params.bitmask), _width(params.bitmask),
            _pointer(tokens), _pointer(logprobs), _pointer(top_tokens), _pointer(top_logprobs),
            status.data_ptr(), _pointer(probs),
            _pointer(draft_tokens), _pointer(draft_probs), _pointer(accepted),
        )  # fmt: skip
    return bad


def top_k(
    logits: torch.Tensor, k: int, tokens: torch.Tensor, logprobs: torch.Tensor, status: torch.Tensor
) -> int:
    """The k most likely tokens of each row of ``logits`` ``(rows, vocab)``; returns as :func:`sample`."""
    on_cuda = logits.device.type == "cuda"
    rows, vocab = logits.shape
    stream, workspace = _stream_and_workspace(logits, rows, None) if on_cuda else (0, 0)
    with _launch.on_device(logits):
        bad: int = _C.top_k(
            on_cuda, stream, workspace, torch.get_num_threads(), DTYPES[logits.dtype], rows, vocab,
            logits.stride(0), k, logits.data_ptr(), tokens.data_ptr(), logprobs.data_ptr(), status.data_ptr(),
        )  # fmt: skip
    return bad
