"""Launches of the decode step's linear layers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from gptkern.ops import _launch, _pdl
from gptkern.ops._counters import counters
from gptkern.ops._triton import triton
from gptkern.ops._types import HeadNorm, Norm, PagedCache, RmsNorm, Rotary
from gptkern.ops.decode_linear import kernels
from gptkern.ops.decode_linear.formats import QuantizedWeight

# Bounds of BLOCK_R, the rows that a program takes together: 16 is the narrowest tile of the matrix unit, and
# beyond 64 the accumulators do not fit in registers.
_MIN_BLOCK_R, _MAX_BLOCK_R = 16, 64
_STAGES_OF_MANY_ROWS = 3
# Programs of a multiprocessor at once, by shared memory.
_RESIDENT = 4
# BLOCK_K of int4 weights, unless one group has more: of fp32 rows a tile is as large as shared memory allows.
_MOST_COLUMNS = 256
# BLOCK_S, the columns that lanes add up side by side for a norm's moments.
MOMENT_COLUMNS = 128


class LinearInputs(NamedTuple):
    """A layer and its input: ``norm(x) @ weight.T + bias``; ``norm(x)`` also goes to ``normed_out``."""

    x: torch.Tensor
    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None
    norm: Norm | RmsNorm | None
    normed_out: torch.Tensor | None


class Epilogue(NamedTuple):
    """The epilogue of a product y: ``softcap(scale * activation(y)) + residual``.

    Attributes:
        gated: The first half of the outputs is a gate: ``activation(gate) * up`` in place of activation(y).
        softcap: ``cap * tanh(x / cap)``; None: none.
    """

    activation: str = "none"
    residual: torch.Tensor | None = None
    gated: bool = False
    scale: float = 1.0
    softcap: float | None = None


class Heads(NamedTuple):
    """The changes of queries and keys before they are rounded: a norm of each head, then its position."""

    rotary: Rotary | None = None
    norm: HeadNorm | None = None


def tiling(
    weight: torch.Tensor | QuantizedWeight, dtype: torch.dtype, device: torch.device, head_tile: int = 0
) -> dict[str, int]:
    """A layer's launch row, SPLIT_K at most the blocks there are, and GROUP: int4's group size, or 0.

    With ``head_tile`` a tile is one head of that many elements (see ``HeadNorm``).
    """
    outputs, width = weight.shape
    kind = "fp32" if dtype == torch.float32 else "half"
    if isinstance(weight, QuantizedWeight):
        kind = "int4" if weight.format == "int4" else "byte"
    if head_tile:
        block_n = max(16, triton.next_power_of_2(head_tile))
        config = dict(_launch.config("decode_heads", device, dtype=kind, head_dim=block_n))
        config["BLOCK_N"] = block_n
    else:
        config = dict(_launch.config("decode_linear", device, dtype=kind, n=outputs, k=width))
    config["GROUP"] = 0
    if kind == "int4" and isinstance(weight, QuantizedWeight):
        config["GROUP"] = weight.group_size
        config["PARTS"] = min(config["PARTS"], max(1, _MOST_COLUMNS // weight.group_size))
        config["BLOCK_K"] = config["PARTS"] * weight.group_size
    config["SPLIT_K"] = min(config["SPLIT_K"], triton.cdiv(width, config["BLOCK_K"]))
    return config


def packed_values(weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    """A weight's values in the dtype in which kernels read them."""
    if not isinstance(weight, QuantizedWeight):
        return weight
    return weight.values.view(torch.float8_e4m3fn) if weight.format == "fp8" else weight.values


def linear(
    inputs: LinearInputs,
    epilogue: Epilogue = Epilogue(),  # noqa: B008  (a NamedTuple cannot change)
    cache: PagedCache | None = None,
    slots: torch.Tensor | None = None,
    heads: Heads = Heads(),  # noqa: B008
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch a layer: (its outputs, or with ``cache`` and ``slots`` its queries alone; scratch memory)."""
    x, weight, bias, norm, normed_out = inputs
    rows, width = x.shape
    outputs, device = weight.shape[0], x.device
    kv_heads, head_dim = (0, 1) if cache is None else cache.k.shape[2:]
    config = tiling(weight, x.dtype, device, 0 if heads.norm is None else head_dim)
    block_n, split_k = config["BLOCK_N"], config["SPLIT_K"]
    block_r = min(max(_MIN_BLOCK_R, triton.next_power_of_2(rows)), _most_rows(inputs, epilogue, heads))
    if block_r > _MIN_BLOCK_R:
        # The tile of x is as large as that of the weights or larger: with fewer, two blocks share a
        # multiprocessor.
        config["num_stages"] = min(config["num_stages"], _STAGES_OF_MANY_ROWS)
    tiles = triton.cdiv(outputs, block_n if heads.norm is None else head_dim)
    row_blocks = triton.cdiv(rows, block_r)
    kv_width = kv_heads * head_dim
    stored = outputs // 2 if epilogue.gated else outputs - 2 * kv_width
    out = torch.empty((rows, stored), dtype=x.dtype, device=device)
    partial, counter = None, out  # not read without splits
    if split_k > 1:
        shape = (row_blocks, tiles, split_k, block_n, block_r)
        partial = torch.empty(shape, dtype=torch.float32, device=device)
        counter = counters(device, row_blocks * tiles)
    norm_weight, norm_bias, eps, norm_flags = norm_arguments(norm)
    head_tensors, head_numbers, head_flags = _head_arguments(heads)
    caches, kv_scales, pages, strides = _cache_arguments(cache)
    scales = minimums = None
    if isinstance(weight, QuantizedWeight):
        scales, minimums = weight.scales, weight.minimums
    values = packed_values(weight)
    with _launch.on_device(x):
        _launch.launch(
            kernels.decode_linear_kernel,
            (tiles, split_k, row_blocks),
            *(x, values, bias, norm_weight, norm_bias, epilogue.residual, out, normed_out),
            *(*caches, slots, out if partial is None else partial, counter, scales, minimums, *kv_scales),
            *(*head_tensors, *head_numbers, rows, eps, *pages, values.stride(0), *strides),
            N=outputs,
            K=width,
            KV_WIDTH=kv_width,
            ACTIVATION=epilogue.activation,
            GATED=epilogue.gated,
            SCALE=epilogue.scale,
            SOFTCAP=epilogue.softcap or 0.0,
            BLOCK_R=block_r,
            BLOCK_S=MOMENT_COLUMNS,
            HEAD_DIM=head_dim,
            FETCH_K=_fetched_columns(tiles * split_k, values, config, device),
            **norm_flags,
            **head_flags,
            **_pdl.options(device),
            **config,
        )
    return out, partial


def _most_rows(inputs: LinearInputs, epilogue: Epilogue, heads: Heads) -> int:
    """The most rows for which registers and shared memory suffice; no row's bits depend on it."""
    wide = inputs.x.dtype == torch.float32
    if heads.norm is not None or (wide and isinstance(inputs.weight, QuantizedWeight)):
        return _MIN_BLOCK_R
    return 32 if epilogue.gated and wide else _MAX_BLOCK_R


@functools.cache
def _l2_bytes(device: torch.device) -> int:
    """The size of the L2 cache; 50 MiB (an H100's) where there is no GPU to ask."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 50 << 20


def _fetched_columns(
    programs: int, values: torch.Tensor, config: dict[str, int], device: torch.device
) -> int:
    """Columns whose weights a program fetches into L2 before it waits, whole blocks of them.

    What the programs that run at once fetch is at most half of the cache, as either half of it may hold a
    line; more would drive out what is still to be read.
    """
    resident = max(1, min(programs, _RESIDENT * _launch.multiprocessors(device)))
    share = _l2_bytes(device) // 2 // (resident * config["BLOCK_N"])
    columns = 8 * share // (4 if config["GROUP"] else 8 * values.element_size())
    return max(1, columns // config["BLOCK_K"]) * config["BLOCK_K"]


def described(
    inputs: LinearInputs,
    epilogue: Epilogue = Epilogue(),  # noqa: B008
    cache: PagedCache | None = None,
    slots: torch.Tensor | None = None,
    heads: Heads = Heads(),  # noqa: B008
) -> tuple[tuple[torch.Tensor | None, ...], tuple[Any, ...]]:
    """(all tensors, all other arguments) of a call, not checked yet."""
    x, weight, bias, norm, normed_out = inputs
    activation, residual, *numbers = epilogue
    form = scales = minimums = None
    if isinstance(weight, QuantizedWeight):
        form, scales, minimums = weight.format, weight.scales, weight.minimums
    norm_weight, norm_bias, eps, flags = norm_arguments(norm)
    stored = packed_values(weight), scales, minimums
    tensors: list[torch.Tensor | None] = [
        x, *stored, bias, norm_weight, norm_bias, residual, normed_out,
    ]  # fmt: skip
    settings = [form, eps, *flags.values(), activation, *numbers]
    if cache is not None:
        rotary, head_norm = heads
        tensors += [*cache[:2], *(cache.kv_scales or ()), slots]
        settings += [cache.kv_scales is None, rotary is None, head_norm is None]
        if rotary is not None:
            tensors += rotary[:3]
            settings.append(rotary.pairs)
        if head_norm is not None:
            tensors += head_norm[:2]
            settings += head_norm[2:]
    return tuple(tensors), tuple(settings)


def norm_arguments(
    norm: Norm | RmsNorm | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, float, dict[str, bool]]:
    """(weight, bias, eps, the kernel's flags) of either kind of norm."""
    if isinstance(norm, RmsNorm):
        return norm.weight, None, norm.eps, {"CENTERED": False, "UNIT_OFFSET": norm.unit_offset}
    weight, bias, eps = (None, None, 0.0) if norm is None else norm
    return weight, bias, eps, {"CENTERED": True, "UNIT_OFFSET": False}


def _head_arguments(heads: Heads) -> tuple[tuple[Any, ...], tuple[int, float], dict[str, Any]]:
    """(tensors, numbers, flags) of the changes of queries and keys, in the kernel's order."""
    rotary, norm = heads
    tables = (None, None, None) if rotary is None else rotary[:3]
    weights = (None, None) if norm is None else norm[:2]
    flags = {
        "DIM": 0 if rotary is None else 2 * rotary.cos.shape[1],
        "INTERLEAVED": rotary is not None and rotary.pairs == "interleaved",
        "HEAD_NORM": norm is not None,
        "HEAD_UNIT_OFFSET": norm is not None and norm.unit_offset,
    }
    context = 0 if rotary is None else rotary.cos.shape[0]
    return (*tables, *weights), (context, 0.0 if norm is None else norm.eps), flags


def _cache_arguments(cache: PagedCache | None) -> tuple[tuple[Any, ...], ...]:
    """(k and v, kv scales, page size and page count, strides) in the kernel's order."""
    if cache is None:
        return (None, None), (None, None), (1, 0), (0, 0, 0, 0)
    page_count, page_size = cache.k.shape[:2]
    strides = (*cache.k.stride()[:2], *cache.v.stride()[:2])
    return (cache.k, cache.v), cache.kv_scales or (None, None), (page_size, page_count), strides
