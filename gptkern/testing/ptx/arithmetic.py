"""Instructions without memory: each as a function of arrays with one element a lane.

Registers hold bits: ``uint16``, ``uint32``, ``uint64``, or ``bool`` for predicates. Operands arrive as views
of the instruction's type, and what is returned has the type of the result. Approximations (``ex2.approx``,
``div.full``) are computed exactly and rounded once: a real GPU may be off by the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Function = Callable[..., Any]

DTYPES: dict[str, Any] = {
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
    "bf16": np.uint16, "bf16x2": np.uint32, "f16x2": np.uint32, "s16x2": np.uint32,
    "u16x2": np.uint32, "e4m3x2": np.uint16, "e5m2x2": np.uint16,
}  # fmt: skip
_DOUBLE = {np.int16: np.int32, np.int32: np.int64, np.uint16: np.uint32, np.uint32: np.uint64}


def from_bf16(bits: Array) -> Array:
    """bf16 bits as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: Array) -> Array:
    """float32 rounded to nearest even, as bf16 bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_fp8(octets: Array, kind: str) -> Array:
    """Bytes of e4m3 (finite values and NaN) or e5m2 as float32."""
    mantissa, bias = (3, 7) if kind == "e4m3" else (2, 15)
    sign = np.where(octets & 0x80, -1.0, 1.0)
    exponent = (octets >> mantissa) & (0xFF >> (mantissa + 1))
    fraction = octets & ((1 << mantissa) - 1)
    normal = (1 + fraction / (1 << mantissa)) * 2.0 ** (exponent.astype(np.float64) - bias)
    small = fraction / (1 << mantissa) * 2.0 ** (1 - bias)
    value = np.where(exponent == 0, small, normal)
    if kind == "e4m3":
        value = np.where((octets & 0x7F) == 0x7F, np.nan, value)
    else:
        value = np.where(exponent == 31, np.where(fraction == 0, np.inf, np.nan), value)
    return (sign * value).astype(np.float32)


def flush(values: Array) -> Array:
    """Denormal float32 to zero of the same sign (``.ftz``)."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def _fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32, rounded to odd in float64: rounding that is as rounding the exact sum."""
    product, addend = a.astype(np.float64) * b, np.asarray(c, dtype=np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = np.atleast_1d(total).view(np.int64)
    error = np.broadcast_to(error, bits.shape)
    even = np.isfinite(bits.view(np.float64)) & (error != 0) & (bits & 1 == 0)
    toward = np.where((error > 0) == (bits.view(np.float64) > 0), 1, -1)
    odd = np.where(even, bits + toward, bits).view(np.float64)
    return odd.reshape(np.shape(total))


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32, rounded once."""
    return _fma_to_odd(a, b, c).astype(np.float32)


def _narrow_to_odd(values: Array) -> Array:
    """float64 as float32, rounded to odd: rounding it to bf16 or fp16 is as rounding the first."""
    near = values.astype(np.float32)
    bits = np.ascontiguousarray(near).view(np.int32)
    off = np.isfinite(near) & (near != values) & (bits & 1 == 0)
    toward = np.where(np.abs(near) < np.abs(values), 1, -1).astype(np.int32)
    return np.where(off, bits + toward, bits).view(np.float32)


def _divided(a: Array, b: Array) -> Array:
    """Integer quotient toward zero; all ones for a zero divisor, as GPUs have it."""
    zero = b == 0
    safe = np.where(zero, np.ones_like(b), b)
    if np.issubdtype(a.dtype, np.unsignedinteger):
        quotient = a // safe
    else:
        quotient = a // safe  # toward minus infinity
        quotient = quotient + ((quotient * safe != a) & (quotient < 0)).astype(a.dtype)
    return np.where(zero, np.array(-1).astype(a.dtype), quotient).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return np.asarray(a - _divided(a, b) * b, a.dtype)


def _high_of_64(a: Array, b: Array) -> Array:
    """The upper 64 bits of products, by halves."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    mixed = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    rest = (mixed & low) + (x & low) * (y >> half)
    high = (x >> half) * (y >> half) + (mixed >> half) + (rest >> half)
    if a.dtype.kind == "i":  # a negative number is 2^64 too large as an unsigned one
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return np.asarray(high).astype(a.dtype)


def _high(a: Array, b: Array) -> Array:
    if a.dtype.itemsize == 8:
        return _high_of_64(a, b)
    wide = _DOUBLE[a.dtype.type]
    return np.asarray((a.astype(wide) * b.astype(wide)) >> wide(8 * a.dtype.itemsize), a.dtype)


def _wide(a: Array, b: Array) -> Array:
    wide = _DOUBLE[a.dtype.type]
    return np.asarray(a.astype(wide) * b.astype(wide))


def _shifted(a: Array, by: Array, left: bool) -> Array:
    bits = 8 * a.dtype.itemsize
    by = np.asarray(by).astype(np.uint64)
    beyond = by >= bits
    amount = np.where(beyond, np.uint64(bits - 1 if not left else 0), by).astype(a.dtype)
    if left:
        return np.where(beyond, np.zeros_like(a), a << amount)
    gone = a >> amount
    return np.where(beyond, gone if a.dtype.kind == "i" else np.zeros_like(a), gone)


def _field(a: Array, begin: Array, length: Array) -> Array:
    """``bfe``: ``length`` bits from ``begin`` on, sign-extended for a signed type."""
    bits = 8 * a.dtype.itemsize
    if bits != 32:
        raise NotImplementedError(f"bfe of {bits} bits")
    first, count = (np.asarray(x).astype(np.int64) & 0xFF for x in (begin, length))
    wide = a.astype(np.int64)
    value = (wide >> np.minimum(first, 63)) & ((np.int64(1) << np.minimum(count, 32)) - 1)
    if a.dtype.kind == "i":
        # Bits beyond the number are its sign, and so are those above the field's last.
        sign = wide >> np.minimum(first + count - 1, 31) & 1
        value = np.where(
            (sign != 0) & (count > 0) & (count < bits), value - (np.int64(1) << np.minimum(count, 32)), value
        )
    return np.asarray(value).astype(a.dtype)


def _inserted(a: Array, b: Array, begin: Array, length: Array) -> Array:
    """``bfi``: ``b`` with the low ``length`` bits of ``a`` from bit ``begin`` on."""
    first, count = (np.asarray(x) & np.uint32(0xFF) for x in (begin, length))
    ones = ~_shifted(~np.zeros_like(b), count, left=True)
    mask = _shifted(ones, first, left=True)
    return np.asarray((b & ~mask) | (_shifted(a, first, left=True) & mask))


def _smaller(a: Array, b: Array) -> Array:
    if a.dtype.kind != "f":
        return np.asarray(np.minimum(a, b))
    return np.where((a == 0) & (b == 0), -(-a - b), np.fmin(a, b))  # -0 is the smaller zero


def _larger(a: Array, b: Array) -> Array:
    if a.dtype.kind != "f":
        return np.asarray(np.maximum(a, b))
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def _with_nan(own: Function) -> Function:
    """A minimum or maximum that is NaN where either is."""
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), own(a, b))


def _not_negative(own: Function) -> Function:
    """A minimum or maximum that is 0 where it would be negative (``.relu``)."""
    return lambda a, b: np.maximum(own(a, b), 0)


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    pool = [((source >> np.uint32(8 * byte)) & np.uint32(0xFF)) for source in (a, b) for byte in range(4)]
    stack = np.stack(np.broadcast_arrays(*pool))
    out = np.zeros(stack.shape[1:], np.uint32)
    for byte in range(4):
        pick = (np.asarray(selector) >> np.uint32(4 * byte)) & np.uint32(0xF)
        chosen = np.take_along_axis(
            stack, np.broadcast_to(pick & np.uint32(7), out.shape)[None].astype(np.intp), 0
        )[0]
        sign = np.where(chosen & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        out |= np.where(pick & np.uint32(8), sign, chosen) << np.uint32(8 * byte)
    return out


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    out = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
    for row in range(8):
        if int(np.max(table)) >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


COMPARISONS: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparable(bits: Array, kind: str) -> tuple[Array, ...]:
    """A register's numbers as ``compare`` takes them: two of a pair, lower half first."""
    if kind.endswith("x2"):
        return _halves(bits, kind)
    return (from_bf16(bits) if kind == "bf16" else bits,)


def compare(how: str, a: Array, b: Array) -> Array:
    """``setp``; a name that ends in u is true where either is NaN."""
    if how in COMPARISONS:
        unordered = a.dtype.kind == "f" and how == "ne"
        found = COMPARISONS[how](a, b)
        return np.asarray(found & ~(np.isnan(a) | np.isnan(b)) if unordered else found)
    if how == "num":
        return ~(np.isnan(a) | np.isnan(b))
    if how == "nan":
        return np.isnan(a) | np.isnan(b)
    return np.asarray(COMPARISONS[how.removesuffix("u")](a, b) | np.isnan(a) | np.isnan(b))


# By the first part of the opcode: what it computes of its sources, all of the instruction's type.
PLAIN: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "min": _smaller, "max": _larger, "rem": _remainder,
}  # fmt: skip
EXACT: dict[str, Function] = {
    "ex2": lambda x: np.exp2(x.astype(np.float64)).astype(np.float32),
    "lg2": lambda x: np.log2(x.astype(np.float64)).astype(np.float32),
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
    "sqrt": lambda x: np.sqrt(x.astype(np.float64)).astype(np.float32),
    "rcp": lambda x: (1 / x.astype(np.float64)).astype(np.float32),
    "sin": lambda x: np.sin(x.astype(np.float64)).astype(np.float32),
    "cos": lambda x: np.cos(x.astype(np.float64)).astype(np.float32),
    "tanh": lambda x: np.tanh(x.astype(np.float64)).astype(np.float32),
}


def _halves(bits: Array, kind: str) -> tuple[Array, Array]:
    low, high = (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)
    if kind == "bf16x2":
        return from_bf16(low), from_bf16(high)
    return low.view(np.float16).astype(np.float32), high.view(np.float16).astype(np.float32)


def _joined(low: Array, high: Array, kind: str) -> Array:
    if kind == "bf16x2":
        low, high = to_bf16(low), to_bf16(high)
    else:
        low, high = low.astype(np.float16).view(np.uint16), high.astype(np.float16).view(np.uint16)
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def _fma_of_short(a: Array, b: Array, c: Array) -> Array:
    wide = (np.asarray(x, np.float32) for x in (a, b, c))
    return _narrow_to_odd(_fma_to_odd(*wide))


def _short(function: Function, kind: str, sources: tuple[Array, ...]) -> Array:
    """Arithmetic of bf16 and fp16, and of pairs of them: in float32, rounded once."""
    if kind == "bf16":
        return to_bf16(np.asarray(function(*map(from_bf16, sources)), np.float32))
    if kind == "f16":
        return np.asarray(function(*(source.astype(np.float32) for source in sources))).astype(np.float16)
    pairs = [_halves(source, kind) for source in sources]
    low, high = (function(*(pair[side] for pair in pairs)) for side in (0, 1))
    return _joined(low, high, kind)


def _float_function(parts: tuple[str, ...], fused: Function) -> Function | None:
    """The function of an opcode of floats, with its modifiers; ``fused``: for ``fma``."""
    name = parts[0]
    functions: dict[str, Function] = {**PLAIN, **EXACT, "fma": fused, "div": np.divide}
    if name not in functions:
        return None
    own = functions[name]
    if "NaN" in parts:
        own = _with_nan(own)
    if "relu" in parts:
        own = _not_negative(own)
    return (lambda *sources: flush(own(*map(flush, sources)))) if "ftz" in parts else own


def _pairs(name: str, kind: str, sources: tuple[Array, ...]) -> Array:
    """Arithmetic of pairs of 16-bit integers."""
    whole = np.broadcast_arrays(*map(np.atleast_1d, sources))
    halves = [np.ascontiguousarray(source).view(DTYPES[kind[:3]]) for source in whole]
    with np.errstate(over="ignore"):
        return np.asarray(PLAIN[name](*halves).view(np.uint32))


def function_of(parts: tuple[str, ...]) -> Function | None:
    """The function of an opcode cut at its dots; None if it is none of these."""
    name, kind = parts[0], parts[-1]
    if kind in ("s16x2", "u16x2"):
        served = name in ("add", "min", "max") and len(parts) == 2
        return (lambda *sources: _pairs(name, kind, sources)) if served else None
    if name in ("and", "or", "xor", "not"):
        return PLAIN[name] if kind != "pred" or name != "not" else np.logical_not
    if kind in ("bf16", "f16", "bf16x2", "f16x2"):
        own = _float_function(parts, _fma_of_short)
        return None if own is None else (lambda *sources: _short(own, kind, sources))
    if kind.startswith("f"):
        return _float_function(parts, fma)
    if name in ("min", "max") and "relu" in parts:
        return _not_negative(PLAIN[name])
    if name in ("mul", "mad"):
        products: dict[str, Function] = {"lo": np.multiply, "hi": _high, "wide": _wide}
        product = products[parts[1]]
        return product if name == "mul" else (lambda a, b, c: product(a, b) + c)
    if name in PLAIN:
        return PLAIN[name]
    others: dict[str, Function] = {
        "div": _divided,
        "shl": lambda a, b: _shifted(a, b, left=True),
        "shr": lambda a, b: _shifted(a, b, left=False),
        "bfe": _field,
        "bfi": _inserted,
        "prmt": _prmt,
        "lop3": _lop3,
        "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
        "clz": lambda a: (32 - np.ceil(np.log2(a.astype(np.float64) + 1))).astype(np.uint32),
    }
    return others.get(name)


def convert(parts: tuple[str, ...], value: Array) -> Array:
    """``cvt``: from the last type of the opcode to the one before it."""
    to, source = parts[-2], parts[-1]
    if source in ("e4m3x2", "e5m2x2") and to == "f16x2":
        octets = np.ascontiguousarray(value).view(np.uint8)
        return np.asarray(from_fp8(octets, source[:4]).astype(np.float16).view(np.uint32))
    if source == "bf16":
        value = from_bf16(value)
    if to == "bf16":
        return to_bf16(value.astype(np.float32))
    dtype = DTYPES[to]
    if value.dtype.kind == "f" and np.issubdtype(dtype, np.integer):
        rounding = next((part for part in parts if part in ("rni", "rzi", "rmi", "rpi")), "rzi")
        rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](value)
        limits = np.iinfo(dtype)
        bounded = np.clip(np.nan_to_num(rounded.astype(np.float64)), limits.min, limits.max)
        return bounded.astype(dtype)
    if np.issubdtype(dtype, np.integer) and "sat" in parts:
        return np.clip(value, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)
    result = value.astype(dtype)
    return flush(result) if "ftz" in parts and dtype is np.float32 else result


def convert_pair(parts: tuple[str, ...], high: Array, low: Array) -> Array:
    """``cvt.rn.bf16x2.f32 d, a, b``: ``a`` becomes the upper half."""
    if parts[-2] in ("e4m3x2", "e5m2x2"):
        low, high = (_to_fp8(np.asarray(x), parts[-2][:4]).astype(np.uint16) for x in (low, high))
        return low | (high << np.uint16(8))
    return _joined(low, high, parts[-2])


def _to_fp8(values: Array, kind: str) -> Array:
    """float32 rounded to nearest even as bytes of e4m3 or e5m2; beyond them the largest (``.satfinite``)."""
    codes = np.arange(0x7F if kind == "e4m3" else 0x7C, dtype=np.uint8)
    numbers = from_fp8(codes, kind).astype(np.float64)
    size = np.minimum(np.abs(np.nan_to_num(values.astype(np.float64), nan=0.0)), numbers[-1])
    above = np.searchsorted(numbers, size)
    below = np.maximum(above - 1, 0)
    far, near = numbers[above] - size, size - numbers[below]
    code = np.where((far < near) | ((far == near) & (above % 2 == 0)), above, below).astype(np.uint8)
    code = np.where(np.isnan(values), np.uint8(0x7F), code | (np.signbit(values).astype(np.uint8) << 7))
    return np.asarray(code, np.uint8)
