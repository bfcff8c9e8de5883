"""The scales of an fp8 cache: what its keys and values are multiplied by."""

from __future__ import annotations

import torch


def are_kv_scales(scale: torch.Tensor, shape: tuple[int, int]) -> bool:
    """True if ``scale`` can scale keys or values: ``(n_layer, n_kv_head)`` finite numbers above 0."""
    return tuple(scale.shape) == shape and bool((scale.isfinite() & (scale > 0)).all())
