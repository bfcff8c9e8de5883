"""Families: transformers' configurations and folders, read and written back, or refused by name."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS
from family_models import TINY, library_model, our_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, SmolLM3Config

from gptkern import GPT, GPTConfig
from gptkern.checkpoint.errors import CheckpointError
from gptkern.config import FamilyConfig, read

ONE_OF_EACH = list({config.model_type: name for name, config in reversed(CONFIGS.items())}.values())
LLAMA = {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}


def test_gpt_configurations_have_a_spec() -> None:
    config = GPTConfig(n_layer=2, scale_attn_by_inverse_layer_idx=True, bias=False, attn_pdrop=0.2)
    spec = config.spec
    assert (spec.width, spec.heads, spec.kv_heads, spec.head_dim, spec.inner) == (768, 12, 12, 64, 3072)
    assert [layer.attention_scale for layer in spec.layers] == [0.125, 0.0625]
    assert (spec.norm.kind, spec.norm.bias, spec.qkv_bias, spec.norm_place) == (
        "layer",
        False,
        False,
        "before",
    )
    assert (spec.attention_dropout, spec.learned_positions, spec.tied) == (0.2, True, True)
    assert read({"model_type": "openai-gpt"}).spec.norm_place == "after"


def test_llama() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    theirs = LlamaConfig(num_key_value_heads=4, num_hidden_layers=3, rope_theta=5e5, rope_scaling=scaling)
    config = read(theirs.to_dict())
    assert isinstance(config, FamilyConfig)
    spec = config.spec
    assert (spec.width, spec.heads, spec.kv_heads, spec.head_dim) == (4096, 32, 4, 128)
    assert (len(spec.layers), spec.gated, spec.activation, spec.tied) == (3, True, "silu", False)
    rotary = spec.layers[0].rotary
    assert rotary is not None and rotary.scaling is not None
    assert (rotary.dim, rotary.theta, rotary.scaling.kind) == (128, 5e5, "llama3")
    assert dict(rotary.scaling.values)["original_max_position_embeddings"] == 32
    # the names of before transformers 5
    old = read({**LLAMA, "rope_theta": 5e5, "rope_scaling": {**scaling, "type": "llama3"}})
    assert old.spec.layers[0].rotary == rotary.__class__(8, 5e5, "halves", rotary.scaling)


def test_smollm3_leaves_rotation_out_of_every_fourth_layer() -> None:
    theirs = SmolLM3Config(num_hidden_layers=8, use_sliding_window=True, sliding_window=5)
    for data in (theirs.to_dict(), {**theirs.to_dict(), "layer_types": None, "no_rope_layers": None}):
        layers = read(data).spec.layers
        assert [layer.rotary is None for layer in layers] == [i % 4 == 3 for i in range(8)]
        assert [layer.window for layer in layers] == [5 if i % 4 == 3 else None for i in range(8)]
        assert layers[0].rotary is not None and layers[0].rotary.theta == 2e6


def test_fields_are_attributes_and_copies_are_equal() -> None:
    config = FamilyConfig.from_dict({**LLAMA, "eos_token_id": [3, 4], "bos_token_id": None})
    assert (config.hidden_size, config.rms_norm_eps) == (48, 1e-6)
    assert (config.bos_token_id, config.eos_token_ids, config.tie_word_embeddings) == (None, (3, 4), False)
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    assert FamilyConfig.from_dict(config.to_dict()).spec == config.spec
    assert config.replace(num_hidden_layers=2).spec.layers == config.spec.layers[:2]
    assert LlamaConfig(**config.to_dict()).num_key_value_heads == 2
    with pytest.raises(AttributeError, match="FamilyConfig of llama has no 'n_embd'"):
        _ = config.n_embd


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4; a divisor of the 6 query heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 1}, "the width is 48, the number of heads 5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; 4096 at most"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; a positive integer"),
        ({"hidden_act": "xielu"}, "hidden_act is 'xielu'; accepted are"),
        ({"rms_norm_eps": "a"}, "rms_norm_eps is 'a'; a finite number"),
        ({"attention_bias": 1}, "attention_bias is 1; true or false"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0"),
        ({"head_dim": 7}, "7 of a head's 7 elements are rotated"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling has rope_type 'su'; served are default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear has no factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -1}}, "rope_parameters has factor -1"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0] * 4}},
            "short_factor .*a list of 4 numbers",
        ),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"num_local_experts": 8, "model_type": "mixtral"}, "num_local_experts is 8: mixtures of experts"),
        ({"layer_types": ["linear_attention"]}, "'linear_attention': linear attention is not served"),
        ({"model_type": "gpt_oss"}, "'gpt_oss': attention sinks are not served"),
        ({"model_type": "bert"}, "model_type is 'bert'; supported are gpt2, openai-gpt, llama, smollm3"),
        ({"model_type": None}, "model_type is None"),
        ({"is_causal": False}, "is_causal is False; True is needed"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True; False is needed"),
        ({"max_position_embeddings": 2**31 - 1}, "max_position_embeddings is 2147483647; 4194304 at most"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; served is 1.0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "factor is 0.5"),
        ({"rope_parameters": {"full_attention": {}}}, r"has 'full_attention' \{\}; one table for all layers"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_type": "default"}},
            "rope_parameters has 'rope_type' 'default'; a table for each kind of layer",
        ),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read({**LLAMA, **changes})


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_is_read_and_written_back_to_the_bit(tied: bool, tmp_path: Path) -> None:
    theirs = library_model(
        LlamaConfig(
            **TINY, num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied
        )
    )
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    model = GPT.from_pretrained(tmp_path / "theirs")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "ours", max_shard_size="40KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.to_dict() == {**theirs.config.to_dict(), "_name_or_path": str(tmp_path / "ours")}
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # the decoder alone, as the base class saves it
    theirs.model.save_pretrained(tmp_path / "base")
    if tied:
        assert torch.equal(GPT.from_pretrained(tmp_path / "base")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantised_models_are_saved_and_read(format: str, tmp_path: Path) -> None:
    theirs = library_model(
        LlamaConfig(
            **{**TINY, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}, head_dim=32
        )
    )
    theirs.save_pretrained(tmp_path / "theirs")
    model = GPT.from_pretrained(tmp_path / "theirs", weights=format)
    model.save_pretrained(tmp_path / "ours")
    again = GPT.from_pretrained(tmp_path / "ours")
    assert again.quantization == model.quantization
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config == model.config


def test_damaged_folders_are_refused_by_name(tmp_path: Path) -> None:
    config = LlamaConfig(**TINY, num_key_value_heads=2)
    theirs = library_model(config)
    good = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    name = "model.layers.1.self_attn.k_proj.weight"

    def refused(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            GPT.from_pretrained(tmp_path)

    config.save_pretrained(tmp_path)
    refused({k: v for k, v in good.items() if k != name}, f"q_proj.weight is there, {name} is missing")
    refused({**good, name: good[name][:, :8].clone()}, "rows have one length expected, found: .*k_proj")
    refused({**good, name: good[name][:8].clone()}, r"k_proj.*\(80, 48\) expected, \(72, 48\) found")
    gone = "model.layers.1.mlp.down_proj.weight"
    refused({k: v for k, v in good.items() if k != gone}, f"1 missing: {gone}")
    refused(
        {**good, "model.layers.1.self_attn.q_norm.weight": torch.ones(8)}, "1 not of a llama model: .*q_norm"
    )
    fewer = {k: v for k, v in good.items() if ".layers.2." not in k}
    refused(fewer, "3 layers expected, 2 found")
    refused({"transformer.h.0.ln_1.weight": torch.ones(48)}, "no tensor of a llama model: transformer.h.0")


@pytest.mark.parametrize("name", CONFIGS)
def test_folders_of_every_family_are_read_and_written_back_to_the_bit(name: str, tmp_path: Path) -> None:
    theirs = library_model(CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    model = GPT.from_pretrained(tmp_path / "theirs")
    # Longer than longrope's first context: transformers takes other frequencies up to there.
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    expected = theirs.state_dict()
    assert again.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(again[key], tensor), key


# Fields that some families go by and others do not, with values that change the numbers where they count.
FIELDS: dict[str, Any] = {
    "is_causal": False,
    "partial_rotary_factor": 0.5,
    "rope_theta": 5.0,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "original_max_position_embeddings": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
    "embedding_multiplier": 3.0,
    "scale_attn_weights": False,
    "head_dim": 16,
    "use_parallel_residual": False,
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_field_counts_as_in_transformers_or_is_refused(name: str, tmp_path: Path) -> None:
    library_model(CONFIGS[name]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    ids = torch.arange(2, 22)[None]
    for field, value in FIELDS.items():
        if field == "layer_types":
            value = (value * 3)[: CONFIGS[name].num_hidden_layers]
        gone = ("rope_parameters",) if field in ("rope_theta", "partial_rotary_factor") else ()
        file.write_text(
            json.dumps({key: v for key, v in written.items() if key not in gone} | {field: value})
        )
        try:
            ours = GPT.from_pretrained(tmp_path)(ids).logits
        except CheckpointError:
            continue
        try:
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")(ids).logits
        except (AttributeError, TypeError):
            assert field == "layer_types" and value.count("sliding_attention")
            continue  # a window that the configuration does not have
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3, msg=f"{name}: {field}")


def test_explain_names_a_familys_ops() -> None:
    model = our_model(library_model(CONFIGS["qwen3"]))
    routes = {route.part: route.reason for route in model.explain()}
    assert (routes["norm"], routes["mlp"]) == ("rms_norm and add_rms_norm", "gated_mlp")
