"""Rotary positions in plain PyTorch (Su et al. 2021, equation 34), after an RMS norm of each head or not."""

import torch


def head_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    """RMS norm over the last dimension, in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = weight.to(wide.dtype)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed * (weight + 1.0 if unit_offset else weight)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: str) -> torch.Tensor:
    """Turn the pairs of ``x``'s first ``2 * cos.shape[-1]`` elements, in the wider of the dtypes."""
    dim = 2 * cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    if pairs == "halves":
        first, second = turned.chunk(2, dim=-1)
        both = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
        both = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((both, rest), dim=-1) if rest.shape[-1] else both


def rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    pairs: str,
    norm: tuple[torch.Tensor, torch.Tensor | None, float] | None,
    unit_offset: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(q, k), each rounded to its dtype once."""
    at = slice(q.shape[-3]) if positions is None else positions.long()
    cos, sin = cos[at].unsqueeze(-2), sin[at].unsqueeze(-2)
    q_weight, k_weight, eps = (None, None, 0.0) if norm is None else norm

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x if weight is None else head_norm(x, weight, eps, unit_offset)
        return rotate(wide, cos, sin, pairs).to(x.dtype)

    return turn(q, q_weight), None if k is None else turn(k, k_weight)
