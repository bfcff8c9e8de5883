"""A decoder as a list of stages: what executors launch, one after another, for new tokens of some sequences.

A stage reads a buffer, norms it or not, multiplies it by a matrix or attends, adds a residual or not, and
writes a buffer. Families differ in the rows alone, never in who runs them: one executor launches a kernel a
stage, another runs them all in one launch. Buffers are ``(tokens, its width)``; a stage reads no buffer that
it writes, but for the residual that it adds to.

=============== ==================================================================
``x``           the residual stream before a layer, and before the head
``q``           queries; keys and values go to the cache
``attended``    the heads' outputs
``branch``      a branch's output that a norm follows
``middle``      the residual stream between attention and MLP
``inner``       the MLP between its two products
``normed_x``    norm(x), where it is the residual
``normed_middle``  norm(middle), where it is the residual
``logits``      of all tokens
=============== ==================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gptkern.model.spec import DecoderSpec

Kind = Literal["embed", "qkv", "attention", "linear", "add_norm"]
Buffer = Literal["x", "q", "attended", "branch", "middle", "inner", "normed_x", "normed_middle", "logits"]
Matrix = Literal["qkv", "out", "fc", "proj", "head"]
NormName = Literal["ln_1", "ln_2", "post_attn_norm", "post_mlp_norm", "ln_f"]


class NormAt(NamedTuple):
    """A norm: of a layer, or with layer -1 the last one."""

    layer: int
    name: NormName


@dataclass(frozen=True)
class Stage:
    """One row of a program.

    Attributes:
        kind: ``embed``: tokens and positions to x; ``qkv``: a product whose keys and values, rotated where
            the layer does, go to the cache; ``attention``: queries over the cache; ``linear``: a product;
            ``add_norm``: residual + norm(read).
        layer: The layer, from 0; that of the head is the number of layers.
        read: The buffer that is read; None for ``embed``.
        write: The buffer that is written.
        norm: Applied to what is read, before the product.
        save: Keeps what the norm gave.
        weight: The matrix.
        activated: The MLP's activation, gated or not, follows the product.
        residual: Added to the result.
    """

    kind: Kind
    layer: int
    write: Buffer
    read: Buffer | None = None
    norm: NormAt | None = None
    save: Buffer | None = None
    weight: Matrix | None = None
    activated: bool = False
    residual: Buffer | None = None


def program(spec: DecoderSpec) -> tuple[Stage, ...]:
    """All stages of a decoder, from the embeddings to the logits."""
    layers = {"before": _pre_norm, "after": _post_norm, "branch": _branch_norm, "both": _branch_norm}
    of_layer = layers[spec.norm_place]
    count = len(spec.layers)
    last = NormAt(count - 1, "ln_2") if spec.norm_place == "after" else NormAt(-1, "ln_f")
    return (
        Stage("embed", 0, "x"),
        *(stage for layer in range(count) for stage in of_layer(spec, layer)),
        Stage("linear", count, "logits", "x", norm=last, weight="head"),
    )


def _pre_norm(spec: DecoderSpec, layer: int) -> Iterator[Stage]:
    """Pre-norm: x + attention(norm x), then + mlp(norm of that); parallel branches both read x."""
    first = NormAt(layer, "ln_1")
    second = first if spec.shared_norm else NormAt(layer, "ln_2")
    yield Stage("qkv", layer, "q", "x", norm=first, weight="qkv")
    yield Stage("attention", layer, "attended", "q")
    yield Stage("linear", layer, "middle", "attended", weight="out", residual="x")
    read: Buffer = "x" if spec.parallel else "middle"
    yield Stage("linear", layer, "inner", read, norm=second, weight="fc", activated=True)
    yield Stage("linear", layer, "x", "inner", weight="proj", residual="middle")


def _post_norm(spec: DecoderSpec, layer: int) -> Iterator[Stage]:
    """Post-norm: norm(x + attention x), then norm(that + mlp of that); the next reader applies a norm."""
    # The embeddings have no norm after them.
    norm = NormAt(layer - 1, "ln_2") if layer else None
    residual: Buffer = "normed_x" if layer else "x"
    yield Stage("qkv", layer, "q", "x", norm=norm, save="normed_x" if layer else None, weight="qkv")
    yield Stage("attention", layer, "attended", "q")
    yield Stage("linear", layer, "middle", "attended", weight="out", residual=residual)
    yield Stage(
        "linear",
        layer,
        "inner",
        "middle",
        norm=NormAt(layer, "ln_1"),
        save="normed_middle",
        weight="fc",
        activated=True,
    )
    yield Stage("linear", layer, "x", "inner", weight="proj", residual="normed_middle")


def _branch_norm(spec: DecoderSpec, layer: int) -> Iterator[Stage]:
    """Norms of branches: x + norm(attention x), then + norm(mlp of that); maybe norms before them too."""
    both = spec.norm_place == "both"
    first, second = (NormAt(layer, "ln_1"), NormAt(layer, "ln_2")) if both else (None, None)
    names: tuple[NormName, NormName] = ("post_attn_norm", "post_mlp_norm") if both else ("ln_1", "ln_2")
    yield Stage("qkv", layer, "q", "x", norm=first, weight="qkv")
    yield Stage("attention", layer, "attended", "q")
    yield Stage("linear", layer, "branch", "attended", weight="out")
    yield Stage("add_norm", layer, "middle", "branch", norm=NormAt(layer, names[0]), residual="x")
    yield Stage("linear", layer, "inner", "middle", norm=second, weight="fc", activated=True)
    yield Stage("linear", layer, "branch", "inner", weight="proj")
    yield Stage("add_norm", layer, "x", "branch", norm=NormAt(layer, names[1]), residual="middle")
