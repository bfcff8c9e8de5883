from gptkern.ops.linear.op import linear_act, linear_residual

__all__ = ["linear_act", "linear_residual"]
