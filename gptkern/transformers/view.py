"""The ``GPT`` over a transformers model's own weights, by which executors read them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gptkern.as_built import skeleton
from gptkern.config import Config, FamilyConfig, GPTConfig
from gptkern.gpt import GPT
from gptkern.transformers.families import FAMILIES
from gptkern.transformers.weights import family_config, family_sources, layers_of, refresh_copies

_GPT1_NAMES = {"wte": "tokens_embed", "wpe": "positions_embed"}
_views: WeakKeyDictionary[nn.Module, tuple[Any, GPT]] = WeakKeyDictionary()


def view(model: Any) -> GPT:
    """A ``GPT`` over the model's own weights: an update of one changes the other.

    It is the same one, with its idle engine, until the model's shape or the place of a weight changes.
    """
    key, previous = _views.get(model, (None, None))
    if previous is not None and key == _place_key(model):
        refresh_copies(model)
        return previous
    for parameter in _columns(model):
        # What other processes share must stay shared. On a GPU every tensor counts as shared.
        if parameter.device.type != "cpu" or not parameter.is_shared():
            parameter.data = parameter.data.t().contiguous().t()
    gpt = skeleton(lambda: GPT(gpt_config(model)))
    for name, source in _sources(model).items():
        owner, _, leaf = name.rpartition(".")
        setattr(gpt.get_submodule(owner), leaf, nn.Parameter(source.detach(), requires_grad=False))
    _views[model] = _place_key(model), gpt.eval()
    return gpt


def forget(model: Any) -> None:
    """Free the view of ``model``, and with it the memory of its idle engine."""
    _views.pop(model, None)


def _place_key(model: Any) -> tuple[str, list[int]]:
    """The model's shape, and the place of each of its weights in memory."""
    parameters = (p for module in model.modules() for p in module._parameters.values() if p is not None)
    return shape_key(model), [parameter.data_ptr() for parameter in parameters]


def lay_back(model: Any) -> None:
    """Store the library's matrices as the library does, row after row of ``(in, out)``."""
    for parameter in _matrices(model):
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def _columns(model: Any) -> list[nn.Parameter]:
    """The matrices whose rows of ``(out, in)`` do not lie in order, as executors read them best.

    Stored transposed, they have the same shapes and values and stay the same parameters, and an update in
    place keeps the layout.
    """
    return [parameter for parameter in _matrices(model) if not parameter.t().is_contiguous()]


def _matrices(model: Any) -> list[nn.Parameter]:
    """The library's ``(in, out)`` matrices; a family of tables has none."""
    if model.config.model_type in FAMILIES:
        return []
    return [p for block in model.transformer.h for p in block.parameters() if p.dim() == 2]


def sizes(model: Any) -> dict[str, int]:
    """The numbers of layers and of tokens by the model's modules, which may differ from its config."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    tokens = model.config.vocab_size if weight is None else weight.shape[0]
    if model.config.model_type in FAMILIES:
        return {"num_hidden_layers": layers_of(model), "vocab_size": tokens}
    return {"n_layer": len(getattr(model.transformer, "h", ())), "vocab_size": tokens}


def shape_key(model: Any) -> str:
    """All numbers that a model's modules are built from, as text."""
    return repr((sizes(model), sorted(vars(model.config).items(), key=lambda item: item[0])))


def gpt_config(model: Any) -> Config:
    """The model's shape as gptkern names it.

    Raises:
        ValueError: A switch of the model that is not served; the message names it.
    """
    if model.config.model_type in FAMILIES:
        return family_config(model, sizes(model))
    return GPTConfig.from_dict(model.config.to_dict()).replace(**sizes(model))


def _sources(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensor for every parameter name of ``view(model)``, matrices as ``(out, in)`` views."""
    config = gpt_config(model)
    if isinstance(config, FamilyConfig):
        return family_sources(model, config)
    body = model.transformer
    gpt1_names = model.config.model_type == "openai-gpt"
    found = {"lm_head.weight": model.lm_head.weight}
    for ours in ("wte", "wpe"):
        theirs = _GPT1_NAMES[ours] if gpt1_names else ours
        found[f"transformer.{ours}.weight"] = getattr(body, theirs).weight
    for index, block in enumerate(body.h):
        for name, parameter in block.named_parameters():
            matrix = parameter.dim() == 2
            found[f"transformer.h.{index}.{name}"] = parameter.t() if matrix else parameter
    if not gpt1_names:
        found["transformer.ln_f.weight"], found["transformer.ln_f.bias"] = body.ln_f.weight, body.ln_f.bias
    return found
