"""GGUF metadata as the fields of a ``config.json``.

What llama.cpp's converter does to a model is undone here, its factors of rotary positions, which it stores as
tensors, among it. What a file does not say is what llama.cpp takes. Source: convert_hf_to_gguf.py and
src/llama-model.cpp of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptkern.checkpoint.errors import CheckpointError, shown
from gptkern.checkpoint.gguf_file import GGUFFile
from gptkern.checkpoint.gguf_names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, architecture
from gptkern.checkpoint.gguf_tensors import Part, parameter

# Every Llama 3 was trained with these; the factor differs.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


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
    own = {"gpt2": _gpt2, "gemma3_text": _gemma3, "phi3": _phi3}.get(found.model_type, _llama)
    return own(_Metadata(file)) | {"model_type": found.model_type} | special_ids(file)


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


def _llama(read: _Metadata, *, partial: bool = False) -> dict[str, Any]:
    """Fields of Llama and its kin; with ``partial`` only the first elements of a head may rotate."""
    tensors, heads = read.file.tensors, read.required("attention.head_count")
    head_dim = read.integer("attention.key_length", read.required("embedding_length") // heads)
    for name in ("attention.value_length", *(() if partial else ("rope.dimension_count",))):
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


def _gemma3(read: _Metadata) -> dict[str, Any]:
    fields = _llama(read) | {"hidden_activation": "gelu_pytorch_tanh"}
    layers, head_dim = fields["num_hidden_layers"], fields["head_dim"]
    if cap := read.number("attn_logit_softcapping", None):
        raise CheckpointError(
            f"{read.file.path}: {read.prefix}.attn_logit_softcapping is {cap}; Gemma 3's scores have no cap"
        )
    return fields | {
        "rope_theta": read.number("rope.freq_base", 1e6),
        "rope_local_base_freq": read.number("rope.freq_base_swa", 1e4),
        "layer_types": _gemma3_layers(read, layers),
        "sliding_window": read.integer("attention.sliding_window", None),
        # No file says it. The model of 62 layers (27B) alone has another scale than its heads' length gives.
        "query_pre_attn_scalar": fields["hidden_size"] // fields["num_attention_heads"]
        if layers == 62
        else head_dim,
        "final_logit_softcapping": read.number("final_logit_softcapping", None),
    }


def _gemma3_layers(read: _Metadata, count: int) -> list[str]:
    """The layers' kinds: all but every sixth attend within a window, unless the file says otherwise."""
    name = f"{read.prefix}.attention.sliding_window_pattern"
    pattern = read.file.fields.get(name, 6)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        pattern = [(layer + 1) % pattern != 0 for layer in range(count)]
    if not isinstance(pattern, list) or len(pattern) != count:
        needed = f"a whole number above 0, or a switch for each of {count} layers, is needed"
        raise CheckpointError(f"{read.file.path}: {name} is {shown(pattern)}; {needed}")
    if f"{read.prefix}.attention.sliding_window" not in read.file.fields:
        pattern = [False] * count
    return ["sliding_attention" if windowed else "full_attention" for windowed in pattern]


def _phi3(read: _Metadata) -> dict[str, Any]:
    fields = _llama(read, partial=True)
    head_dim = fields["head_dim"]
    fields |= {
        "partial_rotary_factor": read.integer("rope.dimension_count", head_dim) / head_dim,
        # 0 of Phi 4, which has none.
        "sliding_window": read.integer("attention.sliding_window", None, least=0) or None,
    }
    original = read.integer("rope.scaling.original_context_length", None)
    fields |= {} if original is None else {"original_max_position_embeddings": original}
    stored = [name for name in (LONG_FACTORS, SHORT_FACTORS) if name in read.file.tensors]
    if not stored:
        return fields
    if len(stored) == 1:
        raise CheckpointError(f"{read.file.path}: {LONG_FACTORS} and {SHORT_FACTORS} belong together")
    long, short = (_numbers(read.file, name) for name in stored)
    scaling = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    if (factor := read.number("rope.scaling.attn_factor", None)) is not None:
        scaling["attention_factor"] = factor
    return fields | {"rope_scaling": scaling}


def _numbers(file: GGUFFile, name: str) -> list[float]:
    """A tensor's numbers, each as its shortest decimal in fp32."""
    stored = parameter(file, [Part(file.tensors[name])]).data.float().ravel()
    return [float(str(np.float32(value))) for value in stored.tolist()]


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
