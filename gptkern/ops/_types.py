"""Types that several ops take, and everything above them."""

from __future__ import annotations

import torch

# The number format of an 8-bit KV cache: e4m3, whose largest number is 448.
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max

# (k_scale, v_scale), fp32 of shape (kv_heads,): the factors that dequantise an fp8 KV cache.
KvScales = tuple[torch.Tensor, torch.Tensor]

# (weight, bias, eps) of a layer norm over the last dimension; the bias may be None.
Norm = tuple[torch.Tensor, torch.Tensor | None, float]
