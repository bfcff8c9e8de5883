from gptkern.ops.gated_mlp.op import gated_mlp

__all__ = ["gated_mlp"]
