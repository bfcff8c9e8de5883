"""From a model to a folder that transformers opens, in one step that a kill cannot cut in half."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from gptkern.checkpoint.contents import BLOCK_MATRICES, GPT1_NAMES
from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.hf import CONFIG, KV_SCALES, SAFETENSORS, SAFETENSORS_INDEX
from gptkern.checkpoint.load import check_vocabulary
from gptkern.checkpoint.replace import replacing, settle
from gptkern.checkpoint.storage import write_safetensors
from gptkern.config import GPTConfig
from gptkern.durable import Writer, named_folder
from gptkern.quantize import Quantization
from gptkern.tokenizer import Tokenizer

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Entry = tuple[str, torch.Tensor, bool]


def save(
    model: nn.Module,
    config: GPTConfig,
    folder: str | Path,
    tokenizer: Tokenizer | None,
    *,
    max_shard_size: int | str,
    quantization: Quantization | None = None,
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write config.json, the weights as safetensors and, where there is one, the tokenizer.

    Args:
        beside: Further files that belong to the model, by name.

    Raises:
        ValueError: ``folder`` is empty text.
        CheckpointError: ``folder`` is a file, ``max_shard_size`` cannot be read, or a tokenizer, given or in
            the folder, does not fit the model.
        OSError: It could not be written: the old model is whole, or the new one.
    """
    folder = named_folder("save_pretrained", folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a folder is needed, a file is there")
    if folder.is_dir():
        settle(folder)
    beside = beside or {}
    kept_tokenizer = tokenizer or Tokenizer.find(folder)
    if kept_tokenizer is not None:
        check_vocabulary(folder, config, kept_tokenizer.vocab_size)
    shards = _sharded(_entries(model, config), _bytes(max_shard_size))
    replaced = {CONFIG, SAFETENSORS, SAFETENSORS_INDEX, *(tokenizer.files if tokenizer else ()), *beside}
    with replacing(folder, lambda name: name in replaced or _SHARD.fullmatch(name) is not None) as staging:
        told: dict[str, object] = {}
        if quantization is not None:
            told["quantization_config"] = quantization.to_dict()
        if kv_scales is not None:
            # A number for each head of each layer: as decimals they are read back to the bit.
            told[KV_SCALES] = {
                name: scale.tolist() for name, scale in zip(("k", "v"), kv_scales, strict=True)
            }
        with staging.new_file(CONFIG) as file:
            _write_json(file, config.to_dict() | {"dtype": _dtype_name(model)} | told)
        for name, data in beside.items():
            with staging.new_file(name) as file:
                file.write(data)
        if tokenizer is not None:
            tokenizer.save(staging.folder)
        if len(shards) == 1:
            with staging.new_file(SAFETENSORS) as file:
                write_safetensors(file, shards[0])
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            with staging.new_file(name) as file:
                write_safetensors(file, shard)
            weight_map |= {entry[0]: name for entry in shard}
        total = sum(_size(entry) for shard in shards for entry in shard)
        with staging.new_file(SAFETENSORS_INDEX) as file:
            _write_json(file, {"metadata": {"total_size": total}, "weight_map": weight_map})


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


def _write_json(file: Writer, data: dict[str, object]) -> None:
    file.write((json.dumps(data, indent=2, sort_keys=True) + "\n").encode())
