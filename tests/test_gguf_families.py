"""GGUF files of the families, named by the gguf library: parameters as written, logits of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from family_models import library_model
from gguf_files import Change, add_byte_tokenizer, blocks, finish, metadata
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from gptkern import backend
from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.gguf import open_file
from gptkern.engine.executors.cpu import CpuExecutor
from gptkern.engine.executors.persistent import PersistentExecutor
from gptkern.gpt import GPT
from gptkern.quantize import QuantizedLinear

WIDE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 317,
    "eos_token_id": 318,
    "pad_token_id": None,
}
LAYERS_OF_SEVEN = WIDE | {"num_hidden_layers": 7}
MODELS = {
    "llama": LlamaConfig(**WIDE, head_dim=32),
    "llama, tied": LlamaConfig(**WIDE, head_dim=32, tie_word_embeddings=True, attention_bias=True),
    "qwen2": Qwen2Config(**WIDE),
    "qwen2, tied": Qwen2Config(**WIDE, tie_word_embeddings=True),
    "qwen2, yarn": Qwen2Config(
        **WIDE,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen3": Qwen3Config(**WIDE, head_dim=64),
    "qwen3, tied": Qwen3Config(**WIDE, head_dim=32, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(
        **LAYERS_OF_SEVEN,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=5,
        final_logit_softcapping=20.0,
    ),
    "gemma3, linear, untied": Gemma3TextConfig(
        **LAYERS_OF_SEVEN,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=9,
        tie_word_embeddings=False,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "phi3, window": Phi3Config(**WIDE, sliding_window=5, original_max_position_embeddings=64),
    "phi3, no window, partial, tied": Phi3Config(
        **WIDE,
        tie_word_embeddings=True,
        sliding_window=None,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    ),
    # The library's frequencies change within a text where it is longer than the original context.
    "phi3, long": Phi3Config(
        **WIDE,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "long_factor": [1.0 + place / 4 for place in range(16)],
            "short_factor": [1.0] * 16,
            "original_max_position_embeddings": 16,
        },
    ),
}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
Format = Callable[[str], str]


def write(path: Path, theirs: Any, format: Format = lambda name: "F32", change: Change | None = None) -> None:
    """Write a model of transformers as llama.cpp's converter does; ``format`` of a matrix by GGUF's name.

    The model gets the numbers that the blocks stand for.
    """
    config = theirs.config
    kind = ARCHITECTURES[config.model_type]
    called = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "phi3":
        add_phi3(writer, config, head_dim)
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        add_rope(writer, config.rope_parameters.get("full_attention", config.rope_parameters))
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    add_byte_tokenizer(writer)
    if change is not None:
        change(writer, {})
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in theirs.named_parameters():
        stored = called.get_name(name, try_suffixes=(".weight", ".bias"))
        tensor, of_heads = parameter.data, heads.get(name.split(".")[-2], 0)
        if config.model_type == "llama" and of_heads:
            tensor = tensor.unflatten(0, (of_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            tensor = tensor + 1
            parameter.data.copy_(tensor - 1)
        chosen = format(stored) if tensor.dim() == 2 else "F32"
        if chosen == "F32":
            writer.add_tensor(stored, tensor.contiguous().numpy())
            continue
        kind = gguf.GGMLQuantizationType[chosen]
        data = blocks(chosen, tensor.contiguous().numpy())
        writer.add_tensor(stored, data, raw_dtype=kind)
        found = torch.from_numpy(gguf.dequantize(data, kind))
        if config.model_type == "llama" and of_heads:
            found = found.unflatten(0, (of_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        parameter.data.copy_(found)
    finish(writer)


def add_rope(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def add_phi3(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    """As the converter's ``Phi3MiniModel``: no length of heads, longrope by tensors, 0 for no window."""
    rope, original = config.rope_parameters, config.original_max_position_embeddings
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for kind in ("long", "short"):
            factors = np.array(rope[f"{kind}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)


def as_written(ours: GPT, theirs: Any) -> None:
    """Every parameter is the one that was written, to the bit."""
    expected = theirs.state_dict()
    for row in ours.config.family.named(len(ours.spec.layers)):  # type: ignore[union-attr]
        if row.theirs[0] in expected and not (ours.spec.tied and row.ours.startswith("lm_head")):
            owner, _, leaf = row.ours.rpartition(".")
            found = getattr(ours.get_submodule(owner), leaf)
            assert torch.equal(found, torch.cat([expected[name] for name in row.theirs])), row.ours


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs, path = library_model(MODELS[name]), tmp_path / "model.gguf"
    write(path, theirs)
    ours = GPT.from_pretrained(path)
    as_written(ours, theirs)
    ids = torch.randint(320, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)
    assert ours.config.eos_token_ids == (318,)


@pytest.mark.parametrize("name", ["gemma3", "phi3, window", "llama"])
def test_transformers_reads_the_file_as_we_do(name: str, tmp_path: Path) -> None:
    fields = MODELS[name].to_dict()
    # Where its reader has no word for a field it takes the class's default; a tied head it does not tie.
    if name == "gemma3":
        fields |= {"head_dim": 256, "query_pre_attn_scalar": 256, "final_logit_softcapping": None}
    if name == "phi3, window":
        fields["sliding_window"] = None
    theirs, path = library_model(type(MODELS[name])(**fields)), tmp_path / "model.gguf"
    write(path, theirs)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", pad_token_id=None).eval()
    if read.config.tie_word_embeddings:
        read.tie_weights()
    ids = torch.randint(320, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(path)(ids).logits, read(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma3", metadata(gemma3__attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0"),
        ("gemma3", metadata(gemma3__attention__sliding_window_pattern=0), "sliding_window_pattern is 0"),
        ("gemma3", metadata(gemma3__rope__dimension_count=16), "rope.dimension_count is 16"),
        ("gemma3", metadata(general__architecture="gemma2"), "served are gpt2, llama, .*gemma3, phi3"),
        ("phi3, window", metadata(phi3__rope__scaling__type="longrope"), "none, linear and yarn are served"),
        ("phi3, window", metadata(phi3__rope__dimension_count=15), "15 of a head's 32 elements"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    name: str, change: Change, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write(path, library_model(MODELS[name]), change=change)
    with pytest.raises(CheckpointError, match=message):
        open_file(path)


def test_gemma3s_layers_are_those_that_the_file_names(tmp_path: Path) -> None:
    theirs, path = library_model(MODELS["gemma3"]), tmp_path / "model.gguf"
    for given, windows in ((3, [2, 5]), ([True, False] * 3 + [True], [1, 3, 5]), (None, [5])):

        def change(writer: gguf.GGUFWriter, _: Any, given: Any = given) -> None:
            if given is not None:
                writer.add_sliding_window_pattern(given)

        write(path, theirs, change=change)
        layers = open_file(path).config.spec.layers
        assert [place for place, layer in enumerate(layers) if layer.window is None] == windows
        assert {layer.window for layer in layers} == {5, None}


# As llama.cpp's own Q4_0 has it: the head, or the embedding that it is tied to, in more bits.
LAYERS: Format = lambda name: "Q6_K" if name.startswith(("output", "token_embd")) else "Q4_0"  # noqa: E731
SOME: Format = lambda name: "Q4_0" if "ffn" in name or "blk.1.attn_output" in name else "Q8_0"  # noqa: E731


@pytest.mark.parametrize(("format", "floats"), [(LAYERS, 1), (SOME, 4)], ids=["all but the head", "some"])
@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen2", "qwen3, tied"])
def test_matrices_in_q4_0_stay_packed_beside_others(
    name: str, format: Format, floats: int, tmp_path: Path
) -> None:
    theirs, path = library_model(MODELS[name]), tmp_path / "model.gguf"
    write(path, theirs, format)
    with pytest.warns(UserWarning, match=rf"become floats: {9 - floats} of 9 matrices stay packed as int4"):
        ours = GPT.from_pretrained(path)
    assert ours.quantization is not None and len(ours.quantization.floats) == floats
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(layers) == 9 - floats and not layers.keys() & set(ours.quantization.floats)
    as_written(ours, theirs)
    ids = torch.randint(320, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-4)
    # both decode steps read each matrix in its own format
    assert CpuExecutor.serves(ours, torch.float32) is None
    found = ours.generate(ids[:, :9], max_new_tokens=8, eos_token_id=None)
    wanted = theirs.generate(ids[:, :9], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(found, wanted)
    with backend("kernel"):
        assert PersistentExecutor.serves(ours, torch.float32) is None
    # saved and opened it is the same, packed where it was
    ours.save_pretrained(tmp_path / "saved")
    again = GPT.from_pretrained(tmp_path / "saved")
    assert again.quantization == ours.quantization
    assert torch.equal(again(ids).logits, ours(ids).logits)
    if ours.spec.tied:
        assert again.lm_head.weight is again.transformer.wte.weight


def test_a_part_in_another_format_makes_the_whole_matrix_floats(tmp_path: Path) -> None:
    theirs, path = library_model(MODELS["llama"]), tmp_path / "model.gguf"
    write(path, theirs, lambda name: "Q6_K" if name == "blk.0.attn_v.weight" else "Q4_0")
    # queries and keys beside the values, and the embedding
    with pytest.warns(UserWarning, match=r"Q4_0 \(3 tensors\), Q6_K \(1 tensors\) become floats.* 8 of 9"):
        contents = open_file(path)
    assert contents.quantization is not None
    assert contents.quantization.floats == ("transformer.h.0.attn.c_attn",)
