from gptkern.ops.decode_linear.formats import QuantizedWeight, quantize
from gptkern.ops.decode_linear.op import decode_linear, decode_qkv

__all__ = ["QuantizedWeight", "decode_linear", "decode_qkv", "quantize"]
