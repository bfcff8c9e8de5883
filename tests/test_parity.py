"""The model computes what transformers' GPT-2 and GPT-1 compute: logits, loss, every gradient, padding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from gptkern.checkpoint.contents import BLOCK_MATRICES, GPT1_NAMES
from gptkern.gpt import GPT

VOCAB, CONTEXT = 131, 48


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any]
    gpt1: bool = False

    def build(self) -> torch.nn.Module:
        kind, model = (OpenAIGPTConfig, OpenAIGPTLMHeadModel) if self.gpt1 else (GPT2Config, GPT2LMHeadModel)
        shape = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_layer": 3, "n_head": 2, "n_embd": 32}
        config = kind(**(shape | self.options), bos_token_id=0, eos_token_id=0)
        torch.manual_seed(7)
        reference = model(config).eval()
        # weights far from their initial values: biases and norms count, attention is not flat
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return reference


CASES = [
    Case("head_dim_8", {"n_embd": 32, "n_head": 4}),
    Case("head_dim_16", {"n_embd": 48, "n_head": 3}),
    Case("head_dim_64", {"n_embd": 128, "n_head": 2}),
    Case("head_dim_80", {"n_embd": 160, "n_head": 2}),
    Case("head_dim_128", {"n_embd": 128, "n_head": 1}),
    Case("odd_width", {"n_embd": 63, "n_head": 7}),
    Case("odd_everything", {"n_embd": 45, "n_head": 5, "n_inner": 77, "vocab_size": 97, "n_positions": 33}),
    Case("n_inner", {"n_inner": 20}),
    Case("inverse_layer_idx", {"scale_attn_by_inverse_layer_idx": True, "n_layer": 4}),
    Case("unscaled", {"scale_attn_weights": False}),
    Case("unscaled_inverse", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}),
    Case("upcast", {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    Case("untied", {"tie_word_embeddings": False}),
    Case("epsilon", {"layer_norm_epsilon": 1e-2}),
    *(
        Case(name, {"activation_function": name})
        for name in (
            "gelu_new",
            "gelu_pytorch_tanh",
            "gelu_fast",
            "gelu",
            "gelu_python",
            "relu",
            "silu",
            "swish",
        )
    ),
    Case("gpt1", {}, gpt1=True),
    Case("gpt1_untied", {"tie_word_embeddings": False, "n_embd": 63, "n_head": 7}, gpt1=True),
    *(Case(f"gpt1_{name}", {"afn": name}, gpt1=True) for name in ("relu", "silu", "swish")),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[torch.nn.Module, GPT]:
    """transformers' model, and ours read from what it saved."""
    reference = request.param.build()
    reference.save_pretrained(tmp_path)
    return reference, GPT.from_pretrained(tmp_path)


def tokens(model: GPT, batch: int = 3) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, model.config.n_positions - 1))


def theirs(model: GPT, name: str) -> str:
    """The name transformers gives that parameter."""
    for ours, gpt1 in GPT1_NAMES.items() if model.config.post_norm else ():
        name = name.replace(f"transformer.{ours}.", f"transformer.{gpt1}.")
    return name


def test_logits_loss_and_gradients(pair: tuple[torch.nn.Module, GPT]) -> None:
    reference, model = pair
    ids = tokens(model)
    labels = torch.where(torch.rand(ids.shape) < 0.2, -100, ids)
    expected, got = reference(ids, labels=labels), model(ids, labels=labels)
    assert (got.logits - expected.logits).abs().max() <= 1e-4
    assert abs(got.loss - expected.loss) <= 1e-5
    expected.loss.backward()
    got.loss.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert len(gradients) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        gradient = gradients[theirs(model, name)]
        gradient = gradient.t() if name.endswith(BLOCK_MATRICES) else gradient
        assert torch.linalg.norm(parameter.grad - gradient) <= 1e-4 * torch.linalg.norm(gradient), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(pair: tuple[torch.nn.Module, GPT], side: str) -> None:
    reference, model = pair
    ids = tokens(model)
    length = ids.shape[1]
    counts = torch.tensor([[length], [length // 2], [3]])
    places = torch.arange(length)
    mask = (places >= length - counts if side == "left" else places < counts).long()
    with torch.no_grad():
        expected, got = reference(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    assert (got - expected)[mask.bool()].abs().max() <= 1e-4


def test_positions_of_a_left_padded_batch(pair: tuple[torch.nn.Module, GPT]) -> None:
    reference, model = pair
    ids = tokens(model, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, position_ids=positions).logits
        got = model(ids, attention_mask=mask, position_ids=positions).logits
    assert (got - expected)[mask.bool()].abs().max() <= 1e-4
