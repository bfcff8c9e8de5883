"""Small checkpoints in the formats of other programs, for several test files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

VOCAB, PADDED_VOCAB, CONTEXT, WIDTH, LAYERS, HEADS = 115, 128, 24, 32, 2, 4
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def reference(**options: Any) -> GPT2LMHeadModel:
    """transformers' GPT-2 with weights of which none is zero or one."""
    shape = {
        "vocab_size": VOCAB,
        "n_positions": CONTEXT,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = GPT2LMHeadModel(GPT2Config(**(shape | options))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def linear_layout(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    """The model's tensors with (out, in) matrices, as nanoGPT and llm.c store them."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {name: t.t().contiguous() if name.endswith(MATRICES) else t for name, t in tensors.items()}


def write_nanogpt(path: Path, model: GPT2LMHeadModel, *, bias: bool, prefix: str = "", **extra: Any) -> None:
    """Write a file as nanoGPT's train.py does; without ``bias`` the model's biases must be zero."""
    tensors = {
        prefix + name: tensor
        for name, tensor in linear_layout(model).items()
        if bias or not name.endswith("bias")
    }
    config = model.config
    checkpoint = {
        "model": tensors,
        "optimizer": {
            "state": {0: {"exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}],
        },
        "model_args": {
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "block_size": config.n_positions,
            "bias": bias,
            "vocab_size": config.vocab_size,
            "dropout": 0.0,
        },
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "compile": True},
    }
    checkpoint["model_args"] |= extra
    torch.save(checkpoint, path)


def write_llmc(path: Path, model: GPT2LMHeadModel, version: int) -> None:
    """Write a file as llm.c's gpt2_write_to_checkpoint does."""
    tensors = linear_layout(model)
    header = torch.zeros(256, dtype=torch.int32)
    header[:8] = torch.tensor([20240326, version, CONTEXT, VOCAB, LAYERS, HEADS, WIDTH, PADDED_VOCAB])
    padding = torch.zeros(PADDED_VOCAB - VOCAB, WIDTH)
    parts = [tensors["transformer.wte.weight"], padding, tensors["transformer.wpe.weight"]]
    block = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for name in (f"{module}.{kind}" for module in block for kind in ("weight", "bias")):
        parts += [tensors[f"transformer.h.{layer}.{name}"] for layer in range(LAYERS)]
    parts += [tensors["transformer.ln_f.weight"], tensors["transformer.ln_f.bias"]]
    dtype = {3: torch.float32, 5: torch.bfloat16}[version]
    with path.open("wb") as file:
        header.numpy().tofile(file)
        for part in parts:
            part.to(dtype).flatten().view(torch.uint8).numpy().tofile(file)
