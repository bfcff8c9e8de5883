"""Launches of RMS norm: those of layer norm, whose ``Settings`` say that no mean is subtracted."""

from gptkern.ops.layer_norm.launch import Saved, Settings, backward, forward

__all__ = ["Saved", "Settings", "backward", "forward"]
