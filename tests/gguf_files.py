"""Small GGUF files, written by the gguf library as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gptkern.tokenizer.streams import byte_chars

Change = Callable[[gguf.GGUFWriter, dict[str, np.ndarray]], None]
GPT2 = {"width": 256, "heads": 4, "layers": 2, "inner": 512, "vocab": 320, "context": 64}
LLAMA = {"width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "layers": 2, "inner": 96, "vocab": 320}


def gpt2_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a GPT-2 under GGUF's names, fp32."""
    random = np.random.default_rng(seed)
    width, inner = GPT2["width"], GPT2["inner"]

    def draw(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    tensors = {"token_embd.weight": draw(GPT2["vocab"], width), "position_embd.weight": draw(64, width)}
    for layer in range(GPT2["layers"]):
        for name, shape in (
            ("attn_qkv", (3 * width, width)),
            ("attn_output", (width, width)),
            ("ffn_up", (inner, width)),
            ("ffn_down", (width, inner)),
        ):
            tensors[f"blk.{layer}.{name}.weight"] = draw(*shape)
            tensors[f"blk.{layer}.{name}.bias"] = draw(shape[0])
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = 1 + draw(width)
            tensors[f"blk.{layer}.{name}.bias"] = draw(width)
    return tensors | {"output_norm.weight": 1 + draw(width), "output_norm.bias": draw(width)}


def blocks(format: str, matrix: np.ndarray) -> np.ndarray:
    """A matrix in blocks of ``format``: quantised, or for a format with a K random blocks of its shape."""
    kind = gguf.GGMLQuantizationType[format]
    if not format.endswith("_K"):
        return gguf.quantize(matrix, kind)
    random = np.random.default_rng(matrix.size)
    rows, size = matrix.shape[0], gguf.GGML_QUANT_SIZES[kind][1]
    data = random.integers(0, 256, (rows, matrix.shape[1] // 256, size), dtype=np.uint8)
    scales = (random.random((rows, data.shape[1], 2)) * 1e-3).astype(np.float16).view(np.uint8)
    if format == "Q4_K":
        data[..., :4] = scales
    else:
        data[..., -2:] = scales[..., :2]
    return data.reshape(rows, -1)


def write_gpt2(
    path: Path, format: str | Mapping[str, str] = "F32", change: Change | None = None
) -> dict[str, np.ndarray]:
    """Write a GPT-2, its matrices in a format, or each in its own by tensor names; its tensors."""
    tensors = gpt2_tensors()
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(GPT2["context"])
    writer.add_embedding_length(GPT2["width"])
    writer.add_feed_forward_length(GPT2["inner"])
    writer.add_block_count(GPT2["layers"])
    writer.add_head_count(GPT2["heads"])
    writer.add_layer_norm_eps(1e-5)
    add_byte_tokenizer(writer)
    if change is not None:
        change(writer, tensors)
    for name, tensor in tensors.items():
        chosen = format if isinstance(format, str) else format.get(name, "F32")
        if tensor.ndim < 2 or name.startswith("position"):
            chosen = "F32"
        if chosen == "F32":
            writer.add_tensor(name, tensor)
        elif chosen == "F16":
            writer.add_tensor(name, tensor.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType[chosen]
            writer.add_tensor(name, blocks(chosen, tensor), raw_dtype=kind)
    finish(writer)
    return tensors


def write_llama(path: Path, change: Change | None = None) -> dict[str, np.ndarray]:
    """Write a Llama in fp32, rows in the converter's order; its tensors by transformers' names."""
    random = np.random.default_rng(0)
    width, inner, head_dim = LLAMA["width"], LLAMA["inner"], LLAMA["head_dim"]
    q, kv = LLAMA["heads"] * head_dim, LLAMA["kv_heads"] * head_dim
    theirs: dict[str, np.ndarray] = {"model.embed_tokens.weight": random.standard_normal((320, width))}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(LLAMA["layers"]):
        for name, ours, shape in (
            ("self_attn.q_proj", "attn_q", (q, width)),
            ("self_attn.k_proj", "attn_k", (kv, width)),
            ("self_attn.v_proj", "attn_v", (kv, width)),
            ("self_attn.o_proj", "attn_output", (width, q)),
            ("mlp.gate_proj", "ffn_gate", (inner, width)),
            ("mlp.up_proj", "ffn_up", (inner, width)),
            ("mlp.down_proj", "ffn_down", (width, inner)),
            ("input_layernorm", "attn_norm", (width,)),
            ("post_attention_layernorm", "ffn_norm", (width,)),
        ):
            key = f"model.layers.{layer}.{name}.weight"
            theirs[key] = random.standard_normal(shape)
            names[key] = f"blk.{layer}.{ours}.weight"
    theirs["model.norm.weight"] = random.standard_normal(width)
    theirs = {name: (tensor * 0.1).astype(np.float32) for name, tensor in theirs.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(LLAMA["layers"])
    writer.add_head_count(LLAMA["heads"])
    writer.add_head_count_kv(LLAMA["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(head_dim)
    add_byte_tokenizer(writer)
    stored = {names[name]: _side_by_side(name, tensor) for name, tensor in theirs.items()}
    if change is not None:
        change(writer, stored)
    for name, tensor in stored.items():
        writer.add_tensor(name, tensor)
    finish(writer)
    return theirs


def _side_by_side(name: str, tensor: np.ndarray) -> np.ndarray:
    """The converter's order of rows: element i of a head beside i + head_dim / 2, which it rotates with."""
    heads = {"q_proj": LLAMA["heads"], "k_proj": LLAMA["kv_heads"]}.get(name.split(".")[-2], 0)
    if not heads:
        return tensor
    rows, half = range(len(tensor)), LLAMA["head_dim"] // 2
    order = [row - row % (2 * half) + (row % 2) * half + row % (2 * half) // 2 for row in rows]
    return tensor[order]


def add_byte_tokenizer(writer: gguf.GGUFWriter, pre: str = "gpt-2") -> None:
    """A tokenizer of 256 bytes and a few merges, with two control tokens and a user's."""
    tokens = [*byte_chars(), "he", "ll", "hell", "Ġw", "12", "123", *(f"[{n}]" for n in range(55))]
    tokens += ["<s>", "</s>", "<tool>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 317 + [3, 3, 4])
    writer.add_token_merges(["h e", "l l", "he ll", "Ġ w", "1 2", "12 3"])
    writer.add_bos_token_id(317)
    writer.add_eos_token_id(318)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata(**fields: Any) -> Change:
    """A change that sets text fields."""

    def change(writer: gguf.GGUFWriter, _: dict[str, np.ndarray]) -> None:
        for name, value in fields.items():
            writer.kv_data[0].pop(name.replace("__", "."), None)
            if isinstance(value, str):
                writer.add_string(name.replace("__", "."), value)
            elif isinstance(value, bool):
                writer.add_bool(name.replace("__", "."), value)
            elif isinstance(value, int):
                writer.add_uint32(name.replace("__", "."), value)
            else:
                writer.add_float32(name.replace("__", "."), value)

    return change
