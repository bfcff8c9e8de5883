"""The tensors of the decoder that a transformers model of a family is, shared with the model."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gptkern.config import FamilyConfig, read
from gptkern.transformers.families import FAMILIES

# Files call this one otherwise than the library's module.
_RENAMED = {"embed_out.weight": "lm_head.weight"}
# (copy, parameter, heads) of the weights that are no views of the model's.
_Copies = list[tuple[torch.Tensor, nn.Parameter, int]]
_copies: WeakKeyDictionary[nn.Module, _Copies] = WeakKeyDictionary()


def layers_of(model: Any) -> int:
    """The number of layers that a language model of a family has."""
    body = model.get_submodule(FAMILIES[model.config.model_type].body)
    return len(body.layers if hasattr(body, "layers") else body.h)


def family_config(model: Any, sizes: dict[str, int]) -> FamilyConfig:
    """The model's configuration as gptkern reads it, with the sizes that its modules have.

    Raises:
        ValueError: A switch of the model that is not served; the message names it.
    """
    config = read(model.config.to_dict() | sizes)
    assert isinstance(config, FamilyConfig)
    return config


def family_sources(model: Any, config: FamilyConfig) -> dict[str, torch.Tensor]:
    """The model's tensor for every parameter of the decoder, matrices ``(out, in)``.

    Parameters that the decoder has as one tensor (queries, keys and values; gate and up) are moved into one
    memory, rows after rows, once: they stay the model's own parameters, and an update in place of either is
    one of both. Only queries, keys and values stored head by head (GPT-NeoX) are copies, which
    ``refresh_copies`` makes up to date.
    """
    found: dict[str, torch.Tensor] = {}
    copies: _Copies = []
    for row in config.family.named(len(config.spec.layers)):
        parts = [_parameter(model, name) for name in row.theirs]
        whole = [part for part in parts if part is not None]
        if len(whole) == len(parts):
            if row.per_head:
                found[row.ours] = _sorted_rows(whole[0], config.spec.heads)
                copies.append((found[row.ours], whole[0], config.spec.heads))
            else:
                found[row.ours] = _stacked(whole)
    _copies[model] = copies
    return found


def refresh_copies(model: Any) -> None:
    """Bring the copies that ``family_sources`` made of some weights up to date."""
    for copy, parameter, heads in _copies.get(model, ()):
        rows = _sorted_rows(parameter, heads)
        # A write would empty the engine's prefix cache.
        if not torch.equal(copy, rows):
            copy.copy_(rows)


def _parameter(model: Any, name: str) -> nn.Parameter | None:
    """A parameter by its name in files; None where the model has none."""
    owner, _, leaf = _RENAMED.get(name, name).rpartition(".")
    parameter: nn.Parameter | None = getattr(model.get_submodule(owner), leaf)
    return parameter


def _sorted_rows(parameter: nn.Parameter, heads: int) -> torch.Tensor:
    """The rows of all heads' queries, then those of keys and of values; no strides give a view of that."""
    rows: torch.Tensor = parameter.detach().unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return rows


def _stacked(parts: list[nn.Parameter]) -> torch.Tensor:
    """One tensor of the parameters' rows, in their own memory: they are moved unless they lie end to end."""
    if len(parts) == 1:
        return parts[0]
    whole = _spanning(parts)
    if whole is None:
        whole = torch.cat([part.detach() for part in parts])
        for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = rows
    return whole


def _spanning(parts: list[nn.Parameter]) -> torch.Tensor | None:
    """The parameters as one view, if they lie end to end in one memory."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.storage_offset() == end):
            return None
        end += part.numel()
    rows = sum(len(part) for part in parts)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
