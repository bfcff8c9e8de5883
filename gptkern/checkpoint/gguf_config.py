"""GGUF metadata as the fields of a ``config.json``, and GGUF's tensor names as those of transformers.

What llama.cpp's converter does to a model is undone here: names, and the factors of Llama 3's rotary
positions, which it stores as a tensor. Source: convert_hf_to_gguf.py of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gptkern.checkpoint.errors import CheckpointError, shown
from gptkern.checkpoint.gguf_file import GGUFFile
from gptkern.checkpoint.gguf_tensors import Part, parameter

ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}


@dataclass(frozen=True)
class Architecture:
    """A value of ``general.architecture``.

    Attributes:
        model_type: That of transformers.
        outer, block, layer: transformers' names of tensors outside of layers and in them, and what stands
            before the latter.
        paired: The rows of queries and keys are stored with the pairs that rotate together side by side.
    """

    model_type: str
    outer: dict[str, str]
    block: dict[str, str]
    layer: str
    paired: bool = False

    def their_name(self, name: str) -> str | None:
        """transformers' name of a tensor; None for what it does not have."""
        stem, _, suffix = name.rpartition(".")
        if stem in self.outer:
            return f"{self.outer[stem]}.{suffix}"
        parts = stem.split(".")
        if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in self.block:
            return f"{self.layer}{int(parts[1])}.{self.block[parts[2]]}.{suffix}"
        return None


_LAYER = "model.layers."
ARCHITECTURES = {
    "gpt2": Architecture("gpt2", _GPT2_OUTER, _GPT2_BLOCK, "transformer.h."),
    "llama": Architecture("llama", _OUTER, _BLOCK, _LAYER, paired=True),
    "qwen2": Architecture("qwen2", _OUTER, _BLOCK, _LAYER),
    "qwen3": Architecture("qwen3", _OUTER, _BLOCK, _LAYER),
}
# Every Llama 3 was trained with these; the factor differs.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def architecture(file: GGUFFile) -> Architecture:
    """The architecture of a file.

    Raises:
        CheckpointError: It is not served.
    """
    name = file.fields.get("general.architecture")
    found = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if found is None:
        raise CheckpointError(
            f"{file.path}: general.architecture is {shown(name)}; served are {', '.join(ARCHITECTURES)}"
        )
    return found


def config_fields(file: GGUFFile) -> dict[str, Any]:
    """The ``config.json`` that transformers has for the model.

    Raises:
        CheckpointError: Metadata missing or of the wrong type, or a part that is not served.
    """
    found = architecture(file)
    # A specification has an entry for each layer: a damaged count must not make billions.
    layers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if (count := _Metadata(file).required("block_count")) != len(layers):
        raise CheckpointError(f"{file.path}: {count} layers expected, {len(layers)} found")
    fields = _gpt2(_Metadata(file)) if found.model_type == "gpt2" else _llama(_Metadata(file))
    return fields | {"model_type": found.model_type} | special_ids(file)


def special_ids(file: GGUFFile) -> dict[str, Any]:
    """Ids of special tokens under transformers' names; an end of turn ends an answer, too."""
    read = _Metadata(file, "tokenizer.ggml")
    begin, pad = read.integer("bos_token_id", None, least=0), read.integer("padding_token_id", None, least=0)
    ends = [read.integer(f"{name}_token_id", None, least=0) for name in ("eos", "eot", "eom")]
    distinct = list(dict.fromkeys(token for token in ends if token is not None))
    end = distinct[0] if len(distinct) == 1 else distinct or None
    ids = {"bos_token_id": begin, "eos_token_id": end}
    return ids if pad is None else ids | {"pad_token_id": pad}


class _Metadata:
    """Metadata of one architecture, checked as it is read."""

    def __init__(self, file: GGUFFile, prefix: str | None = None) -> None:
        self.file, self.prefix = file, prefix or file.fields["general.architecture"]

    def integer(self, name: str, default: int | None, *, least: int = 1) -> Any:
        """A whole number.

        Raises:
            CheckpointError: It is missing and has no default (0 stands for none), or is something else.
        """
        return self._checked(name, default, int, f"a whole number, {least} or more,", least)

    def number(self, name: str, default: float | None) -> Any:
        """A number, as its shortest decimal in fp32: 1e-5 and not 9.99999975e-6."""
        value = self._checked(name, default, (int, float), "a number", None)
        return None if value is None else float(str(np.float32(value)))

    def text(self, name: str) -> str | None:
        """Text; None where there is none."""
        value: str | None = self._checked(name, None, str, "text", None)
        return value

    def required(self, name: str) -> Any:
        """A whole number that every file has."""
        if f"{self.prefix}.{name}" not in self.file.fields:
            raise CheckpointError(f"{self.file.path}: {self.prefix}.{name} is missing")
        return self.integer(name, None)

    def _checked(self, name: str, default: Any, kind: Any, needed: str, least: int | None) -> Any:
        value = self.file.fields.get(f"{self.prefix}.{name}", default)
        good = isinstance(value, kind) and not isinstance(value, bool) and (least is None or value >= least)
        if value is None or good:
            return value
        raise CheckpointError(f"{self.file.path}: {self.prefix}.{name} is {shown(value)}; {needed} is needed")


def _vocabulary(file: GGUFFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: token_embd.weight is missing")
    return file.tensors["token_embd.weight"].shape[0]


def _gpt2(read: _Metadata) -> dict[str, Any]:
    return {
        "vocab_size": _vocabulary(read.file),
        "n_positions": read.required("context_length"),
        "n_embd": read.required("embedding_length"),
        "n_layer": read.required("block_count"),
        "n_head": read.required("attention.head_count"),
        "n_inner": read.integer("feed_forward_length", None),
        "layer_norm_epsilon": read.number("attention.layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": "output.weight" not in read.file.tensors,
    }


def _llama(read: _Metadata) -> dict[str, Any]:
    tensors, heads = read.file.tensors, read.required("attention.head_count")
    head_dim = read.integer("attention.key_length", read.required("embedding_length") // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if read.integer(name, head_dim) != head_dim:
            raise CheckpointError(
                f"{read.file.path}: {read.prefix}.{name} is {read.integer(name, None)}, the head's length "
                f"{head_dim}: they must be equal"
            )
    fields = {
        "vocab_size": _vocabulary(read.file),
        "hidden_size": read.required("embedding_length"),
        "intermediate_size": read.required("feed_forward_length"),
        "num_hidden_layers": read.required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": read.required("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": read.number("rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if (experts := read.integer("expert_count", 0, least=0)) > 0:
        fields["num_local_experts"] = experts
    scaling = _rope_scaling(read, fields)
    return fields if scaling is None else fields | {"rope_scaling": scaling}


def _rope_scaling(read: _Metadata, fields: dict[str, Any]) -> dict[str, Any] | None:
    kind = read.text("rope.scaling.type")
    if ROPE_FACTORS in read.file.tensors:
        return _llama3(read.file, fields)
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"{read.file.path}: {read.prefix}.rope.scaling.type is {shown(kind)}; none, linear and yarn are "
            "served"
        )
    scaling = {"rope_type": kind, "factor": read.number("rope.scaling.factor", 1.0)}
    original = read.integer("rope.scaling.original_context_length", None)
    return scaling if original is None else scaling | {"original_max_position_embeddings": original}


def _llama3(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling: the tensor holds what each frequency is divided by, its largest being the factor.

    Raises:
        CheckpointError: The tensor is none that Llama 3's numbers give.
    """
    stored = parameter(file, [Part(file.tensors[ROPE_FACTORS])]).data.double().numpy().ravel()
    dim, factor = fields["head_dim"], float(stored.max())
    low, high, original = _LLAMA3.values()
    turns = original * fields["rope_theta"] ** (-np.arange(0, dim, 2) / dim) / (2 * np.pi)
    # between high and low the divisors go over from 1 to the factor
    smooth = ((turns - low) / (high - low)).clip(0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4, atol=0.0):
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS}: the divisors of Llama 3's rotary positions expected, others found"
        )
    return {"rope_type": "llama3", "factor": float(str(np.float32(factor))), **_LLAMA3}
