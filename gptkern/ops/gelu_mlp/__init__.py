from gptkern.ops.gelu_mlp.op import gelu_mlp

__all__ = ["gelu_mlp"]
