"""The extension: raw addresses and sizes. gptkern.ops.sample checks what it passes on."""

has_cuda: bool
cuda_archs: str
max_vocab: int

def sample(
    on_cuda: bool,
    stream: int,
    workspace: int,
    threads: int,
    commit: int,
    dtype: int,
    batch: int,
    positions: int,
    vocab: int,
    row_stride: int,
    position_stride: int,
    logprobs: int,
    logits: int,
    params: int,
    counters: int,
    counts: int,
    bias_ids: int,
    bias_values: int,
    n_bias: int,
    banned_ids: int,
    n_banned: int,
    eos_ids: int,
    n_eos: int,
    bitmask: int,
    bitmask_words: int,
    tokens: int,
    token_logprobs: int,
    top_tokens: int,
    top_logprobs: int,
    status: int,
    probs: int,
    draft_tokens: int,
    draft_probs: int,
    accepted: int,
    /,
) -> int: ...
def top_k(
    on_cuda: bool,
    stream: int,
    workspace: int,
    threads: int,
    dtype: int,
    rows: int,
    vocab: int,
    row_stride: int,
    k: int,
    logits: int,
    tokens: int,
    logprobs: int,
    status: int,
    /,
) -> int: ...
def workspace_bytes(rows: int, vocab: int, /) -> int: ...
def uniforms(seed: int, request: int, step: int, /) -> tuple[int, int]: ...
def weight(halvings: float, /) -> int: ...
def cpu_path() -> str: ...
def use_cpu_path(name: str, /) -> None: ...

has_decoder: bool

def decode_path() -> str: ...
def use_decode_path(name: str, /) -> None: ...

class Decoder:
    def __init__(
        self,
        dtype: int,
        width: int,
        heads: int,
        inner: int,
        vocab: int,
        activation: int,
        post_norm: bool,
        eps: float,
        blocks: list[list[int]],
        scales: list[float],
        embeddings: list[int],
        final_norm: list[int],
        head: list[int],
        /,
    ) -> None: ...
    def step(
        self,
        k: int,
        v: int,
        block_stride: int,
        page_stride: int,
        slot_stride: int,
        page_size: int,
        table: int,
        table_stride: int,
        lengths: int,
        tokens: int,
        rows: int,
        logits: int,
        threads: int,
        /,
    ) -> None: ...
