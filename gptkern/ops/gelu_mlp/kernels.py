"""The kernels of the perceptron: those of ``linear``, whose epilogues hold its activation and residual."""

from gptkern.ops.linear.kernels import column_sum, linear, linear_dact, linear_dw

__all__ = ["column_sum", "linear", "linear_dact", "linear_dw"]
