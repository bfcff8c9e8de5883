"""A program as the persistent kernel takes it: the rows it is compiled for, and the table of its phases."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gptkern.ops._triton import tl, triton
from gptkern.ops._types import RmsNorm
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_linear.launch import packed_values, tiling
from gptkern.ops.decode_step import kernels
from gptkern.ops.decode_step.rows import BUFFERS, TENSORS, StepProgram, StepRow, row_tensors

# Addresses must be multiples of it, for loads of 16 bytes.
ALIGNMENT = 16
# The window that means none: longer than any sequence.
_UNLIMITED = 2**31 - 1
_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.float8_e4m3fn: tl.float8e4nv,
}
_EMBED: int = kernels.EMBED.value
_LINEAR: int = kernels.LINEAR.value
_ATTENTION: int = kernels.ATTENTION.value


class Fields(NamedTuple):
    """One row of the kernel's ROWS: all that it is compiled for.

    Attributes:
        kind: EMBED, LINEAR or ATTENTION.
        read, write, save, residual: Numbers of buffers; -1: none.
        outputs, inputs: The product's sizes.
        tile, block_k, parts, split_k, group: BLOCK_N and the others of ``decode_linear``'s launch row.
        tile_count: Tiles of the product.
        weight: The dtype of its values, Triton's.
        scaled, minimums, bias: It has weight scales, minimums, a bias.
        norm, norm_bias, centered, unit_offset: It has a norm before it; the norm's bias and kind.
        activation, gated, scale, softcap: As in ``StepRow``; a soft cap of 0 means none.
        cached: Keys and values go to the cache.
        dim, interleaved: Elements of each head that are turned, and the layout of their pairs.
        head_norm, head_unit_offset: Each head has a norm, and its kind.
    """

    kind: int
    read: int = -1
    write: int = -1
    save: int = -1
    residual: int = -1
    outputs: int = 0
    inputs: int = 0
    tile: int = 0
    tile_count: int = 0
    block_k: int = 0
    parts: int = 0
    split_k: int = 0
    group: int = 0
    weight: Any = None
    scaled: bool = False
    minimums: bool = False
    bias: bool = False
    norm: bool = False
    norm_bias: bool = False
    centered: bool = False
    unit_offset: bool = False
    activation: str = "none"
    gated: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    cached: bool = False
    dim: int = 0
    interleaved: bool = False
    head_norm: bool = False
    head_unit_offset: bool = False


class Phases:
    """The phases of a program: the embeddings, then one for each of its rows.

    Attributes:
        rows: ROWS of the kernel.
        table: Its table, a tuple of numbers for each phase.
        tiles, items: Most tiles of a product, and most splits of tiles.
        grouped: A product has int4 weights.
        partial: Scratch memory for the partial sums of a product, in numbers.
    """

    def __init__(self, program: StepProgram, head_dim: int, device: torch.device) -> None:
        dtype = program.token_weight.dtype
        kinds = [Fields(_EMBED), *(_fields(row, head_dim, dtype, device) for row in program.rows)]
        distinct = {fields: number for number, fields in enumerate(dict.fromkeys(kinds))}
        self.rows = tuple(value for fields in distinct for value in fields)
        self.table = tuple(
            (distinct[fields], *_numbers(kinds, phase, row), *_addresses(row))
            for phase, (fields, row) in enumerate(zip(kinds, (None, *program.rows), strict=True))
        )
        self.tiles = max(fields.tile_count for fields in distinct)
        self.items = max(fields.tile_count * fields.split_k for fields in distinct)
        self.grouped = any(fields.group for fields in distinct)
        self.partial = kernels.ROWS_TOGETHER.value * max(
            fields.tile_count * fields.split_k * fields.tile for fields in distinct
        )


def check_tensors(program: StepProgram) -> None:
    """Raise for a weight that the kernel cannot address.

    Raises:
        ValueError: It is not contiguous, or its address is no multiple of 16.
    """
    for tensor in program.tensors():
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"persistent_step: a weight of shape {tuple(tensor.shape)} has strides {tensor.stride()} and "
                f"address {tensor.data_ptr():#x}; contiguous and a multiple of {ALIGNMENT} is needed"
            )


# The copy, for which a host would wait and which a graph capture forbids, is made once for the same numbers.
@functools.lru_cache(maxsize=64)
def on_device(numbers: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers as a tensor, the same one for the same numbers."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype).to(device)


def _fields(row: StepRow, head_dim: int, dtype: torch.dtype, device: torch.device) -> Fields:
    """All of a row that the kernel is compiled for."""
    read, write, softcap = BUFFERS.index(row.read), BUFFERS.index(row.write), row.softcap or 0.0
    if row.kind == "attention":
        return Fields(_ATTENTION, read, write, softcap=softcap)
    norm, heads, rotary = row.norm, row.head_norm, row.rotary
    rms = isinstance(norm, RmsNorm)
    return Fields(
        _LINEAR,
        read,
        write,
        save=-1 if row.save is None else BUFFERS.index(row.save),
        residual=-1 if row.residual is None else BUFFERS.index(row.residual),
        norm=norm is not None,
        norm_bias=norm is not None and not rms and norm[1] is not None,
        centered=norm is not None and not rms,
        unit_offset=isinstance(norm, RmsNorm) and norm.unit_offset,
        activation=row.activation,
        gated=row.gated,
        scale=row.scale,
        softcap=softcap,
        cached=row.kind == "qkv",
        dim=0 if rotary is None else 2 * rotary.cos.shape[1],
        interleaved=rotary is not None and rotary.pairs == "interleaved",
        head_norm=heads is not None,
        head_unit_offset=heads is not None and heads.unit_offset,
        **_product(row, head_dim, dtype, device),
    )


def _product(row: StepRow, head_dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The sizes of a row's product and how it is cut, as in a launch of its own."""
    weight = row.product.weight
    packed = weight if isinstance(weight, QuantizedWeight) else None
    head_tile = 0 if row.head_norm is None else head_dim
    config = tiling(weight, dtype, device, head_tile)
    outputs, inputs = weight.shape
    return {
        "outputs": outputs,
        "inputs": inputs,
        "tile": config["BLOCK_N"],
        "tile_count": triton.cdiv(outputs, head_tile or config["BLOCK_N"]),
        "block_k": config["BLOCK_K"],
        "parts": config["PARTS"],
        "split_k": config["SPLIT_K"],
        "group": config["GROUP"],
        "weight": _TYPES[packed_values(weight).dtype],
        "scaled": packed is not None,
        "minimums": packed is not None and packed.minimums is not None,
        "bias": row.product.bias is not None,
    }


def _numbers(kinds: Sequence[Fields], phase: int, row: StepRow | None) -> tuple[int, ...]:
    """(layer, window, positions of the rotary tables, phase whose weights are fetched) of a phase."""
    if row is None:
        return 0, _UNLIMITED, 0, _fetched(kinds, phase)
    # The head belongs to no layer of the cache.
    layer = 0 if row.kind == "linear" else row.layer
    window = _UNLIMITED if row.window is None else row.window
    context = 0 if row.rotary is None else row.rotary.cos.shape[0]
    return layer, window, context, _fetched(kinds, phase)


def _fetched(kinds: Sequence[Fields], phase: int) -> int:
    """The phase whose weights are fetched after this one; -1 where they were fetched before."""
    if kinds[phase].kind == _ATTENTION:
        return -1
    following = (number for number in range(phase + 1, len(kinds)) if kinds[number].kind == _LINEAR)
    return next(following, -1)


def _addresses(row: StepRow | None) -> tuple[int, ...]:
    tensors = (None,) * len(TENSORS) if row is None else row_tensors(row)
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
