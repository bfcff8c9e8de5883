from gptkern.ops.decode_attention.kvcache import flash_attn_with_kvcache
from gptkern.ops.decode_attention.op import append_kv, decode_attention

__all__ = ["append_kv", "decode_attention", "flash_attn_with_kvcache"]
