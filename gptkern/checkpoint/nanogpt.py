"""nanoGPT's ``ckpt.pt``: one pickle with ``model_args`` and the state dict ``model``.

Its matrices are ``(out, in)``; its GELU is the exact one (nn.GELU, since June 2023). Files whose
``model_args`` have no ``bias`` are older than that: their models have biases and GELU's tanh form.
The vocabulary may be padded (50304 for GPT-2's 50257): the rows stay, so that logits are those the model
was trained with.
Source: model.py and train.py of github.com/karpathy/nanoGPT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptkern.checkpoint.contents import Contents, by_parameter_name
from gptkern.checkpoint.errors import CheckpointError, shown, some
from gptkern.checkpoint.pickles import read_plain, read_torch, state_dict_tensors
from gptkern.config import GPTConfig

_FIELDS = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "bias": "bias",
}
_END_OF_TEXT = 50256


def open_file(path: Path) -> Contents:
    """Open a ``ckpt.pt``."""
    checkpoint = read_torch(path, '{"model": c["model"], "model_args": c["model_args"]}')
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        found = shown(list(checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise CheckpointError(
            f"{path}: a nanoGPT checkpoint with model and model_args is needed, {found} found"
        )
    tensors = by_parameter_name(state_dict_tensors(path, checkpoint["model"]))
    return Contents(path, _read_config(path, checkpoint["model_args"]), tensors, transposed=False)


def _read_config(path: Path, model_args: Any) -> GPTConfig:
    needed = _FIELDS.keys() - {"bias"}
    if not isinstance(model_args, dict) or not needed <= model_args.keys():
        raise CheckpointError(f"{path}: model_args is {shown(model_args)}; {', '.join(_FIELDS)} are needed")
    unknown = [shown(name).strip("'") for name in model_args if name not in {*_FIELDS, "dropout"}]
    if unknown:
        raise CheckpointError(
            f"{path}: model_args has {some(unknown)}: an unknown architecture, not nanoGPT's"
        )
    values = {ours: model_args[theirs] for theirs, ours in _FIELDS.items() if theirs in model_args}
    dropout = model_args.get("dropout", 0.0)
    try:
        config = GPTConfig(
            **values,
            activation_function="gelu" if "bias" in model_args else "gelu_new",
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: model_args: {error}") from error
    if _END_OF_TEXT < config.vocab_size <= 50304:
        return config.replace(bos_token_id=_END_OF_TEXT, eos_token_id=_END_OF_TEXT)
    return config


def read_data_set(path: Path) -> str | None:
    """The name of the data set that a ``ckpt.pt`` was trained on; None where it does not say."""
    checkpoint = read_torch(path, '{"model": c["model"], "model_args": c["model_args"]}')
    settings = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    name = settings.get("dataset") if isinstance(settings, dict) else None
    plain = isinstance(name, str) and name.isprintable() and name == Path(name).name and name != ".."
    return name if isinstance(name, str) and plain and name else None


def read_meta(path: Path) -> dict[str, int]:
    """The ids of the characters, from the ``meta.pkl`` beside a character-level data set.

    Raises:
        CheckpointError: It cannot be read, or holds no such vocabulary: ids from 0 on, each once.
    """
    meta = read_plain(path)
    stoi = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(stoi, dict) or not stoi:
        raise CheckpointError(f"{path}: stoi, a dict from characters to ids, is needed, {shown(meta)} found")
    ids: dict[str, int] = {}
    for character, number in stoi.items():
        if not isinstance(character, str) or not character or type(number) is not int:
            raise CheckpointError(
                f"{path}: stoi: text with an integer is needed, {shown(character)}: {shown(number)} found"
            )
        ids[character] = number
    if sorted(ids.values()) != list(range(len(ids))):
        raise CheckpointError(f"{path}: stoi: each id from 0 to {len(ids) - 1} is needed once")
    return ids
