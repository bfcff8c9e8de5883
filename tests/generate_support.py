"""Tiny models of transformers and of gptkern with the same random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from gptkern.config import GPTConfig
from gptkern.gpt import GPT

VOCAB = 211
# name -> fields of transformers' config: head dims 8 to 128, odd widths, every activation, every switch
CONFIGS: dict[str, dict[str, Any]] = {
    "head dim 8": {"n_embd": 32, "n_head": 4},
    "head dim 16, one head": {"n_embd": 16, "n_head": 1},
    "head dim 64": {"n_embd": 128, "n_head": 2},
    "head dim 80": {"n_embd": 160, "n_head": 2},
    "head dim 128": {"n_embd": 128, "n_head": 1},
    "odd width": {"n_embd": 75, "n_head": 5},
    "inverse layer scaling": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "unscaled": {"scale_attn_weights": False},
    "untied": {"tie_word_embeddings": False},
    "gelu": {"activation_function": "gelu"},
    "relu, inner 40": {"activation_function": "relu", "n_inner": 40},
    "silu, epsilon": {"activation_function": "silu", "layer_norm_epsilon": 1e-3},
    "one layer": {"n_layer": 1},
    "gpt-1": {"model_type": "openai-gpt"},
    "gpt-1, relu": {"model_type": "openai-gpt", "afn": "relu", "n_head": 2},
}


@cache
def pair(name: str) -> tuple[Any, GPT]:
    """(transformers' model, gptkern's), in fp32 and evaluation mode; tokens 0 and 1 end a text."""
    import transformers

    torch.manual_seed(len(name))
    fields = {
        "vocab_size": VOCAB,
        "n_positions": 96,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        # wide weights, so that tokens differ by far more than rounding does
        "initializer_range": 0.4,
    } | CONFIGS[name]
    if fields.pop("model_type", "gpt2") == "gpt2":
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields))
    else:
        theirs = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**fields))
    config = GPTConfig.from_dict(theirs.config.to_dict())
    theirs.generation_config.eos_token_id = None
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.min() == 1 else 0.0, std=0.1)
    if config.post_norm:
        # else every token predicts itself
        theirs.transformer.positions_embed.weight.data *= 6
    ours = GPT(config)
    ours.load_state_dict(_translated(theirs, ours))
    return theirs.eval(), ours.eval()


def _translated(theirs: Any, ours: GPT) -> dict[str, torch.Tensor]:
    """transformers' weights under gptkern's names; its Conv1D matrices are (in, out)."""
    conv = {name for name, module in theirs.named_modules() if type(module).__name__ == "Conv1D"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        name = name.replace("tokens_embed", "wte").replace("positions_embed", "wpe")
        state[name] = tensor.t() if owner in conv and leaf == "weight" else tensor
    return {name: state[name] for name in ours.state_dict()}


def prompts(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    """``(batch, seq)`` random ids, none of them an end of text."""
    return torch.randint(2, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of prompts of 9, 5 and 1 tokens."""
    ids, mask = prompts(3, 9, seed=5), torch.ones(3, 9, dtype=torch.int64)
    for row, padding in enumerate((0, 4, 8)):
        ids[row, :padding], mask[row, :padding] = 1, 0
    return ids, mask
