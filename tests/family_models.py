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
    stored = library.state_dict()
    ours = dict(model.named_parameters())
    rows = {row.ours: row for row in config.family.named(len(config.spec.layers))}
    with torch.no_grad():
        for name, parameter in ours.items():
            parts = [stored[theirs] for theirs in rows[name].theirs]
            parameter.copy_(torch.cat([part.t() if rows[name].transposed else part for part in parts]))
    return model.eval()
