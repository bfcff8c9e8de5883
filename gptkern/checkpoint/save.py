"""From a model to a folder that transformers opens, in one step that a kill cannot cut in half."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gptkern.checkpoint.contents import BLOCK_MATRICES, GPT1_NAMES
from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.hf import CONFIG, KV_SCALES, SAFETENSORS, SAFETENSORS_INDEX
from gptkern.checkpoint.replace import replacing
from gptkern.checkpoint.storage import write_safetensors
from gptkern.config import GPTConfig
from gptkern.quantize import Quantization

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Entry = tuple[str, torch.Tensor, bool]


def save(
    model: nn.Module,
    config: GPTConfig,
    folder: Path,
    tokenizer: Tokenizer | None,
    *,
    max_shard_size: int | str,
    quantization: Quantization | None = None,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Write config.json, the weights as safetensors and, where there is one, the tokenizer.

    Raises:
        CheckpointError: ``folder`` is a file, or ``max_shard_size`` cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a folder is needed, a file is there")
    shards = _sharded(_entries(model, config), _bytes(max_shard_size))
    replaced = {CONFIG, SAFETENSORS, SAFETENSORS_INDEX, *(tokenizer.files if tokenizer else ())}
    with replacing(folder, lambda name: name in replaced or _SHARD.fullmatch(name) is not None) as staging:
        told: dict[str, object] = {}
        if quantization is not None:
            told["quantization_config"] = quantization.to_dict()
        if kv_scales is not None:
            # A number for each head of each layer: as decimals they are read back to the bit.
            told[KV_SCALES] = {
                name: scale.tolist() for name, scale in zip(("k", "v"), kv_scales, strict=True)
            }
        _write_json(staging / CONFIG, config.to_dict() | {"dtype": _dtype_name(model)} | told)
        if tokenizer is not None:
            tokenizer.save(staging)
        if len(shards) == 1:
            write_safetensors(staging / SAFETENSORS, shards[0])
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_safetensors(staging / name, shard)
            weight_map |= {entry[0]: name for entry in shard}
        total = sum(_size(entry) for shard in shards for entry in shard)
        _write_json(
            staging / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _entries(model: nn.Module, config: GPTConfig) -> list[Entry]:
    """The tensors under transformers' names, a tied head once, and whether to turn each to (in, out)."""
    entries: list[Entry] = []
    packed = [(name, buffer) for name, buffer in model.named_buffers() if not name.endswith("._like")]
    for name, parameter in [*model.named_parameters(), *packed]:
        theirs = name
        if config.post_norm:
            for ours, gpt1 in GPT1_NAMES.items():
                theirs = theirs.replace(f"transformer.{ours}.", f"transformer.{gpt1}.")
        entries.append((theirs, parameter, name.endswith(BLOCK_MATRICES)))
        # transformers has no GPT without biases: zeros mean the same
        if not config.bias and name.endswith(".weight") and (".h." in name or ".ln_f." in name):
            zeros = torch.zeros(parameter.shape[0], dtype=parameter.dtype)
            entries.append((theirs.removesuffix("weight") + "bias", zeros, False))
    return entries


def _sharded(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Runs of entries, each at most ``limit`` bytes where its tensors allow it."""
    shards: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if shards[-1] and used + _size(entry) > limit:
            shards.append([])
            used = 0
        shards[-1].append(entry)
        used += _size(entry)
    return shards


def _size(entry: Entry) -> int:
    return entry[1].numel() * entry[1].element_size()


def _dtype_name(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _bytes(size: int | str) -> int:
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]?I?B)\s*", str(size).upper())
    if not match or match[2] not in _UNITS or not int(match[1]):
        raise CheckpointError(
            f"max_shard_size is {size!r}; a positive number of bytes, or text like '5GB', is needed"
        )
    return int(match[1]) * _UNITS[match[2]]


def _write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
