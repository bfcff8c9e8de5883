"""GGUF's names of architectures and of tensors, as transformers has them.

Source: the tables of the ``gguf`` package and convert_hf_to_gguf.py of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptkern.checkpoint.errors import CheckpointError, shown
from gptkern.checkpoint.gguf_file import GGUFFile

# What the frequencies of rotary positions are divided by: Llama 3's, and longrope's for long and short texts.
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
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
_GEMMA3_BLOCK = _BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Queries, keys and values in one matrix, and gate and up in another, as in transformers.
_PHI3_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
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
        unit_offset: Weights of norms are stored with 1 added to them.
        factors: Tensors that the configuration is made of.
    """

    model_type: str
    outer: dict[str, str]
    block: dict[str, str]
    layer: str
    paired: bool = False
    unit_offset: bool = False
    factors: tuple[str, ...] = ()

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
    "llama": Architecture("llama", _OUTER, _BLOCK, _LAYER, paired=True, factors=(ROPE_FACTORS,)),
    "qwen2": Architecture("qwen2", _OUTER, _BLOCK, _LAYER),
    "qwen3": Architecture("qwen3", _OUTER, _BLOCK, _LAYER),
    "gemma3": Architecture("gemma3_text", _OUTER, _GEMMA3_BLOCK, _LAYER, unit_offset=True),
    "phi3": Architecture("phi3", _OUTER, _PHI3_BLOCK, _LAYER, factors=(LONG_FACTORS, SHORT_FACTORS)),
}


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
