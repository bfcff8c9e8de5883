"""The quantisation of a model, as its checkpoint's ``config.json`` describes it. No tensors here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from gptkern.config import Config

METHOD = "gptkern"
FORMATS = ("int8", "fp8", "int4")
# The sizes of an int4 group: inputs that share a scale.
GROUP_SIZES = (128, 64, 32)
# Fields that name layers of another format.
_LISTS = ("floats", "int8")


@dataclass(frozen=True)
class Quantization:
    """The number format of a model's linear layers.

    Attributes:
        format: ``int8``, ``fp8`` or ``int4``.
        group_size: int4 only: inputs that share a scale.
        zero_point: int4 only: whether each group has a zero point, a real number, beside its scale.
        floats: Names of the layers that stay floats, as ``transformer.h.0.mlp.c_proj``; mostly none.
        int8: int4 only: names of the layers that are in int8; a head in 4 bits can cost more than all others.
    """

    format: str
    group_size: int
    zero_point: bool
    floats: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()

    @classmethod
    def make(
        cls,
        config: Config,
        format: str,
        group_size: int | None = None,
        zero_point: bool | None = None,
        int8: tuple[str, ...] = (),
    ) -> Self:
        """The description for a model of ``config``'s shape.

        Args:
            config: The model's shape.
            format: One of ``FORMATS``.
            group_size: int4 only; None takes the largest size that divides the model's widths.
            zero_point: int4 only; None means True.
            int8: int4 only; names of layers that are in int8.

        Raises:
            ValueError: The format is unknown, the groups do not divide a width of the model, or it has no
                layer of such a name.
        """
        spec = config.spec
        widths = [spec.width, spec.q_width, spec.inner]
        if format != "int4" and (group_size is not None or zero_point is not None):
            raise ValueError(f"quantize: group_size and zero_point are of int4 alone, weights is {format!r}")
        unknown = sorted(set(int8) - set(linear_names(len(spec.layers))))
        if unknown or (int8 and format != "int4"):
            raise ValueError(
                f"quantize: int8 is {', '.join(unknown or int8)!r}; layers' names beside weights='int4' are "
                "accepted, as lm_head and transformer.h.0.mlp.c_proj"
            )
        dividing = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
        size = group_size or (dividing or GROUP_SIZES)[0]
        check_format("quantize", format, size, widths)
        return cls(format, size, format == "int4" and zero_point is not False, int8=tuple(int8))

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``."""
        fields: dict[str, Any] = {"quant_method": METHOD, "format": self.format}
        if self.format == "int4":
            fields |= {"group_size": self.group_size, "zero_point": self.zero_point}
        return fields | {name: list(getattr(self, name)) for name in _LISTS if getattr(self, name)}

    @classmethod
    def from_dict(cls, data: Any, config: Config) -> Self:
        """The description that ``to_dict`` wrote.

        Raises:
            ValueError: ``data`` describes another method, or is not as ``to_dict`` writes it.
        """
        if not isinstance(data, dict) or data.get("quant_method") != METHOD:
            method = data.get("quant_method") if isinstance(data, dict) else data
            raise ValueError(f"quantization_config: quant_method is {method!r}; {METHOD!r} is supported")
        found = cls.make(config, str(data.get("format")), data.get("group_size"), data.get("zero_point"))
        floats, int8 = (_names(field, data.get(field, []), config) for field in _LISTS)
        return replace(found, floats=floats, int8=int8)

    def format_of(self, name: str) -> str:
        """The format of a layer that is not among ``floats``."""
        return "int8" if name in self.int8 else self.format


def _names(field: str, names: Any, config: Config) -> tuple[str, ...]:
    """A list of layers' names.

    Raises:
        ValueError: It is anything else.
    """
    known = set(linear_names(len(config.spec.layers)))
    if not isinstance(names, list) or not all(isinstance(n, str) and n in known for n in names):
        raise ValueError(
            f"quantization_config: {field} is {names!r:.99}; a list of layers' names, as lm_head and "
            "transformer.h.0.mlp.c_proj, is needed"
        )
    return tuple(names)


def linear_names(layers: int) -> Iterator[str]:
    """The names of the linear layers that decoding reads, the head last."""
    for layer in range(layers):
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            yield f"transformer.h.{layer}.{name}"
    yield "lm_head"


def check_format(op: str, format: str, group_size: int, widths: list[int]) -> None:
    """Raise ValueError for an unknown format, or for int4 groups that do not divide one of ``widths``."""
    if format not in FORMATS:
        raise ValueError(f"{op}: weights is {format!r}; accepted are {', '.join(FORMATS)}")
    if format != "int4":
        return
    if group_size not in GROUP_SIZES:
        raise ValueError(f"{op}: group_size is {group_size}; accepted are {', '.join(map(str, GROUP_SIZES))}")
    for width in widths:
        if width % group_size:
            able = [str(size) for size in GROUP_SIZES if not any(w % size for w in widths)]
            hint = f"group_size={' or '.join(able)} does" if able else "no group size does"
            raise ValueError(f"{op}: groups of {group_size} do not divide a width of {width}; {hint}")
