"""Hugging Face folders: config.json, and weights as safetensors or a state dict, whole or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptkern.checkpoint import generation
from gptkern.checkpoint.contents import Contents, by_family, by_parameter_name
from gptkern.checkpoint.errors import CheckpointError, some
from gptkern.checkpoint.files import check_file_name, read_json
from gptkern.checkpoint.pending import Files
from gptkern.checkpoint.pickles import read_torch, state_dict_tensors
from gptkern.checkpoint.storage import StoredTensor, read_safetensors
from gptkern.config import JSON_FIELDS, Config, FamilyConfig
from gptkern.config import read as config_of
from gptkern.kv_scales import are_kv_scales
from gptkern.quantization import Quantization

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
KV_SCALES, QUANTIZATION = "kv_scales", "quantization_config"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
# in the order they are looked for, as in transformers
WEIGHTS = (SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX)

# fields of config.json that saving writes anew, from what the model is then; auto_map names code, which
# does not come along
_OF_THE_WEIGHTS = {KV_SCALES, QUANTIZATION, "dtype", "torch_dtype", "auto_map"}
_SAVED_ANEW = {*JSON_FIELDS, *_OF_THE_WEIGHTS}


def open_folder(files: Files) -> Contents:
    """Open a folder that transformers' ``save_pretrained`` or ours wrote."""
    config = read_config(files / CONFIG)
    fields = read_json(files / CONFIG)
    quantization = _read_quantization(files / CONFIG, fields.get(QUANTIZATION), config)
    kv_scales = _read_kv_scales(files / CONFIG, fields.get(KV_SCALES), config)
    found = next((files / name for name in WEIGHTS if name in files), None)
    if found is None:
        raise CheckpointError(f"{files.folder}: no weights here; one of {', '.join(WEIGHTS)} is needed")
    tensors = _read_shards(files, found) if found.suffix == ".json" else _read_weights(found)
    # A family's configuration has all fields.
    gpt = not isinstance(config, FamilyConfig)
    return Contents(
        files.folder,
        config,
        by_family(config, tensors) if isinstance(config, FamilyConfig) else by_parameter_name(tensors),
        gpt,
        quantization,
        kv_scales,
        _read_generation_config(files, fields, config),
        {name: value for name, value in fields.items() if name not in _SAVED_ANEW} if gpt else {},
    )


def read_config(path: Path) -> Config:
    """A ``config.json``."""
    fields = {name: value for name, value in read_json(path).items() if name not in _OF_THE_WEIGHTS}
    try:
        return config_of(fields)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_generation_config(files: Files, fields: dict[str, Any], config: Config) -> dict[str, Any]:
    """``generation_config.json``, else the fields of ``config.json``: as in transformers, never both."""
    if GENERATION_CONFIG not in files:
        return generation.of_json(fields, config)
    return read_json(files / GENERATION_CONFIG)


def _read_quantization(path: Path, data: Any, config: Config) -> Quantization | None:
    try:
        return None if data is None else Quantization.from_dict(data, config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_kv_scales(path: Path, data: Any, config: Config) -> tuple[torch.Tensor, torch.Tensor] | None:
    if data is None:
        return None
    shape = (len(config.spec.layers), config.spec.kv_heads)
    try:
        k_scale, v_scale = (torch.tensor(data[name], dtype=torch.float32) for name in ("k", "v"))
        good = are_kv_scales(k_scale, shape) and are_kv_scales(v_scale, shape)
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError):
        good = False
    if not good:
        raise CheckpointError(
            f"{path}: {KV_SCALES}: an object of k and v, each {shape[0]} lists of {shape[1]} "
            "positive numbers, is needed"
        )
    return k_scale, v_scale


def shard_names(index: Path) -> list[str]:
    """The files an index names, which all lie in its own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map, an object from tensor names to file names, is needed")
    return sorted(
        {check_file_name(f"{index}: {tensor}: the index", name) for tensor, name in weight_map.items()}
    )


def _read_weights(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return state_dict_tensors(path, read_torch(path, "c if isinstance(c, dict) else c.state_dict()"))


def _read_shards(files: Files, index: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name in shard_names(index):
        if name not in files:
            raise CheckpointError(f"{index}: {name}, which it names, is missing")
        for tensor_name, tensor in _read_weights(files / name).items():
            if tensor_name in tensors:
                raise CheckpointError(
                    f"{index}: {tensor_name} is in {tensors[tensor_name].file.name} and in {name}: "
                    "one is needed"
                )
            tensors[tensor_name] = tensor
    weight_map = read_json(index)["weight_map"]
    misplaced = [
        name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file
    ]
    if misplaced:
        raise CheckpointError(f"{index}: not in the file the index names for it: {some(misplaced)}")
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        raise CheckpointError(f"{index}: in a shard but not in the index: {some(unlisted)}")
    return tensors
