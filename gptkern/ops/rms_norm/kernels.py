"""The kernels of RMS norm: those of layer norm with ``CENTERED=False`` and without a bias."""

from gptkern.ops.layer_norm.kernels import (
    norm_backward_kernel,
    norm_forward_kernel,
    norm_weight_grad_kernel,
    norm_wide_backward_kernel,
    norm_wide_forward_kernel,
    norm_wide_weight_grad_kernel,
)

__all__ = [
    "norm_backward_kernel",
    "norm_forward_kernel",
    "norm_weight_grad_kernel",
    "norm_wide_backward_kernel",
    "norm_wide_forward_kernel",
    "norm_wide_weight_grad_kernel",
]
