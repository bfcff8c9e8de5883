"""``gated_mlp`` as PyTorch sees it: what ``gelu_mlp`` registers, with the gated product."""

from gptkern.ops._register import register  # noqa: F401  (by register_mlp)
from gptkern.ops.gated_mlp import reference
from gptkern.ops.gated_mlp.launch import GATED
from gptkern.ops.gelu_mlp.register import register_mlp

register_mlp(GATED, reference.gated_mlp, reference.gated_mlp_backward)
