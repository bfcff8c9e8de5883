from gptkern.ops.decode_attention.op import append_kv, decode_attention

__all__ = ["append_kv", "decode_attention"]
