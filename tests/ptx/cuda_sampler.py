"""The CUDA sampler's kernels through the executor: compiled by nvcc, run on CPU tensors.

The structures are those of ``csrc/sampling/arguments.h``.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch

from gptkern._native import COMMIT, COMMIT_ONLY
from gptkern.ops import SamplerState, SamplingParams
from gptkern.ops.sample.launch import Drafts, Outputs
from gptkern.testing.ptx import execute
from gptkern.testing.ptx.counters import Counters
from gptkern.testing.ptx.parse import Instruction

CSRC = Path(__file__).parents[2] / "csrc"
THREADS, COMMITTERS = 512, 128
P, I32, I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class IdLists(ctypes.Structure):
    _fields_ = [("ids", P), ("width", I32)]


class SampleArguments(ctypes.Structure):
    _fields_ = [
        ("logits", P), ("row_stride", I64), ("position_stride", I64),
        ("dtype", I32), ("batch", I32), ("positions", I32), ("vocab", I32),
        ("params", P), ("counters", P), ("counts", P),
        ("bias", IdLists), ("banned", IdLists), ("eos", IdLists),
        ("bias_values", P), ("bitmask", P), ("bitmask_words", I64),
        ("logprobs", I32), ("tokens", P), ("token_logprobs", P), ("top_tokens", P), ("top_logprobs", P),
        ("status", P), ("probs", P),
        ("accepted", P), ("draft_tokens", P), ("draft_probs", P), ("draft_lengths", P), ("commit", I32),
    ]  # fmt: skip


class TopKArguments(ctypes.Structure):
    _fields_ = [
        ("logits", P), ("row_stride", I64), ("dtype", I32), ("rows", I32), ("vocab", I32), ("k", I32),
        ("tokens", P), ("logprobs", P), ("status", P),
    ]  # fmt: skip


def command(arch: int, source: Path = CSRC) -> list[str]:
    """nvcc for the sampler, with the flags of ``csrc/CMakeLists.txt``."""
    return [
        "nvcc", "-std=c++17", "-O3", "-fmad=false", "-lineinfo", f"-I{source}", "-DGPTKERN_ISA=cuda",
        f'-DGPTKERN_CUDA_ARCHS="{arch}"', str(source / "sampling" / "cuda_path.cu"),
    ]  # fmt: skip


def compiled(arch: int, folder: Path, source: Path = CSRC) -> str:
    """The sampler's PTX."""
    out = folder / f"sampler_{arch}.ptx"
    options = ["-ptx", f"-arch=compute_{arch}", "-o", str(out)]
    subprocess.run([*command(arch, source), *options], check=True, capture_output=True)
    return out.read_text()


class Meetings(Counters):
    """Barriers of blocks and of clusters, as many warps as executed each."""

    of_cluster = of_block = 0

    def executed(self, instruction: Instruction, warps: int) -> None:
        if instruction.opcode.startswith("barrier.cluster.arrive"):
            self.of_cluster += warps
        elif instruction.opcode.startswith(("bar.sync", "barrier.sync")):
            self.of_block += warps


class _Pointers:
    """Addresses of tensors, which stay alive and are what a kernel may touch."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def __call__(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.tensors.append(tensor)
        return tensor.data_ptr()


def _dtype(logits: torch.Tensor) -> int:
    return {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[logits.dtype]


def _launch(
    ptx: str, entry: str, arguments: ctypes.Structure, clusters: int, vocab: int,
    read: _Pointers, written: _Pointers, blocks: int, seed: int, counters: Counters | None = None,
) -> None:  # fmt: skip
    """A launch of clusters of ``blocks`` blocks, as ``csrc``'s ``launch`` makes it."""
    # Three rows of the vocabulary each, which need not begin at multiples of 16 bytes: cuda_workspace_bytes.
    workspace = torch.zeros(clusters * 3 * ((vocab + 3) // 4 * 4 + 4))
    execute(
        ptx, (clusters * blocks,), (bytes(arguments), workspace), entry=entry, cluster=(blocks, 1, 1),
        threads=THREADS, also=[*read.tensors, *written.tensors], fresh=[workspace, *written.tensors],
        seed=seed, counters=counters,
    )  # fmt: skip


def _arguments(
    logits: torch.Tensor, params: SamplingParams, state: SamplerState, outputs: Outputs,
    drafts: Drafts | None, commit: int, read: _Pointers, written: _Pointers,
) -> SampleArguments:  # fmt: skip
    """What ``csrc/sampling/bindings.cpp`` makes of a call."""
    verifies, draws = outputs.accepted is not None, outputs.probs is None
    tokens, probs, lengths = drafts or (None, None, None)

    def lists(ids: torch.Tensor | None) -> IdLists:
        return IdLists(read(ids), 0 if ids is None else ids.shape[1])

    return SampleArguments(
        logits=read(logits), row_stride=logits.stride(0),
        position_stride=logits.stride(1) if verifies else 0, dtype=_dtype(logits),
        batch=logits.shape[0], positions=logits.shape[1] if verifies else 1, vocab=logits.shape[-1],
        params=read(params.values), counters=read(state.counters), counts=read(state.counts),
        bias=lists(params.bias_ids), banned=lists(params.banned_ids), eos=lists(params.eos_ids),
        bias_values=read(params.bias_values), bitmask=read(params.bitmask),
        bitmask_words=0 if params.bitmask is None else params.bitmask.shape[1],
        logprobs=params.max_logprobs if params.max_logprobs is not None and draws and not verifies else -1,
        tokens=written(outputs.tokens), token_logprobs=written(outputs.logprobs),
        top_tokens=written(outputs.top_tokens), top_logprobs=written(outputs.top_logprobs),
        status=written(outputs.status), probs=written(outputs.probs), accepted=written(outputs.accepted),
        draft_tokens=read(tokens), draft_probs=read(probs), draft_lengths=read(lengths), commit=commit,
    )  # fmt: skip


# Asking for none of these is a draw and no more: for_each_extra of cuda_path.cu.
_EXTRAS = ("counts", "bitmask", "probs", "accepted")
_EXTRA_LISTS = ("bias", "banned", "eos")


def _kernel(arguments: SampleArguments) -> str:
    if arguments.accepted:
        return "speculate_kernel"
    extra = arguments.logprobs >= 0 or any(getattr(arguments, name) for name in _EXTRAS)
    extra = extra or any(getattr(arguments, name).ids for name in _EXTRA_LISTS)
    return "sample_kernel" if extra else "draw_kernel"


def sample(
    ptx: str, logits: torch.Tensor, params: SamplingParams, state: SamplerState, outputs: Outputs,
    drafts: Drafts | None = None, blocks: int = 1, clusters: int | None = None, commit: int = COMMIT,
    seed: int = 0, counters: Counters | None = None,
) -> None:  # fmt: skip
    """``cuda_sample``: a draw, a verification of drafts, or distributions, as ``outputs`` says.

    A cluster has one row, or some rows, one after another, if ``clusters`` are fewer.
    """
    read, written = _Pointers(), _Pointers()
    arguments = _arguments(logits, params, state, outputs, drafts, commit, read, written)
    clusters = clusters or logits.shape[0]
    kernel = _kernel(arguments)
    _launch(ptx, kernel, arguments, clusters, logits.shape[-1], read, written, blocks, seed, counters)


def commit_only(
    ptx: str, logits: torch.Tensor, params: SamplingParams, state: SamplerState, outputs: Outputs
) -> None:
    """``cuda_sample`` after statuses were looked at: advances the state by what ``outputs`` hold."""
    read = _Pointers()
    arguments = _arguments(logits, params, state, outputs, None, COMMIT_ONLY, read, read)
    grid = (-(-logits.shape[0] // COMMITTERS),)
    execute(ptx, grid, (bytes(arguments),), entry="commit_kernel", threads=COMMITTERS, also=read.tensors)


def top_k(
    ptx: str, logits: torch.Tensor, k: int, outputs: Outputs, blocks: int = 1, clusters: int | None = None
) -> None:
    """``cuda_top_k``: the k most likely tokens of each row."""
    read, written = _Pointers(), _Pointers()
    rows, vocab = logits.shape
    arguments = TopKArguments(
        logits=read(logits), row_stride=logits.stride(0), dtype=_dtype(logits), rows=rows, vocab=vocab, k=k,
        tokens=written(outputs.tokens), logprobs=written(outputs.logprobs), status=written(outputs.status),
    )  # fmt: skip
    _launch(ptx, "top_k_kernel", arguments, clusters or rows, vocab, read, written, blocks, seed=0)
