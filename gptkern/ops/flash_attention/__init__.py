from gptkern.ops.flash_attention.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from gptkern.ops.flash_attention.op import flash_attention, flash_attention_varlen

__all__ = [
    "flash_attention",
    "flash_attention_varlen",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
]
