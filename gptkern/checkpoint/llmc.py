"""llm.c's GPT-2 ``.bin`` files: 256 int32, then the parameters, each for all layers at once.

Header: magic 20240326, version (3: all in fp32; 5: all in bf16), max_seq_len, vocab_size, num_layers,
num_heads, channels, padded_vocab_size. The token embedding has padded_vocab_size rows; the rows
after vocab_size are filler and are left out here. Matrices are ``(out, in)``.
Source: gpt2_write_to_checkpoint in train_gpt2.cu and write_model in train_gpt2.py of
github.com/karpathy/llm.c.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from gptkern.checkpoint.contents import Contents
from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.files import map_file
from gptkern.checkpoint.storage import StoredTensor
from gptkern.config import GPTConfig

MAGIC = 20240326
_HEADER_BYTES = 1024
_VERSIONS = {3: torch.float32, 5: torch.bfloat16}
_END_OF_TEXT = 50256


def open_file(path: Path) -> Contents:
    """Open a ``gpt2_124M.bin``."""
    raw = map_file(path)
    if len(raw) < _HEADER_BYTES:
        raise CheckpointError(
            f"{path}: truncated: a header of {_HEADER_BYTES} bytes expected, {len(raw)} found"
        )
    magic, version, positions, vocab, layers, heads, width, padded = raw[:32].view(torch.int32).tolist()
    if magic != MAGIC:
        raise CheckpointError(f"{path}: not an llm.c GPT-2 file: magic {MAGIC} expected, {magic} found")
    if version not in _VERSIONS:
        raise CheckpointError(f"{path}: llm.c version 3 (fp32) or 5 (bf16) expected, {version} found")
    special = _END_OF_TEXT if vocab > _END_OF_TEXT else None
    try:
        config = GPTConfig(
            vocab_size=vocab,
            n_positions=positions,
            n_layer=layers,
            n_head=heads,
            n_embd=width,
            bos_token_id=special,
            eos_token_id=special,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if padded < vocab:
        raise CheckpointError(f"{path}: padded_vocab_size is {padded}, vocab_size {vocab}: it cannot be less")
    dtype = _VERSIONS[version]
    # before anything is made that is as long as the header says
    expected = _HEADER_BYTES + config.replace(vocab_size=padded).parameters * dtype.itemsize
    if len(raw) != expected:
        state = "truncated" if len(raw) < expected else "longer than its header says"
        raise CheckpointError(
            f"{path}: {state}: num_layers is {layers:,}, channels {width:,}, padded_vocab_size {padded:,}: "
            f"{expected:,} bytes expected, {len(raw):,} found"
        )
    tensors, start = {}, _HEADER_BYTES
    for name, shape in _layout(config, padded):
        used_shape = (vocab, *shape[1:]) if name.endswith("wte.weight") else shape
        tensors[name] = StoredTensor(path, name, dtype, used_shape, raw, start)
        start += math.prod(shape) * dtype.itemsize
    return Contents(path, config, tensors, transposed=False)


def _layout(config: GPTConfig, padded_vocab: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order they lie in the file."""
    width = config.n_embd
    block: list[tuple[str, tuple[int, ...]]] = [
        ("ln_1.weight", (width,)),
        ("ln_1.bias", (width,)),
        ("attn.c_attn.weight", (3 * width, width)),
        ("attn.c_attn.bias", (3 * width,)),
        ("attn.c_proj.weight", (width, width)),
        ("attn.c_proj.bias", (width,)),
        ("ln_2.weight", (width,)),
        ("ln_2.bias", (width,)),
        ("mlp.c_fc.weight", (4 * width, width)),
        ("mlp.c_fc.bias", (4 * width,)),
        ("mlp.c_proj.weight", (width, 4 * width)),
        ("mlp.c_proj.bias", (width,)),
    ]
    return [
        ("transformer.wte.weight", (padded_vocab, width)),
        ("transformer.wpe.weight", (config.n_positions, width)),
        *(
            (f"transformer.h.{layer}.{name}", shape)
            for name, shape in block
            for layer in range(config.n_layer)
        ),
        ("transformer.ln_f.weight", (width,)),
        ("transformer.ln_f.bias", (width,)),
    ]
