"""The stages of a decoder, interpreted in plain PyTorch, are the decoder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptkern import GPT, GPTConfig
from gptkern.model.program import NormAt, Stage, program
from gptkern.model.spec import DecoderSpec, LayerSpec, NormSpec
from gptkern.model.weights import DecoderWeights, decoder_weights
from gptkern.ops.decode_step import Linear
from gptkern.ops.linear.reference import ACTIVATIONS

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


class Interpreter:
    """Runs the stages over the tokens of one sequence, with whole matrices and no cache."""

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights) -> None:
        self.spec, self.weights = spec, weights
        self.buffers: dict[str, torch.Tensor] = {}
        self.kv: tuple[torch.Tensor, torch.Tensor] | None = None

    def run(self, tokens: list[int]) -> torch.Tensor:
        first, *stages = program(self.spec)
        assert self.weights.positions is not None
        self.buffers[first.write] = self.weights.tokens[tokens] + self.weights.positions[: len(tokens)]
        for stage in stages:
            self.buffers[stage.write] = getattr(self, stage.kind)(stage)
        return self.buffers["logits"]

    def qkv(self, stage: Stage) -> torch.Tensor:
        spec = self.spec
        q, k, v = self.linear(stage).split([spec.q_width, spec.kv_width, spec.kv_width], dim=-1)
        self.kv = k, v
        return q

    def attention(self, stage: Stage) -> torch.Tensor:
        assert stage.read is not None and self.kv is not None
        tensors = (self.buffers[stage.read], *self.kv)
        q, k, v = (t.unflatten(-1, (-1, self.spec.head_dim)).transpose(0, 1) for t in tensors)
        scale = self.spec.layers[stage.layer].attention_scale
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1).flatten(1)

    def linear(self, stage: Stage) -> torch.Tensor:
        assert stage.read is not None and stage.weight is not None
        x = self.buffers[stage.read]
        if stage.norm is not None:
            weight, bias = self.weights.norm(stage.norm)
            x = F.layer_norm(x, x.shape[-1:], weight, bias, self.spec.norm.eps)
        if stage.save is not None:
            self.buffers[stage.save] = x
        matrix: Linear = self.weights.matrix(stage.layer, stage.weight)
        assert isinstance(matrix.weight, torch.Tensor)
        x = F.linear(x, matrix.weight, matrix.bias)
        if stage.activated:
            x = ACTIVATIONS[self.spec.activation](x)
        return x if stage.residual is None else x + self.buffers[stage.residual]


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_stages_are_the_decoder(model_type: str) -> None:
    torch.manual_seed(0)
    config = GPTConfig(
        **{"vocab_size": 11, "n_positions": 16, "n_layer": 3, "n_head": 2, "n_embd": 16},
        **{"model_type": model_type, "bos_token_id": None, "eos_token_id": None},
    )
    model = GPT(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        logits = Interpreter(model.spec, decoder_weights(model)).run(TOKENS)
        torch.testing.assert_close(logits, model(torch.tensor([TOKENS])).logits[0], rtol=1e-10, atol=1e-10)


def _spec(**changes: object) -> DecoderSpec:
    spec = DecoderSpec(11, 16, 8, 2, 1, 4, 16, (LayerSpec(0.5), LayerSpec(0.5)), NormSpec("rms", 1e-5))
    return spec.replace(**changes)


def _rows(spec: DecoderSpec, layer: int) -> list[tuple[object, ...]]:
    return [
        (stage.weight or stage.kind, stage.read, stage.norm, stage.residual, stage.write)
        for stage in program(spec)
        if stage.layer == layer and stage.kind != "embed" and stage.weight != "head"
    ]


def test_norms_of_branches_are_stages_of_their_own() -> None:
    for place, first, second, after in (
        ("branch", None, None, ("ln_1", "ln_2")),
        ("both", NormAt(1, "ln_1"), NormAt(1, "ln_2"), ("post_attn_norm", "post_mlp_norm")),
    ):
        assert _rows(_spec(norm_place=place), 1) == [
            ("qkv", "x", first, None, "q"),
            ("attention", "q", None, None, "attended"),
            ("out", "attended", None, None, "branch"),
            ("add_norm", "branch", NormAt(1, after[0]), "x", "middle"),
            ("fc", "middle", second, None, "inner"),
            ("proj", "inner", None, None, "branch"),
            ("add_norm", "branch", NormAt(1, after[1]), "middle", "x"),
        ]


@pytest.mark.parametrize(("shared", "norm"), [(False, "ln_2"), (True, "ln_1")])
def test_parallel_branches_read_the_layers_input(shared: bool, norm: str) -> None:
    rows = _rows(_spec(parallel=True, shared_norm=shared), 0)
    assert rows[3] == ("fc", "x", NormAt(0, norm), None, "inner")
    assert rows[4] == ("proj", "inner", None, "middle", "x")
