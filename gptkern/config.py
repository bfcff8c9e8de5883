"""Configurations, under transformers' names: ``GPTConfig`` of the first two GPTs, ``FamilyConfig`` of others.

``read`` makes one of a ``config.json``; ``.spec`` is what the decoder, executors and cache go by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from gptkern.checkpoint.errors import shown
from gptkern.model.families import FAMILIES, check_decoder, check_served, gpt2, openai_gpt
from gptkern.model.families.table import ACTIVATIONS, Family, Fields, is_integer, is_number
from gptkern.model.spec import Activation, DecoderSpec

# Models pad their vocabulary with rows that stand for no token, to multiples of at most this (64 in nanoGPT,
# 128 in llm.c and Megatron, times the GPUs that share the matrix).
VOCAB_PADDING = 1024
MODEL_TYPES = ("gpt2", "openai-gpt")
_ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "openai-gpt": "OpenAIGPTLMHeadModel"}
# transformers' classes of the two, by what follows their common beginning
_CLASSES = {"gpt2": "GPT2", "openai-gpt": "OpenAIGPT"}
_HEADS = (
    *("Model", "LMHeadModel", "DoubleHeadsModel"),
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
)
# the activations of transformers' OpenAIGPTModel: its "gelu" is the tanh form
_GPT1_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu", "swish": "swish"}
_GPT1_DEFAULTS = {"vocab_size": 40478, "n_positions": 512, "bos_token_id": None, "eos_token_id": None}
# what GPT-2 may vary and the GPT of 2018 may not
_GPT1_FIXED = {"n_inner": None, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Field names and defaults are those of ``transformers.GPT2Config``.

    Args:
        vocab_size: Rows of the token embedding.
        n_positions: Longest context, in tokens.
        n_layer, n_head, n_embd: Decoder blocks, attention heads, width; ``n_head`` divides ``n_embd``.
        n_inner: Width of the MLP; None, or left out: ``4 * n_embd``.
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
        TypeError: A switch is neither True nor False.
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
        eos_token_id: object = self.eos_token_id
        if isinstance(eos_token_id, list):  # as it is read from JSON
            object.__setattr__(self, "eos_token_id", tuple(eos_token_id))
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
            self._check_integer(name, 1)
        if self.n_inner is not None:
            self._check_integer("n_inner", 1)
        self._check_tokens()
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_embd is {self.n_embd}, n_head {self.n_head}: "
                "n_embd must be a multiple of n_head"
            )
        if self.model_type not in MODEL_TYPES:
            raise ValueError(
                f"GPTConfig: model_type is {shown(self.model_type)}; supported are {', '.join(MODEL_TYPES)}"
            )
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            self._check_number(name)
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)}; 0 <= {name} < 1 is needed")
        for name in ("layer_norm_epsilon", "initializer_range"):
            self._check_number(name)
            if not getattr(self, name) > 0.0:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)}; a positive number is needed")
        for name in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"GPTConfig: {name} is {shown(getattr(self, name))}; True or False is needed")
        self._check_activation()
        if self.post_norm:
            self._check_gpt1()

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not is_integer(value, least):
            needed = "a positive integer" if least else "an integer, 0 or more,"
            raise ValueError(f"GPTConfig: {name} is {shown(value)}; {needed} is needed, 2^31 - 1 at most")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if not is_number(value):
            raise ValueError(f"GPTConfig: {name} is {shown(value)}; a finite number is needed")

    def _check_tokens(self) -> None:
        if self.bos_token_id is not None:
            self._check_integer("bos_token_id", 0)
        for token in self.eos_token_ids:
            if not is_integer(token, 0):
                raise ValueError(
                    f"GPTConfig: eos_token_id is {shown(self.eos_token_id)}; "
                    "a token id, several of them, or None is needed"
                )

    def _check_activation(self) -> None:
        if self.activation_function not in tuple(ACTIVATIONS):
            raise ValueError(
                f"GPTConfig: activation_function is {shown(self.activation_function)}; "
                f"accepted are {', '.join(ACTIVATIONS)}"
            )

    def _check_gpt1(self) -> None:
        if self.activation == "gelu":
            raise ValueError(
                f"GPTConfig: activation_function is {self.activation_function!r}; "
                "openai-gpt's are gelu_new (its own name for it is gelu), relu and silu"
            )
        # its config.json has one name for each, so one is kept here too
        canonical = "gelu_new" if self.activation == "gelu_tanh" else self.activation
        object.__setattr__(self, "activation_function", canonical)
        for name, value in _GPT1_FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"GPTConfig: {name} is {shown(getattr(self, name))}; openai-gpt's is always {value}"
                )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def activation(self) -> Activation:
        """The activation under the name ``gptkern.ops`` uses."""
        return ACTIVATIONS[self.activation_function]

    @property
    def post_norm(self) -> bool:
        """True if norms follow each branch, as in the GPT of 2018."""
        return self.model_type == "openai-gpt"

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text tokens as a tuple, empty where there are none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def dropout_fields(self) -> tuple[str, ...]:
        """The fields that are dropout probabilities."""
        return "resid_pdrop", "embd_pdrop", "attn_pdrop"

    @property
    def parameters(self) -> int:
        """The number of the model's parameters, a tied head counted once."""
        # By one layer and two: a damaged n_layer may be more than a spec can have.
        one, two = (self.replace(n_layer=layers).spec.parameters for layers in (1, 2))
        return one + (self.n_layer - 1) * (two - one)

    @property
    def scaled_init(self) -> bool:
        """True if fresh weights of each branch's last product are divided by sqrt(2 n_layer)."""
        return not self.post_norm

    @cached_property
    def spec(self) -> DecoderSpec:
        """The decoder that this configuration describes."""
        return openai_gpt.spec(self) if self.post_norm else gpt2.spec(self)

    def attention_scale(self, layer: int) -> float:
        """The factor on the scores of block ``layer`` (from 0)."""
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
        model_type = data.get("model_type") or _type_of(data.get("architectures"))
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"GPTConfig: model_type is {shown(model_type)}; supported are {', '.join(MODEL_TYPES)}"
            )
        check_decoder(data)
        known = {field.name for field in fields(cls)}
        values = {_ALIASES.get(key, key): value for key, value in data.items()}
        values = {key: value for key, value in values.items() if key in known} | {"model_type": model_type}
        if model_type == "openai-gpt":
            afn = data.get("afn", "gelu")
            values = _GPT1_DEFAULTS | values | _GPT1_FIXED
            values["activation_function"] = _GPT1_ACTIVATIONS.get(afn, afn) if isinstance(afn, str) else afn
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A ``config.json`` that transformers opens; ``from_dict`` reads it back to an equal config."""
        data = asdict(self) | {"architectures": [_ARCHITECTURES[self.model_type]]}
        if isinstance(self.eos_token_id, tuple):
            data["eos_token_id"] = list(self.eos_token_id)
        if self.post_norm:
            del data["activation_function"]
            data["afn"] = {"gelu_tanh": "gelu"}.get(self.activation, self.activation)
        return data


@dataclass(frozen=True)
class FamilyConfig:
    """The configuration of a model of another family: the fields of its ``config.json``, as they are.

    Fields are attributes (``config.hidden_size``), those left out with the family's defaults.
    ``FamilyConfig.from_dict`` makes one.

    Args:
        model_type: The family.
        text: The ``config.json``, sorted by name.

    Raises:
        AttributeError: A field that neither ``config.json`` nor the family's defaults have.
    """

    model_type: str
    text: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FamilyConfig:
        """Read a ``config.json`` of transformers.

        Raises:
            ValueError: A family, a switch or a size that is not served; the message names the field.
        """
        model_type = data.get("model_type")
        check_served(data)
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise ValueError(
                f"config: model_type is {shown(model_type)}; supported are "
                f"{', '.join((*MODEL_TYPES, *FAMILIES))}"
            )
        config = cls(model_type, json.dumps(dict(data), sort_keys=True))
        _ = config.spec, config.bos_token_id, config.eos_token_ids, config.initializer_range
        return config

    def __getattr__(self, name: str) -> Any:
        # copying and unpickling ask for special names, and for others before there are any fields
        if not name.startswith("__") and "text" in self.__dict__ and name in self.values:
            return self.values[name]
        raise AttributeError(f"FamilyConfig of {self.__dict__.get('model_type')} has no {name!r}")

    @property
    def family(self) -> Family:
        """The tables of the family."""
        return FAMILIES[self.model_type]

    @cached_property
    def values(self) -> dict[str, Any]:
        """All fields, those left out with the family's defaults."""
        return {**self.family.defaults, **json.loads(self.text)}

    @cached_property
    def _fields(self) -> Fields:
        return Fields(self.model_type, self.values)

    @cached_property
    def spec(self) -> DecoderSpec:
        """The decoder that this configuration describes."""
        return self.family.spec(self._fields)

    @property
    def fields_read(self) -> frozenset[str]:
        """The fields that the decoder goes by, those left out too."""
        _ = self.spec
        return frozenset(self._fields.read)

    @property
    def dropout_fields(self) -> tuple[str, ...]:
        """The fields that are dropout probabilities."""
        _ = self.spec
        return tuple(self._fields.probabilities)

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-text token; None where there is none."""
        name = "bos_token_id"
        return None if self.values.get(name) is None else self._fields.integer(name, least=0)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text tokens, empty where there are none."""
        value = self.values.get("eos_token_id")
        found = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(is_integer(token, 0) for token in found):
            raise self._fields.refuse("eos_token_id", "a token id, several of them, or null is needed")
        return found

    @property
    def tie_word_embeddings(self) -> bool:
        """The head shares the token embedding's matrix."""
        return self.spec.tied

    @property
    def initializer_range(self) -> float:
        """Standard deviation of fresh weights."""
        return self._fields.number("initializer_range", 0.02, above=0.0)

    @property
    def scaled_init(self) -> bool:
        """True if fresh weights of each branch's last product are divided by sqrt(2 layers)."""
        return self.family.scaled_init

    @property
    def parameters(self) -> int:
        """The number of the model's parameters, a tied head counted once."""
        return self.spec.parameters

    def replace(self, **changes: Any) -> FamilyConfig:
        """A copy with some fields changed."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The ``config.json``, which transformers opens."""
        data: dict[str, Any] = json.loads(self.text)
        return data | {"architectures": [self.family.architecture]}


Config = GPTConfig | FamilyConfig


def read(data: Mapping[str, Any]) -> Config:
    """Read a ``config.json`` of transformers, of any family that is served.

    Raises:
        ValueError: A family, a switch or a size that is not served; the message names the field.
        TypeError: A switch of a GPT that is neither True nor False.
    """
    model_type = data.get("model_type") or _type_of(data.get("architectures"))
    if model_type in MODEL_TYPES:
        return GPTConfig.from_dict(data)
    return FamilyConfig.from_dict(data)


def _type_of(architectures: object) -> str | None:
    """The model type that an old ``config.json`` without one means."""
    for model_type, beginning in _CLASSES.items():
        if architectures in [[beginning + head] for head in _HEADS]:
            return model_type
    return None


# what of a config.json ``to_dict`` writes, under any of its names
JSON_FIELDS = {field.name for field in fields(GPTConfig)} | {*_ALIASES, "afn", "architectures"}
