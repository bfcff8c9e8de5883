"""Saving a model into a folder that transformers opens, all or nothing, whenever it is killed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gptkern.checkpoint import generation
from gptkern.checkpoint.contents import BLOCK_MATRICES, GPT1_NAMES
from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.hf import (
    CONFIG,
    GENERATION_CONFIG,
    KV_SCALES,
    QUANTIZATION,
    SAFETENSORS,
    SAFETENSORS_INDEX,
)
from gptkern.checkpoint.load import check_vocabulary
from gptkern.checkpoint.replace import replacing, settle
from gptkern.checkpoint.storage import DTYPE_NAMES, Entry, write_safetensors
from gptkern.config import FamilyConfig, GPTConfig
from gptkern.durable import named_folder
from gptkern.model.families.table import Tensor
from gptkern.model.spec import DecoderSpec
from gptkern.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gptkern.gpt import GPT

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save(
    model: GPT, folder: str | Path, *, max_shard_size: int | str, beside: Mapping[str, bytes] | None = None
) -> None:
    """Write the model's configuration, its weights as safetensors and, where there is one, its tokenizer.

    Args:
        beside: Further files that belong to the model, by name.

    Raises:
        ValueError: ``folder`` is empty text.
        CheckpointError: ``folder`` is a file, ``max_shard_size`` cannot be read, a tokenizer, the model's or
            the folder's, does not fit the model, its head and embedding differ and should not, or it has no
            weights (on the meta device).
        OSError: It could not be written: the old model is whole, or the new one.
    """
    folder = named_folder("save_pretrained", folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a folder is needed, a file is there")
    _check_weights(model)
    if folder.is_dir():
        settle(folder)
    tokenizer = model.tokenizer
    kept_tokenizer = tokenizer or Tokenizer.find(folder)
    if kept_tokenizer is not None:
        check_vocabulary(folder, model.config, kept_tokenizer)
    shards = _sharded(_entries(model), _bytes(max_shard_size))
    small = _json_files(model) | dict(beside or {})
    replaced = {GENERATION_CONFIG, SAFETENSORS, SAFETENSORS_INDEX, *(tokenizer.files if tokenizer else ())}
    replaced |= small.keys()
    with replacing(folder, lambda name: name in replaced or _SHARD.fullmatch(name) is not None) as staging:
        for name, data in small.items():
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
            file.write(_json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _json_files(model: GPT) -> dict[str, bytes]:
    """``config.json``, and ``generation_config.json`` where it says more than that."""
    config = model.config_extras | model.config.to_dict() | {"dtype": _dtype_name(model)}
    if model.quantization is not None:
        config[QUANTIZATION] = model.quantization.to_dict()
    if model.kv_scales is not None:
        # A number for each head of each layer: as decimals they are read back to the bit.
        config[KV_SCALES] = {
            name: scale.tolist() for name, scale in zip(("k", "v"), model.kv_scales, strict=True)
        }
    files = {CONFIG: config}
    if model.generation_config != generation.of_json(config, model.config):
        files[GENERATION_CONFIG] = model.generation_config
    try:
        return {name: _json(data) for name, data in files.items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"save_pretrained: config_extras or generation_config cannot be written as JSON: {error}"
        ) from error


def _check_weights(model: GPT) -> None:
    """Raise where the folder could not be written or, once written, not be loaded."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            raise CheckpointError(f"save_pretrained: {name} is on the meta device: it has no values yet")
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"save_pretrained: {name} is {tensor.dtype}; supported are {', '.join(map(str, DTYPE_NAMES))}"
            )
    head, embedding = model.lm_head, model.transformer.wte.weight
    tied = model.config.tie_word_embeddings and isinstance(head, nn.Linear)
    if tied and head.weight is not embedding and not torch.equal(head.weight, embedding):
        raise CheckpointError(
            "save_pretrained: lm_head.weight and transformer.wte.weight differ, and "
            "config.tie_word_embeddings is True: make them one "
            "(model.lm_head.weight = model.transformer.wte.weight), or set "
            "model.config = model.config.replace(tie_word_embeddings=False)"
        )


def _entries(model: GPT) -> list[Entry]:
    """The tensors under transformers' names, a tied head once, and how each is stored."""
    packed = [(name, buffer) for name, buffer in model.named_buffers() if not name.endswith("._like")]
    tied = "lm_head.weight" if model.spec.tied else None
    named = [*model.named_parameters(remove_duplicate=False), *packed]
    tensors = {name: tensor for name, tensor in named if name != tied}
    config = model.config
    if isinstance(config, FamilyConfig):
        rows = {row.ours: row for row in config.family.named(len(config.spec.layers))}
        return [
            entry
            for name, tensor in tensors.items()
            for entry in (_parts(rows[name], tensor, config.spec) if name in rows else [(name, tensor, None)])
        ]
    return _gpt_entries(config, tensors)


def _gpt_entries(config: GPTConfig, tensors: dict[str, torch.Tensor]) -> list[Entry]:
    """Those of GPT-1 and GPT-2, whose block matrices are stored as (in, out)."""
    entries: list[Entry] = []
    for name, parameter in tensors.items():
        theirs = name
        if config.post_norm:
            for ours, gpt1 in GPT1_NAMES.items():
                theirs = theirs.replace(f"transformer.{ours}.", f"transformer.{gpt1}.")
        entries.append((theirs, parameter, torch.t if name.endswith(BLOCK_MATRICES) else None))
        # transformers has no GPT without biases: zeros mean the same
        if not config.bias and name.endswith(".weight") and (".h." in name or ".ln_f." in name):
            zeros = torch.zeros(parameter.shape[0], dtype=parameter.dtype)
            entries.append((theirs.removesuffix("weight") + "bias", zeros, None))
    return entries


def _parts(row: Tensor, tensor: torch.Tensor, spec: DecoderSpec) -> list[Entry]:
    """The tensors that hold a parameter, as the family's table says."""
    if row.per_head:

        def by_head(rows: torch.Tensor) -> torch.Tensor:
            by_kind: torch.Tensor = rows.unflatten(0, (3, spec.heads, -1))
            return by_kind.transpose(0, 1).flatten(0, 2)

        return [(row.theirs[0], tensor, by_head)]
    sizes = [tensor.shape[0] // len(row.theirs)] * len(row.theirs)
    if len(sizes) == 3:
        sizes = [spec.q_width, spec.kv_width, spec.kv_width]
    layout = torch.t if row.transposed else None
    return [(name, part, layout) for name, part in zip(row.theirs, tensor.split(sizes), strict=True)]


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


def _json(data: Mapping[str, object]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
