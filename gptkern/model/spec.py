"""DecoderSpec: what a decoder computes, family by family, for its modules, executors, cache and quantiser.

It holds sizes and switches, no tensors, and imports nothing: a checkpoint's ``config.json`` becomes a
``DecoderSpec`` in ``gptkern.model.families`` before torch is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Activation = Literal["gelu_tanh", "gelu", "relu", "silu"]
NormPlace = Literal["before", "after", "branch", "both"]
Pairs = Literal["halves", "interleaved"]
QKNorm = Literal["head", "whole"]


@dataclass(frozen=True)
class NormSpec:
    """The norms of a decoder; all of them are of one kind.

    Attributes:
        kind: ``layer``: subtract the mean, divide by the standard deviation; ``rms``: divide by the root mean
            square.
        eps: Added to the variance, or to the mean square.
        bias: A bias is added after the weight.
        unit_offset: The factor is ``1 + weight`` (Gemma), not ``weight``.
    """

    kind: Literal["layer", "rms"]
    eps: float
    bias: bool = False
    unit_offset: bool = False


@dataclass(frozen=True)
class RopeScaling:
    """A change of rotary frequencies for contexts longer than those of pre-training.

    Attributes:
        kind: The method, under transformers' ``rope_type``.
        values: Its numbers, under transformers' names, sorted by name; lists are tuples.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    values: tuple[tuple[str, float | int | bool | tuple[float, ...]], ...]


@dataclass(frozen=True)
class RotarySpec:
    """Rotary positions of one layer's queries and keys.

    Attributes:
        dim: The leading elements of each head that are rotated; even.
        theta: The base of the frequencies ``theta ** (-2 i / dim)``.
        pairs: Element i turns with element ``i + dim / 2`` (``halves``) or 2 i with 2 i + 1
            (``interleaved``).
        scaling: None: the frequencies as they are.
    """

    dim: int
    theta: float
    pairs: Pairs = "halves"
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One layer: what may differ from layer to layer.

    Attributes:
        attention_scale: The softmax scale.
        window: Each token sees itself and the ``window - 1`` tokens before it; None: all before it.
        rotary: None: queries and keys are not rotated.
    """

    attention_scale: float
    window: int | None = None
    rotary: RotarySpec | None = None


@dataclass(frozen=True)
class DecoderSpec:
    """One decoder: token ids to logits.

    Attributes:
        vocab_size: Rows of the token embedding.
        context: Longest sequence, in tokens.
        width: Elements of the residual stream.
        heads, kv_heads, head_dim: Query heads, key and value heads (they divide the query heads), and the
            elements of each.
        inner: Elements between the two products of an MLP.
        layers: From the first to the last.
        norm: The kind of every norm.
        norm_place: ``before`` each branch and once more before the head; ``after`` each sum (GPT-1, no norm
            before the head); on each ``branch``'s output, and before the head (OLMo 2); ``both`` before each
            branch and on its output, and before the head (Gemma).
        activation: Between the products of an MLP.
        gated: The MLP multiplies the activation of one product by another: ``act(gate) * up``.
        qkv_bias, out_bias: Attention's two products have biases.
        fc_bias, proj_bias: The MLP's two products have biases.
        head_bias: The head has a bias.
        qk_norm: An RMS norm of each ``head`` of queries and keys, or of the ``whole``; before rotation.
        parallel: Both branches of a layer read its input: ``x + attention(norm x) + mlp(norm x)``.
        shared_norm: With ``parallel``: one norm for both branches.
        learned_positions: Positions are embeddings, added to the tokens'.
        position_offset: Rows of the position embedding before that of position 0 (OPT: 2).
        tied: The head's matrix is the token embedding.
        attention_softcap, logits_softcap: ``cap * tanh(x / cap)`` on scores and on logits; None: none.
        embedding_scale: Multiplies the token embeddings.
        residual_scale: Multiplies each branch's output before it is added.
        logits_scale: Multiplies the logits.
        embedding_dropout, residual_dropout, attention_dropout: Probabilities in training.

    Raises:
        ValueError: Sizes that do not fit together; the message names them.
    """

    vocab_size: int
    context: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    norm_place: NormPlace = "before"
    activation: Activation = "gelu_tanh"
    gated: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    fc_bias: bool = False
    proj_bias: bool = False
    head_bias: bool = False
    qk_norm: QKNorm | None = None
    parallel: bool = False
    shared_norm: bool = False
    learned_positions: bool = False
    position_offset: int = 0
    tied: bool = True
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "width", "heads", "kv_heads", "head_dim", "inner"):
            if getattr(self, name) < 1:
                raise ValueError(f"DecoderSpec: {name} is {getattr(self, name)}; 1 or more is needed")
        if not self.layers:
            raise ValueError("DecoderSpec: layers is empty; at least one is needed")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"DecoderSpec: {self.heads} heads, {self.kv_heads} key and value heads: "
                "the first must be a multiple of the second"
            )
        for index, layer in enumerate(self.layers):
            if layer.window is not None and layer.window < 1:
                raise ValueError(
                    f"DecoderSpec: window of layer {index} is {layer.window}; 1 or more is needed"
                )
            rotary = layer.rotary
            if rotary is not None and not (0 < rotary.dim <= self.head_dim and rotary.dim % 2 == 0):
                raise ValueError(
                    f"DecoderSpec: layer {index} rotates {rotary.dim} of {self.head_dim} elements; "
                    "an even number from 2 to head_dim is needed"
                )
        if self.shared_norm and not self.parallel:
            raise ValueError("DecoderSpec: shared_norm is for parallel branches")

    @property
    def q_width(self) -> int:
        """Elements of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of all key heads, or of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Outputs of the product for queries, keys and values."""
        return self.q_width + 2 * self.kv_width

    @property
    def fc_width(self) -> int:
        """Outputs of the MLP's first product: gate and up one after the other where it is gated."""
        return 2 * self.inner if self.gated else self.inner

    @property
    def rotaries(self) -> tuple[RotarySpec, ...]:
        """The kinds of rotary positions that its layers have, each once, in their order."""
        return tuple(dict.fromkeys(layer.rotary for layer in self.layers if layer.rotary is not None))

    @property
    def parameters(self) -> int:
        """The number of parameters, a tied head counted once."""
        width, inner = self.width, self.inner
        norm = 2 * width if self.norm.bias else width
        norms = {"before": 2, "after": 2, "branch": 2, "both": 4}[self.norm_place] - self.shared_norm
        matrices = width * (self.qkv_width + self.q_width + self.fc_width + inner)
        biases = (
            self.qkv_bias * self.qkv_width
            + self.out_bias * width
            + self.fc_bias * self.fc_width
            + self.proj_bias * width
        )
        heads = {None: 0, "head": 2 * self.head_dim, "whole": self.q_width + self.kv_width}[self.qk_norm]
        rows = self.vocab_size * (1 if self.tied else 2)
        rows += self.learned_positions * (self.context + self.position_offset)
        head = self.head_bias * self.vocab_size + (0 if self.norm_place == "after" else norm)
        return rows * width + head + len(self.layers) * (matrices + biases + norms * norm + heads)

    def replace(self, **changes: Any) -> DecoderSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)
