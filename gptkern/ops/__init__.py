"""The kernels, one folder an op. Each works alone: nothing here knows of the model.

CUDA tensors run the Triton kernels, CPU tensors the PyTorch references.
"""

from gptkern.ops._dispatch import backend
from gptkern.ops.decode_attention import append_kv, decode_attention, flash_attn_with_kvcache
from gptkern.ops.decode_embed import decode_embed
from gptkern.ops.decode_linear import decode_linear, decode_qkv
from gptkern.ops.flash_attention import (
    flash_attention,
    flash_attention_varlen,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from gptkern.ops.gated_mlp import gated_mlp
from gptkern.ops.gelu_mlp import gelu_mlp
from gptkern.ops.layer_norm import add_layer_norm, layer_norm
from gptkern.ops.linear import linear, linear_act, linear_residual
from gptkern.ops.linear_cross_entropy import linear_cross_entropy
from gptkern.ops.rms_norm import add_rms_norm, rms_norm
from gptkern.ops.rotary import rotary
from gptkern.ops.sample import (
    SamplerState,
    SamplingParams,
    sample,
    sampling_probs,
    speculative_accept,
    top_k_logprobs,
)

__all__ = [
    "SamplerState",
    "SamplingParams",
    "add_layer_norm",
    "add_rms_norm",
    "append_kv",
    "backend",
    "decode_attention",
    "decode_embed",
    "decode_linear",
    "decode_qkv",
    "flash_attention",
    "flash_attention_varlen",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "gated_mlp",
    "gelu_mlp",
    "layer_norm",
    "linear",
    "linear_act",
    "linear_cross_entropy",
    "linear_residual",
    "rms_norm",
    "rotary",
    "sample",
    "sampling_probs",
    "speculative_accept",
    "top_k_logprobs",
]
