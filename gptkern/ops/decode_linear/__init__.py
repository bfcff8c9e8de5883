from gptkern.ops.decode_linear.op import decode_linear, decode_qkv

__all__ = ["decode_linear", "decode_qkv"]
