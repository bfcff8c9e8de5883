"""RMS norm as PyTorch sees it: registered ops; their backward pass is layer norm's ``norm_backward``."""

from gptkern.ops.layer_norm.register import register_add_norm, register_norm

register_norm("rms_norm", centered=False)
register_add_norm("add_rms_norm", centered=False)
