"""One set of random weights as a gptkern model and as transformers': what end-to-end suites compare."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch

from gptkern.bench.problem import Unavailable
from gptkern.bench.suites._providers import installed
from gptkern.config import Config, GPTConfig
from gptkern.gpt import GPT

GPT2 = GPTConfig(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SMALL = GPT2.replace(n_layer=4, n_head=4, n_embd=256, vocab_size=8192, bos_token_id=None, eos_token_id=None)
LARGE = GPT2.replace(n_layer=48, n_head=25, n_embd=1600)


@lru_cache(maxsize=2)
def ours(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """A model with fresh weights, always the same ones: shared, so whoever changes it copies it first."""
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(0)
        return GPT(config).to(device=device, dtype=dtype).eval()


@lru_cache(maxsize=2)
def theirs(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' model with the same weights.

    Raises:
        Unavailable: transformers is not installed.
    """
    if not installed("transformers"):
        raise Unavailable("transformers is not installed: pip install 'gptkern[transformers]'")
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        ours(config, dtype, device).save_pretrained(folder)
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def exact(model: Any) -> Any:
    """A float64 copy."""
    return deepcopy(model).double()


def weight_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes of the weights that decoding reads for each token: all but the position table."""
    spec = config.spec
    layer = spec.qkv_width + spec.q_width + spec.fc_width + spec.inner
    return (len(spec.layers) * layer + spec.vocab_size) * spec.width * dtype.itemsize


def forward_flops(config: GPTConfig, batch: int, seq: int) -> float:
    """Operations of a forward pass with all logits, causal attention counted half."""
    linear = 2.0 * batch * seq * weight_bytes(config, torch.int8)
    return linear + config.n_layer * 2.0 * batch * seq * seq * config.n_embd
