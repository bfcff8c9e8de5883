"""The form of a family of models: how its ``config.json`` is read, and how its checkpoints call each tensor.

A family is one file of tables beside this one, registered by model type in ``gptkern.model.families``:

- ``spec(fields)`` reads a ``DecoderSpec`` from the fields of a ``config.json``. ``Fields`` checks each value
  and names the field where it is refused; ``Fields.rotary`` reads rotary positions, old names and new.
- ``tensors`` has a row for each parameter of the decoder: our name, then the name in transformers'
  checkpoints. ``{}`` stands for the layer's number. Several names are stacked in that order, row after row
  (queries, keys, values; gate, up). A row whose tensor a model does not have is left out.

Nothing here imports torch: a configuration is read, or refused, before it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gptkern.checkpoint.errors import shown
from gptkern.model.spec import Activation, DecoderSpec, RopeScaling, RotarySpec

# transformers' activation names -> the names gptkern.ops uses
ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# sizes and token ids are 32-bit integers in the kernels
LARGEST = 2**31 - 1
# A spec has an entry for each layer: a damaged number of them must not fill the memory.
MOST_LAYERS = 4096
# Tables of rotary positions have a row for each position: 2 GB in a head of 128 elements.
MOST_POSITIONS = 2**22
# the numbers that each kind of scaled rotary positions needs, and those it may have
_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("long_factor", "original_max_position_embeddings", "short_factor"),
        ("attention_factor", "factor"),
    ),
}


def is_integer(value: object, least: int) -> bool:
    """True if ``value`` is a whole number from ``least`` that fits the kernels' 32 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def is_number(value: object) -> bool:
    """True if ``value`` is a finite number."""
    # integers beyond the largest float are compared, as they cannot be converted
    finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return finite and not isinstance(value, bool)


class Fields:
    """The fields of a ``config.json`` and the family's defaults for those left out, checked as they are read.

    Attributes:
        model_type: The family.
        read: Names of the fields that were read so far.
        probabilities: Those of them that are dropout probabilities, in the order they were read.

    Raises:
        ValueError: By every method, where a value is not what the method returns; it names the field.
    """

    def __init__(self, model_type: str, values: Mapping[str, Any]) -> None:
        self.model_type = model_type
        self.read: set[str] = set()
        self.probabilities: list[str] = []
        self._values = values

    def get(self, name: str) -> Any:
        """The field as it is; None where there is none."""
        self.read.add(name)
        return self._values.get(name)

    def refuse(self, name: str, needed: str) -> ValueError:
        """The error for a field that is not as ``needed`` says."""
        return ValueError(f"{self.model_type}: {name} is {shown(self.get(name))}; {needed}")

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number; ``default`` where the field is null or left out."""
        value = default if self.get(name) is None else self.get(name)
        if not is_integer(value, least):
            kind = "a positive integer" if least else "an integer, 0 or more,"
            raise self.refuse(name, f"{kind} is needed, 2^31 - 1 at most")
        assert isinstance(value, int)
        return value

    def layers(self, name: str = "num_hidden_layers") -> int:
        """The number of layers."""
        layers = self.integer(name)
        if layers > MOST_LAYERS:
            raise self.refuse(name, f"{MOST_LAYERS} at most are served")
        return layers

    def context(self, name: str = "max_position_embeddings") -> int:
        """The longest sequence of a model with rotary positions."""
        context = self.integer(name)
        if context > MOST_POSITIONS:
            raise self.refuse(name, f"{MOST_POSITIONS} at most are served")
        return context

    def number(
        self,
        name: str,
        default: float | None = None,
        *,
        above: float | None = None,
        below: float | None = None,
    ) -> float:
        """A finite number, larger than ``above`` and smaller than ``below`` where they are given."""
        value = default if self.get(name) is None else self.get(name)
        if not is_number(value):
            raise self.refuse(name, "a finite number is needed")
        assert value is not None
        if above is not None and not value > above:
            raise self.refuse(name, f"a number above {above} is needed")
        if below is not None and not value < below:
            raise self.refuse(name, f"a number below {below} is needed")
        return float(value)

    def probability(self, name: str) -> float:
        """A dropout probability; 0 where it is left out."""
        self.probabilities.append(name)
        value = self.number(name, 0.0, below=1.0)
        if value < 0.0:
            raise self.refuse(name, f"0 <= {name} < 1 is needed")
        return value

    def optional(self, name: str) -> float | None:
        """A positive number; None where the field is null or left out."""
        return None if self.get(name) is None else self.number(name, above=0.0)

    def switch(self, name: str, default: bool = False) -> bool:
        """True or False."""
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false is needed")
        return value

    def activation(self, name: str) -> Activation:
        """An activation, under the name that ``gptkern.ops`` uses."""
        value = self.get(name)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.refuse(name, f"accepted are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def fixed(self, name: str, *accepted: Any) -> None:
        """Refuse a switch that changes what the model computes, in a way that is not served."""
        value = self.get(name)
        if value is not None and value not in accepted:
            raise self.refuse(name, f"served is {' or '.join(map(shown, accepted))}")

    def per_layer(self, name: str, layers: int, accepted: tuple[Any, ...], default: Any) -> list[Any]:
        """A list with an entry for each layer; ``default`` for each where it is null or left out."""
        value = self.get(name)
        if value is None:
            return [default] * layers
        if not isinstance(value, list | tuple) or len(value) < layers:
            raise self.refuse(name, f"a list of {layers}, one for each layer, is needed")
        for entry in value[:layers]:
            if entry not in accepted:
                raise ValueError(
                    f"{self.model_type}: {name} has {shown(entry)}; served are "
                    f"{', '.join(map(shown, accepted))}"
                )
        return list(value[:layers])

    def kv_heads(self, heads: int, name: str = "num_key_value_heads") -> int:
        """The number of key and value heads; that of query heads where it is left out."""
        kv_heads = self.integer(name, heads)
        if heads % kv_heads:
            raise self.refuse(name, f"a divisor of the {heads} query heads is needed")
        return kv_heads

    def head_dim(self, width: int, heads: int) -> int:
        """The elements of a head: ``head_dim``, or where it is left out what the width has for each."""
        if self.get("head_dim") is None and width % heads:
            raise ValueError(
                f"{self.model_type}: the width is {width}, the number of heads {heads}: the first must be a "
                "multiple of the second, or head_dim be given"
            )
        return self.integer("head_dim", width // heads)

    def rotary(
        self,
        head_dim: int,
        theta: float = 10000.0,
        *,
        fraction: float | None = None,
        layer_type: str | None = None,
    ) -> RotarySpec:
        """Rotary positions: ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``.

        Args:
            theta: The base of the frequencies, where the field is left out.
            fraction: The share of a head that is rotated, where ``partial_rotary_factor`` is left out; None:
                the family rotates whole heads, and another share is refused.
            layer_type: The kind of layer: ``rope_parameters`` has a table for each.
        """
        name = "rope_scaling" if self.get("rope_parameters") is None else "rope_parameters"
        values = self._rotary_table(name, layer_type)
        shares = Fields(
            self.model_type,
            {field: values.get(field, self.get(field)) for field in ("rope_theta", "partial_rotary_factor")},
        )
        if fraction is None:
            shares.fixed("partial_rotary_factor", 1.0)
        share = shares.number("partial_rotary_factor", fraction or 1.0, above=0.0)
        rotated = self.rotated(head_dim, int(head_dim * share))
        base = shares.number("rope_theta", theta, above=0.0)
        return RotarySpec(rotated, base, "halves", self._scaling(name, values, rotated))

    def rotated(self, head_dim: int, elements: int) -> int:
        """The number of a head's elements that are rotated, checked."""
        if not 0 < elements <= head_dim or elements % 2:
            raise ValueError(
                f"{self.model_type}: {elements} of a head's {head_dim} elements are rotated; "
                "an even number from 2 to all of them is needed"
            )
        return elements

    def _rotary_table(self, name: str, layer_type: str | None) -> dict[str, Any]:
        values = self.get(name)
        if values is None:
            return {}
        by_kind = layer_type is not None and name == "rope_parameters"
        if not isinstance(values, dict):
            raise self.refuse(name, "an object is needed")
        for key, value in values.items():
            if isinstance(value, dict) != by_kind and value is not None:
                needed = "a table for each kind of layer" if by_kind else "one table for all layers"
                raise ValueError(
                    f"{self.model_type}: {name} has {shown(key)} {shown(value)}; {needed} is needed"
                )
        return (values.get(layer_type) or {}) if by_kind else values

    def _scaling(self, name: str, values: dict[str, Any], dim: int) -> RopeScaling | None:
        kind = values.get("rope_type", values.get("type", "default"))
        if kind == "default":
            return None
        if not isinstance(kind, str) or kind not in _SCALINGS:
            raise ValueError(
                f"{self.model_type}: {name} has rope_type {shown(kind)}; "
                f"served are default, {', '.join(_SCALINGS)}"
            )
        needed, others = _SCALINGS[kind]
        original = "original_max_position_embeddings"
        # As in transformers a field outside the table goes before the table's (Phi 3).
        outside = self.get(original) or values.get(original) or self.get("max_position_embeddings")
        values = {**values, original: outside}
        numbers = {key: values[key] for key in (*needed, *others) if values.get(key) is not None}
        for key in needed:
            if key not in numbers:
                raise ValueError(f"{self.model_type}: {name} of type {kind} has no {key}, which it needs")
        for key, value in numbers.items():
            numbers[key] = self._scaling_value(name, key, value, dim)
        if kind == "llama3" and not numbers["high_freq_factor"] > numbers["low_freq_factor"]:
            raise ValueError(
                f"{self.model_type}: {name} has high_freq_factor {numbers['high_freq_factor']} and "
                f"low_freq_factor {numbers['low_freq_factor']}; the first must be the larger"
            )
        return RopeScaling(kind, tuple(sorted(numbers.items())))  # type: ignore[arg-type]

    def _scaling_value(self, name: str, key: str, value: Any, dim: int) -> float | bool | tuple[float, ...]:
        if key in ("short_factor", "long_factor"):
            good = isinstance(value, list | tuple) and len(value) == dim // 2
            if good and all(is_number(entry) and entry > 0 for entry in value):
                return tuple(map(float, value))
            needed = f"a list of {dim // 2} numbers above 0, one for each pair that is rotated"
        elif key == "truncate":
            if isinstance(value, bool):
                return value
            needed = "true or false"
        elif is_number(value) and (value > 0 or key.startswith("mscale")):
            return float(value) if key != "original_max_position_embeddings" else int(value)
        else:
            needed = "a number above 0"
        raise ValueError(f"{self.model_type}: {name} has {key} {shown(value)}; {needed} is needed")


@dataclass(frozen=True)
class Tensor:
    """A parameter of the decoder, and the tensors of a checkpoint that hold it.

    Attributes:
        ours: Its name in the decoder, less ``transformer.``; the head's is ``lm_head``.
        theirs: The names in transformers' checkpoints; several are stacked along the first dimension.
        transposed: A matrix that is stored as ``(in, out)``.
        per_head: Queries, keys and values whose rows are stored head by head, each head's query rows, key
            rows and value rows one after another (GPT-NeoX). All heads have keys and values of their own.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    per_head: bool = False


def rows(
    *names: tuple[str, ...], layer: str = "", suffixes: tuple[str, ...] = ("weight",)
) -> tuple[Tensor, ...]:
    """Rows of plain tensors, for each (ours, theirs, ...) and each suffix.

    Args:
        layer: The beginning of theirs, as in ``model.layers.{}.``; ours then begin with ``h.{}.``.
        suffixes: ``weight``, ``bias`` or both.
    """
    return tuple(
        Tensor(
            ("h.{}." if layer else "") + f"{ours}.{suffix}",
            tuple(f"{layer}{theirs}.{suffix}" for theirs in stacked),
        )
        for ours, *stacked in names
        for suffix in suffixes
    )


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: As in ``config.json``.
        architecture: transformers' class of the language model.
        spec: A ``DecoderSpec`` of a ``config.json``'s fields.
        tensors: How its checkpoints call each parameter.
        defaults: What transformers takes for fields that are left out of ``config.json``.
        scaled_init: Fresh weights of each branch's last product are divided by sqrt(2 layers), as GPT-2's.
    """

    model_type: str
    architecture: str
    spec: Callable[[Fields], DecoderSpec]
    tensors: tuple[Tensor, ...]
    defaults: Mapping[str, Any]
    scaled_init: bool = False

    def named(self, layers: int) -> Iterator[Tensor]:
        """The rows with full names, those of a layer once for each layer."""
        for row in self.tensors:
            if "{}" not in row.ours:
                yield Tensor(_full(row.ours), row.theirs, row.transposed, row.per_head)
                continue
            for layer in range(layers):
                theirs = tuple(name.format(layer) for name in row.theirs)
                yield Tensor(_full(row.ours.format(layer)), theirs, row.transposed, row.per_head)


def _full(ours: str) -> str:
    return ours if ours.startswith("lm_head.") else f"transformer.{ours}"
