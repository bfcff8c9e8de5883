"""GPTConfig: the shape and switches of a model, under transformers' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

# transformers' activation names -> the names gptkern.ops uses
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
MODEL_TYPES = ("gpt2", "openai-gpt")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Field names and defaults are those of ``transformers.GPT2Config``.

    Args:
        vocab_size: Rows of the token embedding.
        n_positions: Longest context, in tokens.
        n_layer, n_head, n_embd: Decoder blocks, attention heads, width; ``n_head`` divides ``n_embd``.
        n_inner: Width of the MLP; ``4 * n_embd`` when None.
        activation_function: ``gelu_new``, ``gelu``, ``relu`` or ``silu`` (and their aliases).
        resid_pdrop, embd_pdrop, attn_pdrop: Dropout in training, on each branch's output, on the
            embeddings, on the attention weights.
        layer_norm_epsilon: Added to the variance.
        initializer_range: Standard deviation of fresh weights.
        scale_attn_weights: Scale scores by ``1 / sqrt(head_dim)``.
        scale_attn_by_inverse_layer_idx: Scale them by ``1 / (layer + 1)`` too.
        tie_word_embeddings: The head shares the token embedding's matrix.
        bias: Linear layers and norms have biases (nanoGPT's ``bias=False`` models have none).
        bos_token_id, eos_token_id: Special tokens; None where the vocabulary has none.
        model_type: ``gpt2`` (norm before each branch) or ``openai-gpt`` (norm after, no final norm).

    Raises:
        ValueError: A field is out of its range; the message names it.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    bias: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    model_type: str = "gpt2"

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
            self._check_positive(name)
        if self.n_inner is not None:
            self._check_positive("n_inner")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_embd is {self.n_embd}, n_head {self.n_head}: n_embd must be a multiple of n_head"
            )
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"GPTConfig: activation_function is {self.activation_function!r}; "
                f"accepted are {', '.join(ACTIVATIONS)}"
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)}; 0 <= {name} < 1 is needed")
        if not self.layer_norm_epsilon > 0.0:
            raise ValueError(
                f"GPTConfig: layer_norm_epsilon is {self.layer_norm_epsilon}; a positive number is needed"
            )
        if self.model_type not in MODEL_TYPES:
            raise ValueError(
                f"GPTConfig: model_type is {self.model_type!r}; supported are {', '.join(MODEL_TYPES)}"
            )

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"GPTConfig: {name} is {value!r}; a positive integer is needed")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def activation(self) -> str:
        """The activation under the name ``gptkern.ops`` uses."""
        return ACTIVATIONS[self.activation_function]

    @property
    def post_norm(self) -> bool:
        """Whether norms follow each branch, as in the GPT of 2018."""
        return self.model_type == "openai-gpt"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text tokens as a tuple, empty where there are none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def attention_scale(self, layer: int) -> float:
        """What scores of block ``layer`` (from 0) are multiplied by."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def replace(self, **changes: Any) -> GPTConfig:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GPTConfig:
        """Read a ``config.json`` of transformers: ``gpt2`` (distilgpt2 included) or ``openai-gpt``.

        Raises:
            ValueError: Another architecture, or a field out of range.
        """
        model_type = data.get("model_type", "gpt2")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"config.json: model_type is {model_type!r}; supported are {', '.join(MODEL_TYPES)}"
            )
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        if model_type == "openai-gpt":
            values["activation_function"] = _gpt1_activation(data.get("afn", "gelu"))
            values.setdefault("bos_token_id", None)
            values.setdefault("eos_token_id", None)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A ``config.json`` that transformers opens; ``from_dict`` reads it back to an equal config."""
        data = asdict(self)
        data["eos_token_id"] = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        if self.post_norm:
            data["afn"] = {"gelu_tanh": "gelu"}.get(self.activation, self.activation)
            data["architectures"] = ["OpenAIGPTLMHeadModel"]
        else:
            data["architectures"] = ["GPT2LMHeadModel"]
        return data


def _gpt1_activation(name: str) -> str:
    """GPT-1's ``afn``: its "gelu" is the tanh form."""
    return "gelu_new" if name == "gelu" else name
