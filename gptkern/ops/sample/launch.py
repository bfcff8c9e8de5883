"""The extension's calls (``csrc/sampling/``), and the records of what they read and write.

The extension checks all that keeps it within the tensors; ``checks`` names the argument at fault first.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from gptkern import _native
from gptkern._native import COMMIT, COMMIT_ONLY, KEEP_STATE
from gptkern.cpu_threads import cpu_threads
from gptkern.ops import _dispatch, _launch
from gptkern.ops.sample.checks import first_bad, refuse
from gptkern.ops.sample.params import SamplerState, SamplingParams


@dataclass
class Outputs:
    """The tensors that a call writes; those of other kinds of call are None.

    Attributes:
        status: ``(batch,)`` int32: 0, or the reason why the row could not be sampled.
        tokens: ``(batch,)`` int64, ``(batch, positions)`` where drafts are verified, ``(rows, k)`` for top-k.
        logprobs: ``(batch,)`` fp32, the tokens' log-softmax; ``(rows, k)`` for top-k.
        top_tokens, top_logprobs: ``(batch, max_logprobs)`` int64 and fp32.
        probs: ``(batch, vocab)`` fp32: the distribution is written and nothing drawn.
        accepted: ``(batch,)`` int64, the number of accepted draft tokens: drafts are verified.
    """

    status: torch.Tensor
    tokens: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    top_tokens: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    probs: torch.Tensor | None = None
    accepted: torch.Tensor | None = None


class Drafts(NamedTuple):
    """Drafted tokens to verify.

    Attributes:
        tokens: ``(batch, n)`` int64.
        probs: ``(batch, n, vocab)`` fp32, or None if the draft was certain.
        lengths: ``(batch,)`` int64: the drafted tokens of each row; None: n.
    """

    tokens: torch.Tensor
    probs: torch.Tensor | None
    lengths: torch.Tensor | None

    @classmethod
    def of(cls, tokens: torch.Tensor, probs: torch.Tensor | None, lengths: torch.Tensor | None) -> Drafts:
        """Drafts as a caller gives them, in the dtypes and strides that the extension reads."""
        return cls(
            tokens.long().contiguous(),
            None if probs is None else probs.contiguous(),
            None if lengths is None else lengths.long().contiguous(),
        )


class Machine(NamedTuple):
    """Threads of a CPU call; the stream's address and the workspace of a CUDA call."""

    threads: int
    stream: int = 0
    workspace: torch.Tensor | None = None


def sample_outputs(logits: torch.Tensor, max_logprobs: int | None) -> Outputs:
    """The outputs of a draw; None: log-probabilities are empty and not written."""
    batch, device = logits.shape[0], logits.device
    scored, width = (0, 0) if max_logprobs is None else (batch, max_logprobs)
    return Outputs(
        tokens=torch.empty(batch, dtype=torch.int64, device=device),
        logprobs=torch.empty(scored, dtype=torch.float32, device=device),
        top_tokens=torch.empty(scored, width, dtype=torch.int64, device=device),
        top_logprobs=torch.empty(scored, width, dtype=torch.float32, device=device),
        status=torch.empty(batch, dtype=torch.int32, device=device),
    )


def probs_outputs(logits: torch.Tensor) -> Outputs:
    """The outputs of a call that writes distributions."""
    return Outputs(
        probs=torch.empty(logits.shape, dtype=torch.float32, device=logits.device),
        status=torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device),
    )


def accept_outputs(target_logits: torch.Tensor) -> Outputs:
    """The outputs of a verification of drafts."""
    batch, positions, _ = target_logits.shape
    device = target_logits.device
    return Outputs(
        tokens=torch.empty(batch, positions, dtype=torch.int64, device=device),
        accepted=torch.empty(batch, dtype=torch.int64, device=device),
        status=torch.empty(batch, dtype=torch.int32, device=device),
    )


def top_k_outputs(logits: torch.Tensor, k: int) -> Outputs:
    """The outputs of a top-k call."""
    rows, device = logits.shape[0], logits.device
    return Outputs(
        tokens=torch.empty(rows, k, dtype=torch.int64, device=device),
        logprobs=torch.empty(rows, k, dtype=torch.float32, device=device),
        status=torch.empty(rows, dtype=torch.int32, device=device),
    )


_warned = False


def serves(logits: torch.Tensor) -> bool:
    """True if the extension runs on these logits. If it is missing, the reference runs, with one warning."""
    global _warned
    if _dispatch._backend == "reference":
        return False
    extension = _native.extension
    if extension is not None and (extension.has_cuda or logits.device.type != "cuda"):
        return True
    missing = "gptkern._C is not built" if extension is None else "gptkern._C was built without CUDA"
    if os.environ.get("GPTKERN_STRICT") == "1":
        raise RuntimeError(f"sample: {missing}, and GPTKERN_STRICT=1 allows no fallback")
    if not _warned:
        _warned = True
        warnings.warn(f"sample: {missing}; sampling falls back to plain PyTorch, which is slow", stacklevel=3)
    return False


def traced(logits: torch.Tensor) -> bool:
    """True if a call computes nothing, or not yet: tensors without memory, or a graph being traced."""
    return torch.compiler.is_compiling() or isinstance(logits, FakeTensor) or logits.is_meta


def _machine(logits: torch.Tensor, state: SamplerState | None) -> Machine:
    """The place where a call on ``logits`` runs; a state holds the workspace for the next call."""
    threads = cpu_threads()
    if not logits.is_cuda:
        return Machine(threads)
    needed = _native.extension.workspace_bytes(logits.shape[0], logits.shape[-1])
    workspace = None if state is None else state.workspace
    if workspace is None or workspace.numel() < needed or workspace.device != logits.device:
        workspace = torch.empty(needed, dtype=torch.uint8, device=logits.device)
        if state is not None:
            state.workspace = workspace
    return Machine(threads, torch.cuda.current_stream(logits.device).cuda_stream, workspace)


def sample(
    logits: torch.Tensor,
    params: SamplingParams,
    state: SamplerState,
    outputs: Outputs,
    commit: int,
    drafts: Drafts | None = None,
) -> int:
    """Sample, verify drafts or write distributions, as ``outputs`` says.

    Returns:
        On the CPU the first row that could not be sampled, or -1; on CUDA -1, and ``status`` tells later.
    """
    with _launch.on_device(logits):
        bad: int = _native.extension.sample(
            logits, params, state, outputs, drafts=drafts, commit=commit, machine=_machine(logits, state)
        )
    return bad


def prepared(
    logits: torch.Tensor, params: SamplingParams, state: SamplerState, outputs: Outputs
) -> Callable[[], int]:
    """``sample`` with a commit, on a CPU, of these very tensors in each call: their numbers are others."""
    machine = Machine(cpu_threads())
    return partial(_native.extension.sample, logits, params, state, outputs, commit=COMMIT, machine=machine)


def sample_and_commit(
    op: str,
    logits: torch.Tensor,
    params: SamplingParams,
    state: SamplerState,
    outputs: Outputs,
    validate: bool | None,
    drafts: Drafts | None = None,
) -> None:
    """Sample or verify drafts, and advance ``state``.

    With ``validate``, None being on for the CPU alone, a row that cannot be sampled raises and no state
    changes. The CPU path does so by itself. On CUDA a kernel cannot know of the other rows, so the commit is
    a second call, after the host has seen the statuses.
    """
    on_cuda = logits.device.type == "cuda"
    validate = not on_cuda if validate is None else validate
    two_calls = on_cuda and validate
    bad = sample(logits, params, state, outputs, KEEP_STATE if two_calls else COMMIT, drafts)
    if two_calls:
        bad = first_bad(outputs.status)
    if bad >= 0 and validate:
        refuse(op, logits, params, bad, int(outputs.status[bad]))
    if two_calls:
        sample(logits, params, state, outputs, COMMIT_ONLY)


def top_k(logits: torch.Tensor, k: int, outputs: Outputs) -> int:
    """The k most likely tokens of each row of ``logits`` ``(rows, vocab)``; returns as :func:`sample`."""
    machine = _machine(logits, None)
    with _launch.on_device(logits):
        bad: int = _native.extension.top_k(logits, k, outputs, machine=machine)
    return bad
