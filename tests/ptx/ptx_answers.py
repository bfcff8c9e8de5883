"""Answers of instructions without memory, worked out from the ISA in Python's integers and fractions.

Nothing here is the executor's: numbers are bits, and each rounding is done once, from the exact value.
"""

from __future__ import annotations

import math
import operator
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

LANES = 32
# Bits of the significand, and the exponent of the least number.
_FLOATS = {"f64": (53, -1074), "f32": (24, -149), "f16": (11, -24), "bf16": (8, -133)}
_PACKED = {"f64": "<d", "f32": "<f", "f16": "<e"}


def size_of(kind: str) -> int:
    """The bits of a type; a predicate's is told by 32."""
    if kind == "pred":
        return 32
    digits = int(kind.removesuffix("x2").lstrip("bsuf"))
    return digits * (2 if kind.endswith("x2") else 1)


def decoded(kind: str, bits: int) -> int | float | bool:
    """The number that the lower bits are."""
    if kind == "pred":
        return bits != 0
    size = size_of(kind)
    bits &= (1 << size) - 1
    if kind == "bf16":
        return float(struct.unpack("<f", struct.pack("<I", bits << 16))[0])
    if kind in _PACKED:
        return float(struct.unpack(_PACKED[kind], bits.to_bytes(size // 8, "little"))[0])
    return bits - (1 << size) if kind[0] == "s" and bits >> (size - 1) else bits


def rounded(kind: str, exact: Fraction) -> float:
    """The nearest number of a floating type, the even one of two."""
    precision, least = _FLOATS[kind]
    if exact == 0:
        return 0.0
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    step = Fraction(2) ** max(exponent - precision + 1, least)
    whole = round(magnitude / step) * step  # Python rounds a half to the even integer
    most = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** (2 - least - precision)
    return math.copysign(math.inf if whole > most else float(whole), exact)


def encoded(kind: str, value: float | bool) -> int:
    """The bits of a number that the type has, or of an integer cut to it."""
    if kind == "pred":
        return int(value)
    size = size_of(kind)
    if kind == "bf16":
        return int(struct.unpack("<I", struct.pack("<f", value))[0]) >> 16
    if kind in _PACKED:
        return int.from_bytes(struct.pack(_PACKED[kind], value), "little")
    return int(value) & ((1 << size) - 1)


# --- arithmetic


def _flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def _exactly(kind: str, exact: Callable[..., Fraction], plain: Callable[..., float]) -> Callable[..., float]:
    """A function by its exact value; by IEEE's rules where an operand is no number, or the value is zero."""

    def function(*values: float) -> float:
        if all(map(math.isfinite, values)):
            value = exact(*map(Fraction, values))
            if value != 0:
                return rounded(kind, value)
        return plain(*values)

    return function


def _extreme(larger: bool, nan: bool, relu: bool) -> Callable[[float, float], float]:
    def function(a: float, b: float) -> float:
        if math.isnan(a) or math.isnan(b):
            found = math.nan if nan or (math.isnan(a) and math.isnan(b)) else b if math.isnan(a) else a
        else:
            found = (max if larger else min)(a, b, key=lambda x: (x, math.copysign(1, x)))
        return 0.0 if relu and found <= 0 else found

    return function


def _float_function(name: str, parts: list[str], kind: str) -> Callable[..., float]:
    function: Callable[..., float]
    if name in ("min", "max"):
        function = _extreme(name == "max", "NaN" in parts, "relu" in parts)
    else:
        function = {
            "neg": operator.neg,
            "abs": abs,
            "add": _exactly(kind, operator.add, operator.add),
            "sub": _exactly(kind, operator.sub, operator.sub),
            "mul": _exactly(kind, operator.mul, operator.mul),
            "fma": _exactly(kind, lambda a, b, c: a * b + c, lambda a, b, c: a * b + c),
            "div": _exactly(kind, lambda a, b: a / b if b else Fraction(0), _quotient),
            "rcp": _exactly(kind, lambda a: 1 / a if a else Fraction(0), lambda a: _quotient(1.0, a)),
            "sqrt": lambda x: math.nan if x < 0 else math.sqrt(x),
            "ex2": lambda x: rounded(kind, Fraction(2.0**x)) if x < 128 else x if math.isnan(x) else math.inf,
            "rsqrt": lambda x: math.nan if x < 0 else _quotient(1.0, math.sqrt(x) if x else x),
        }[name]
    if "ftz" in parts:
        return lambda *values: _flushed(function(*map(_flushed, values)))
    return function


def _quotient(a: float, b: float) -> float:
    if b:
        return a / b
    return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1, b)


def _truncated(a: int, b: int) -> int:
    return int(Fraction(a, b))


def _shifted_right(a: int, by: int) -> int:
    return a >> min(by, 64)


def _integer_function(name: str, parts: list[str], size: int) -> Callable[..., int]:
    if name in ("mul", "mad"):
        part = {"lo": 0, "wide": 0, "hi": size}[parts[1]]
        return (lambda a, b: a * b >> part) if name == "mul" else (lambda a, b, c: (a * b >> part) + c)
    if name in ("min", "max"):
        least = [0] if "relu" in parts else []
        return lambda a, b: max((min if name == "min" else max)(a, b), *least, *([] if least else [-(2**64)]))
    functions: dict[str, Callable[..., int]] = {
        "add": operator.add, "sub": operator.sub, "neg": operator.neg, "abs": abs, "not": operator.invert,
        "and": operator.and_, "or": operator.or_, "xor": operator.xor, "div": _truncated,
        "rem": lambda a, b: a - b * _truncated(a, b),
        "shl": lambda a, by: a << min(by, 64), "shr": _shifted_right,
        "popc": lambda a: a.bit_count(), "clz": lambda a: size - a.bit_length(),
    }  # fmt: skip
    return functions[name]


# --- forms


@dataclass(frozen=True)
class Answer:
    """What a form computes.

    Attributes:
        sources: Their types. ``result``: its type.
        function: Of the sources' numbers; for a pair a list, the lower half first.
        tolerance: Relative, where the ISA grants an approximation.
    """

    sources: tuple[str, ...]
    result: str
    function: Callable[..., Any]
    tolerance: float = 0.0


_COMPARED = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
    "ge": operator.ge,
}  # fmt: skip


def _compared(how: str, a: float, b: float) -> bool:
    unordered = math.isnan(a) or math.isnan(b)
    if how in _COMPARED:
        return not unordered and bool(_COMPARED[how](a, b))
    return unordered or bool(_COMPARED[how.removesuffix("u")](a, b))


def _converted(parts: list[str]) -> Answer:
    to, source = parts[-2], parts[-1]
    if to in _FLOATS:
        if source in _FLOATS:
            exact = _exactly(to, lambda x: x, lambda x: x)
            return Answer((source,), to, exact)
        return Answer((source,), to, lambda x: rounded(to, Fraction(x)))
    if source not in _FLOATS:
        return Answer((source,), to, lambda x: x)
    least, most = (-(1 << size_of(to) - 1), (1 << size_of(to) - 1) - 1)
    least, most = (least, most) if to[0] == "s" else (0, (1 << size_of(to)) - 1)
    integer = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}[parts[1]]

    def function(x: float) -> int:
        if math.isnan(x):
            return 0
        return max(least, min(most, integer(x) if math.isfinite(x) else least if x < 0 else most))

    return Answer((source,), to, function)


def _paired(parts: list[str]) -> Answer:
    """Both halves alike, the lower first; of two numbers that become a pair the first is its upper half."""
    to, source = parts[-2:] if parts[0] == "cvt" else (parts[-1], parts[-1])
    if source == "e4m3x2":
        return Answer(("b16",), to, lambda pair: [e4m3_number(pair & 0xFF), e4m3_number(pair >> 8 & 0xFF)])
    if to == "e4m3x2":
        return Answer((source, source), "b16", lambda high, low: e4m3(high) << 8 | e4m3(low))
    kind = to.removesuffix("x2")
    if parts[0] == "cvt":
        near = _exactly(kind, lambda x: x, lambda x: x)
        return Answer((source, source), to, lambda high, low: [near(low), near(high)])
    one = answer(".".join([*parts[:-1], kind]))

    def function(*pairs: int) -> list[float]:
        return [one.function(*(decoded(kind, pair >> shift) for pair in pairs)) for shift in (0, 16)]

    return Answer((to,) * len(one.sources), to, function)


def e4m3_number(code: int) -> float:
    """The number that a byte of e4m3 is."""
    if code & 0x7F == 0x7F:
        return math.nan
    exponent, fraction = code >> 3 & 15, (code & 7) / 8
    size = (1 + fraction) * 2.0 ** (exponent - 7) if exponent else fraction * 2.0**-6
    return -size if code & 0x80 else size


def e4m3(x: float) -> int:
    """The nearest of e4m3's numbers, by trying them all; beyond them the largest."""
    sign = 0x80 if math.copysign(1, x) < 0 else 0
    if math.isnan(x):
        return 0x7F
    numbers = [e4m3_number(code) for code in range(0x7F)]
    size = min(abs(x), numbers[-1])
    return sign | min(range(0x7F), key=lambda code: (abs(numbers[code] - size), code & 1))


# The largest relative errors that the ISA states, in units in the last place or as they are.
_APPROXIMATE = {"ex2": 2.0**-22, "rsqrt": 2.0**-22, "div": 2.0**-22}


def answer(form: str) -> Answer:
    """What a form of arithmetic, comparison, choice or conversion computes."""
    parts = form.split(".")
    name, kind = parts[0], parts[-1]
    if name == "setp" and not kind.endswith("x2"):
        return Answer((kind, kind), "pred", lambda a, b: _compared(parts[1], a, b))
    if name == "selp":
        return Answer((kind, kind, "pred"), kind, lambda a, b, first: a if first else b)
    if name == "mov":
        return Answer((kind,), kind, lambda a: a)
    if name == "prmt":
        return Answer((kind,) * 3, kind, _permuted)
    if name == "bfe":
        return Answer((kind, "u32", "u32"), kind, lambda a, at, count: _field(kind, a, at, count))
    if name == "bfi":
        return Answer((kind, kind, "u32", "u32"), kind, lambda *values: _with_field(size_of(kind), *values))
    if kind.endswith("x2") or (name == "cvt" and parts[-2].endswith("x2")):
        return _paired(parts)
    if name == "cvt":
        return _converted(parts)
    arity = {"neg": 1, "abs": 1, "not": 1, "rcp": 1, "sqrt": 1, "ex2": 1, "rsqrt": 1, "mad": 3, "fma": 3}
    sources = [kind] * arity.get(name, 2)
    if kind in _FLOATS:
        approximate = "approx" in parts or "full" in parts
        tolerance = _APPROXIMATE[name] if approximate else 0.0
        return Answer(tuple(sources), kind, _float_function(name, parts, kind), tolerance)
    result = kind
    if "wide" in parts:
        result = kind[0] + str(2 * size_of(kind))
        sources[2:] = [result] * len(sources[2:])
    if name in ("shl", "shr"):
        sources[1] = "u32"
    if kind == "pred":
        logical: dict[str, Callable[..., bool]] = {
            "and": lambda a, b: a and b, "or": lambda a, b: a or b, "xor": operator.ne, "not": operator.not_,
        }  # fmt: skip
        return Answer(tuple(sources[: 1 if name == "not" else 2]), kind, logical[name])
    return Answer(tuple(sources), result, _integer_function(name, parts, size_of(kind)))


def _permuted(a: int, b: int, selector: int) -> int:
    pool, found = (b << 32 | a).to_bytes(8, "little"), []
    for place in range(4):
        pick = selector >> 4 * place & 15
        byte = pool[pick & 7]
        found.append((0xFF if byte & 0x80 else 0) if pick & 8 else byte)
    return int.from_bytes(bytes(found), "little")


def _field(kind: str, a: int, at: int, count: int) -> int:
    at, count = at & 0xFF, count & 0xFF
    value = a >> min(at, 64) & ((1 << count) - 1)
    if kind[0] == "s" and 0 < count < 32 and a >> min(at + count - 1, 31) & 1:
        value -= 1 << count
    return value


def _with_field(size: int, a: int, b: int, at: int, count: int) -> int:
    """``b`` whose ``count`` bits from bit ``at`` on, as far as there are so many, are the lowest of ``a``."""
    at, count = at & 0xFF, count & 0xFF
    for bit in range(at, min(at + count, size)):
        b = b & ~(1 << bit) | (a >> bit - at & 1) << bit
    return b


# --- operands

_EDGES = [0, 1, 2, 3, 5, 7, -1, -2, -7, 100, -100, 0x55]
_NUMBERS = [0.0, -0.0, 1.0, -1.5, 3.25, 1e-40, -1e-40, 1e30, -1e30, math.inf, -math.inf, math.nan]
_SHIFTS = [0, 1, 5, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 100, 1 << 31, (1 << 32) - 1]


def operands(form: str, kind: str, position: int) -> list[int]:
    """The bits of a source for each lane: edges beside those of the other sources, and random numbers."""
    name = form.split(".")[0]
    draw = random.Random(f"{form} {position}")
    if name in ("shl", "shr") and position:
        return (_SHIFTS * 2)[:LANES]
    if (name == "bfe" and position) or (name == "bfi" and position > 1):
        return [draw.randrange(size_of(form.split(".")[-1]) + 1) for _ in range(LANES)]
    if kind.endswith("x2"):
        half = kind.removesuffix("x2")
        low, high = (operands(f"{form} {side}", half, position) for side in ("low", "high"))
        return [a | b << 16 for a, b in zip(low, high, strict=True)]
    if kind in _FLOATS:
        values = [rounded(kind, Fraction(x)) if math.isfinite(x) else x for x in _NUMBERS]
        values += [
            rounded(kind, Fraction(draw.uniform(-4, 4)) * Fraction(2) ** draw.randrange(-9, 9))
            for _ in range(LANES - len(values))
        ]
        # Numbers that a third one may cancel.
        draw.shuffle(values)
        return [encoded(kind, x) for x in values]
    size = size_of(kind)
    edges = [*_EDGES, (1 << size - 1) - 1, 1 << size - 1, 1 << size // 2, -(1 << size // 2)]
    found = [encoded(kind, x) if kind != "pred" else x & 1 for x in edges]
    found += [draw.getrandbits(1 if kind == "pred" else size) for _ in range(LANES - len(found))]
    draw.shuffle(found)
    if name in ("div", "rem") and position:  # by zero, and the quotient that overflows: not defined
        found = [bits if decoded(kind, bits) not in (0, -1) else 3 for bits in found]
    return found
