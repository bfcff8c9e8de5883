"""transformers' models of a family and ours with the same weights, small and random."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gptkern import GPT
from gptkern.config import FamilyConfig, read

TINY: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}


def library_model(config: Any, seed: int = 0) -> Any:
    """A model of transformers, in fp32, whose norms and biases are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def our_model(library: Any) -> GPT:
    """Ours, with copies of the weights that the family's table names."""
    config = read(library.config.to_dict())
    assert isinstance(config, FamilyConfig)
    model = GPT(config)
    with torch.no_grad():
        for name, tensor in stacked(config, _saved(library.state_dict())).items():
            model.get_parameter(name).copy_(tensor)
    return model.eval()


def stacked(config: FamilyConfig, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ours of a checkpoint's tensors, or of gradients by their names."""
    ours: dict[str, torch.Tensor] = {}
    for row in config.family.named(len(config.spec.layers)):
        if row.theirs[0] not in theirs:
            continue
        parts = [theirs[name].t() if row.transposed else theirs[name] for name in row.theirs]
        if row.per_head:
            parts = [parts[0].unflatten(0, (config.spec.heads, 3, -1)).transpose(0, 1).flatten(0, 2)]
        ours[row.ours] = torch.cat(parts)
    if config.spec.tied:
        ours.pop("lm_head.weight", None)
    return ours


def _saved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names that checkpoints have: GPT-NeoX's head is called otherwise in files."""
    neox = any(name.startswith("gpt_neox.") for name in tensors)
    return {
        "embed_out.weight" if neox and name == "lm_head.weight" else name: t for name, t in tensors.items()
    }


def gradients(config: FamilyConfig, library: Any) -> dict[str, torch.Tensor]:
    """The gradients of transformers' model, as ours would have them."""
    found = {name: parameter.grad for name, parameter in library.named_parameters()}
    return stacked(config, _saved(found))
