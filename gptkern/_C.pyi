"""The extension. It takes tensors and checks them: what does not fit raises TypeError or ValueError."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gptkern.engine.executors.cpu_model import CpuModel
from gptkern.ops.sample.launch import Drafts, Machine, Outputs
from gptkern.ops.sample.params import SamplerState, SamplingParams

interface: int
has_cuda: bool
cuda_archs: str
max_vocab: int
max_vocab_top_k: int

def sample(
    logits: Tensor,
    params: SamplingParams,
    state: SamplerState,
    outputs: Outputs,
    *,
    drafts: Drafts | None = None,
    commit: int,
    machine: Machine,
) -> int: ...
def top_k(logits: Tensor, k: int, outputs: Outputs, *, machine: Machine) -> int: ...
def workspace_bytes(rows: int, vocab: int, /) -> int: ...
def uniforms(seed: int, request: int, step: int, /) -> tuple[int, int]: ...
def weight(halvings: float, /) -> int: ...
def cpu_path() -> str: ...
def use_cpu_path(name: str, /) -> None: ...
def same_entries(
    dicts: list[dict[Any, Any]], sizes: list[int], owners: list[dict[Any, Any]], values: list[Any]
) -> bool: ...
def describe(*tensors: Tensor | None) -> bytes | None: ...

has_decoder: bool

def decode_path() -> str: ...
def use_decode_path(name: str, /) -> None: ...

class Decoder:
    def __init__(self, model: CpuModel, owners: Sequence[dict[str, Any]] = ...) -> None: ...
    @property
    def packed_bytes(self) -> int: ...
    def read_packed(self, packed: bool) -> None: ...
    def weights_written(self) -> None: ...
    def step(
        self,
        k: Tensor,
        v: Tensor,
        page_table: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        wanted: Tensor,
        logits: Tensor,
        threads: int,
        advance: bool = False,
    ) -> bool: ...
