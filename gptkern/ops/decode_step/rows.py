"""A decode pass as rows: the stages of a decoder with their weights, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from gptkern.ops._types import HeadNorm, Norm, RmsNorm
from gptkern.ops.decode_linear.formats import QuantizedWeight

# Names of buffers, by their numbers in the kernel and in the registered op. A branch's output that a norm
# follows, and queries, keys and values before a norm of all heads at once, are none of the kernel's.
BUFFERS = ("x", "q", "attended", "middle", "inner", "normed_x", "normed_middle", "logits", "branch", "qkv")
Kind = Literal["qkv", "attention", "linear", "add_norm", "heads"]
NormWeights = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Linear:
    """A linear layer: ``(outputs, inputs)``, and ``(outputs,)`` or None."""

    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None = None


class Positions(NamedTuple):
    """Rotary positions: ``(context, dim / 2)`` fp32 tables, and the pairs as in ``Rotary``."""

    cos: torch.Tensor
    sin: torch.Tensor
    pairs: str = "halves"


@dataclass(frozen=True)
class StepRow:
    """One stage of a pass.

    Attributes:
        kind: ``qkv``: a product whose keys and values go to the cache; ``attention``: queries over the cache;
            ``linear``: a product; ``add_norm``: residual + norm(read); ``heads``: queries, keys and values of
            a product of its own, to ``q`` and to the cache.
        layer: The layer of the cache.
        read, write: Names in ``BUFFERS``, each a buffer ``(rows, its width)``. The first row reads ``x``, the
            embeddings; the last one writes ``logits``.
        norm: Applied to what is read, before the product.
        save: A buffer that keeps what the norm gave.
        linear: The product's weights.
        activation, gated, scale: As in ``decode_linear``.
        residual: A buffer that is added to the result.
        softcap: Of the product as in ``decode_linear``, of attention as in ``decode_attention``.
        rotary, head_norm: As in ``decode_qkv``; the norm of a ``heads`` row is of all heads at once, and has
            a weight for each of their elements.
        attention_scale: The softmax scale.
        window: Attention's window; None: none.
    """

    kind: Kind
    layer: int
    read: str
    write: str
    norm: Norm | RmsNorm | None = None
    save: str | None = None
    linear: Linear | None = None
    activation: str = "none"
    gated: bool = False
    scale: float = 1.0
    residual: str | None = None
    softcap: float | None = None
    rotary: Positions | None = None
    head_norm: HeadNorm | None = None
    attention_scale: float = 1.0
    window: int | None = None

    @property
    def product(self) -> Linear:
        """The weights of a row that has them.

        Raises:
            ValueError: It has none.
        """
        if self.linear is None:
            raise ValueError(f"StepRow: the row that writes {self.write!r} has no weight")
        return self.linear

    @property
    def eps(self) -> float | None:
        """The epsilon of its norm; None without one."""
        if self.norm is None:
            return None
        return self.norm.eps if isinstance(self.norm, RmsNorm) else self.norm[2]

    @property
    def head_eps(self) -> float | None:
        """The epsilon of its heads' norms; None without them."""
        return None if self.head_norm is None else self.head_norm.eps

    def outputs(self, kv_width: int) -> int:
        """Elements that a product writes; keys and values of ``kv_width`` each go to the cache."""
        outputs = self.product.weight.shape[0] - (2 * kv_width if self.kind == "qkv" else 0)
        return outputs // 2 if self.gated else outputs


@dataclass(frozen=True)
class StepProgram:
    """A whole pass: the embeddings, then the rows.

    Attributes:
        token_weight: ``(vocabulary, width)``.
        position_weight: ``(positions, width)``; None: positions are no embeddings.
        rows: From the first layer to the logits.
        heads: The number of query heads.
        position_offset: Rows of ``position_weight`` before that of position 0.
        embedding_scale: Factor on the token's embedding.

    Raises:
        ValueError: No rows, or rows that do not fit together: one that reads a buffer which nothing has
            written, or as many elements as it has not.
    """

    token_weight: torch.Tensor
    position_weight: torch.Tensor | None
    rows: tuple[StepRow, ...]
    heads: int
    position_offset: int = 0
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.rows or self.rows[-1].write != "logits":
            raise ValueError("StepProgram: the last of its rows must write 'logits'")
        written = {"x"}
        for number, row in enumerate(self.rows):
            for name in (row.read, row.residual):
                if name is not None and name not in written:
                    raise ValueError(f"StepProgram: row {number} reads {name!r}, which nothing has written")
            if row.kind in ("qkv", "linear"):
                row.product  # noqa: B018  (raises where there is no weight)
            written |= {name for name in (row.write, row.save) if name is not None}

    @property
    def eps(self) -> tuple[float, float]:
        """The epsilon of its norms, and that of its heads' norms; 0 where there is none."""
        norms = [row.eps for row in self.rows if row.eps is not None]
        heads = [row.head_eps for row in self.rows if row.head_eps is not None]
        return norms[0] if norms else 0.0, heads[0] if heads else 0.0

    def widths(self, kv_width: int) -> dict[str, int]:
        """The width of each buffer, where keys of all heads have ``kv_width`` elements together."""
        widths = {"x": self.token_weight.shape[1]}
        for row in self.rows:
            writes = row.write not in widths and row.kind in ("qkv", "linear")
            widths.setdefault(row.write, row.outputs(kv_width) if writes else widths[row.read])
            if row.save is not None:
                widths[row.save] = widths[row.read]
        return widths

    @property
    def layers(self) -> int:
        """The number of layers of the cache."""
        return 1 + max([-1, *(row.layer for row in self.rows if row.kind == "attention")])

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor of it."""
        own = (self.token_weight, self.position_weight, *(t for row in self.rows for t in row_tensors(row)))
        yield from (tensor for tensor in own if tensor is not None)


def widest_normed_head(dtype: torch.dtype) -> int:
    """Elements of the widest head with a norm that the persistent step holds in registers."""
    return 64 if dtype == torch.float32 else 128


# The tensors of a row, in the columns of the persistent kernel's table.
TENSORS = (
    *("norm weight", "norm bias", "values", "bias", "scales", "minimums"),
    *("cos", "sin", "q norm", "k norm"),
)


def row_tensors(row: StepRow) -> tuple[torch.Tensor | None, ...]:
    """The tensors of a row, as ``TENSORS`` names them."""
    norm: Sequence[torch.Tensor | None] = (None, None)
    if isinstance(row.norm, RmsNorm):
        norm = (row.norm.weight, None)
    elif row.norm is not None:
        norm = row.norm[:2]
    packed: Sequence[torch.Tensor | None] = (None,) * 4
    if row.linear is not None:
        weight, bias = row.linear.weight, row.linear.bias
        if isinstance(weight, QuantizedWeight):
            packed = (weight.values, bias, weight.scales, weight.minimums)
        else:
            packed = (weight, bias, None, None)
    rotary = (None, None) if row.rotary is None else row.rotary[:2]
    heads = (None, None) if row.head_norm is None else row.head_norm[:2]
    return (*norm, *packed, *rotary, *heads)
