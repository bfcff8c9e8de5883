"""The model whose ``generate`` the tests of packs record: one that compiles in seconds."""

from __future__ import annotations

import torch

from gptkern.config import GPTConfig
from gptkern.gpt import GPT


def model() -> GPT:
    """Fresh weights, which no launch reads."""
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=64, vocab_size=96, n_positions=48, bos_token_id=None, eos_token_id=None
    )
    return GPT(config).to(torch.bfloat16).eval()
