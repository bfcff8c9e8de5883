"""Launches of RMS norm: those of layer norm, whose ``Settings`` say that no mean is subtracted."""

from gptkern.ops.layer_norm.launch import Forward, Saved, Settings, backward, forward, forward_plan

__all__ = ["Forward", "Saved", "Settings", "backward", "forward", "forward_plan"]
