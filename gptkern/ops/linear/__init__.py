from gptkern.ops.linear.op import linear, linear_act, linear_residual

__all__ = ["linear", "linear_act", "linear_residual"]
