"""Arithmetic of float64: what NumPy rounds as a GPU does, and what it lacks.

Source of the fused product: Boldo and Melquiond, "Emulation of a FMA and Correctly Rounded Sums: Proved
Algorithms Using Rounding to Odd", IEEE Transactions on Computers 57 (2008).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from gptkern.testing.ptx import arithmetic
from gptkern.testing.ptx.arithmetic import DTYPES, Array

_SPLIT = float(2**27 + 1)
# Products and addends within these magnitudes have exact errors of their own.
_LEAST, _MOST = 2.0**-900, 2.0**900


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _product(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded product and its error."""
    product = a * b
    halves = []
    for value in (a, b):
        high = _SPLIT * value
        high = high - (high - value)
        halves.append((high, value - high))
    (a_high, a_low), (b_high, b_low) = halves
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _to_odd(total: Array, error: Array) -> Array:
    """The exact sum rounded to odd: toward the neighbour whose last bit is set, unless it is exact."""
    bits = total.view(np.int64)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.asarray(np.where((error != 0) & (bits & 1 == 0), bits + toward, bits).view(np.float64))


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float64, rounded once."""
    a, b, c = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, np.float64)) for x in (a, b, c)))
    with np.errstate(all="ignore"):
        product, error = _product(a, b)
        small, small_error = _sum(c, error)
        total, total_error = _sum(product, small)
        result = total + _to_odd(*_sum(total_error, small_error))
        plain = a * b + c
    inside = [(abs(x) < _MOST) & ((abs(x) > _LEAST) | (x == 0)) for x in (a, b, c, product)]
    exact = (a == 0) | (b == 0) | ~np.isfinite(plain) & ~(np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    result = np.where(exact, np.where(np.isfinite(a) & np.isfinite(b) & ~np.isfinite(c), c, plain), result)
    for lane in np.flatnonzero(~exact & ~np.logical_and.reduce(inside)):
        result[lane] = _once(Fraction(a[lane]) * Fraction(b[lane]) + Fraction(c[lane]), plain[lane])
    # Products that cancel: zero has the sign that the plain sum gives it.
    return np.where(result == 0, np.where(plain == 0, plain, result), result)


def _once(value: Fraction, plain: float) -> float:
    """A fraction rounded to float64, to infinity beyond its range."""
    if value == 0:
        return plain
    try:
        return value.numerator / value.denominator
    except OverflowError:
        return math.copysign(math.inf, value)


def _reciprocal(x: Array) -> Array:
    """``rcp.approx.ftz.f64``: the upper half of the number alone counts, and the lower of the result is 0."""
    upper = np.uint64(0xFFFFFFFF00000000)
    rough = (np.ascontiguousarray(x, np.float64).view(np.uint64) & upper).view(np.float64)
    rough = np.where(abs(rough) < np.finfo(np.float64).tiny, np.copysign(0.0, rough), rough)
    with np.errstate(all="ignore"):
        result = np.asarray(1 / rough)
    return np.asarray((result.view(np.uint64) & upper).view(np.float64))


def function_of(parts: tuple[str, ...]) -> Callable[..., Any] | None:
    """As in ``arithmetic``, for an opcode of float64."""
    others: dict[str, Callable[..., Any]] = {"fma": fma, "sqrt": np.sqrt, "div": np.divide}
    if parts[0] == "rcp":
        return _reciprocal if "approx" in parts else (lambda x: 1 / x)
    return others.get(parts[0]) or arithmetic.function_of(parts)


def convert(parts: tuple[str, ...], value: Array) -> Array:
    """``cvt`` from float64."""
    dtype = DTYPES[parts[-2]]
    if not np.issubdtype(dtype, np.integer):
        return arithmetic.convert(parts, value)
    rounding = next((part for part in parts if part in ("rni", "rzi", "rmi", "rpi")), "rzi")
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](value)
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    inside = (rounded > float(least)) & (rounded < float(most))
    beyond = np.where(np.isnan(rounded), dtype(0), np.where(rounded > 0, dtype(most), dtype(least)))
    return np.where(inside, np.where(inside, rounded, 0).astype(dtype), beyond)
