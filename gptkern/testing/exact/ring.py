"""The ring in which kernels are computed: pairs (value mod P, exponent mod N), N = P - 1.

Addition, subtraction and multiplication are those of both components. What else a kernel asks of numbers:

* Division multiplies by the pseudo-inverse, which is 0 where a component has no inverse; it is
  multiplicative, so that a common factor that has an inverse cancels.
* exp takes the exponent: ``exp(a) = (G^a.exponent, H^a.exponent)``. G generates the units mod P, so
  exp(a + b) = exp(a) exp(b). The second component is such a homomorphism too: N = 2 Q R with R dividing
  Q - 1, and H has order R mod Q (and is 1 mod 2 and mod R).
* log is the other way round: ``log(a) = (0, discrete logarithm of a.value)``; ``exp(log(a)).value`` is that
  of a, and log(a b) = log(a) + log(b). The value of a logarithm says nothing: it is compared by its exponent.
* A function without a form in the ring (rsqrt, erf, ...) is a symbol: a fixed pair for each argument.
* The order is that of the values, seen from -P / 2 to P / 2.

An element is stored in the 32 bits of a float32: value in the upper half, exponent in the lower. P is below
0x7f80, so the bits of every element are a positive finite float; infinities and NaN stay what they are, and
0.0 is the ring's 0.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

P, Q, R = 31247, 919, 17
N = P - 1
assert N == 2 * Q * R
assert (Q - 1) % R == 0
FIRST_SPECIAL = 0x7F800000

Array = np.ndarray


def _generator(prime: int) -> int:
    order = prime - 1
    factors = [f for f in range(2, order + 1) if order % f == 0 and all(f % d for d in range(2, f))]
    return next(g for g in range(2, prime) if all(pow(g, order // f, prime) != 1 for f in factors))


def _combined(mod_2: int, mod_q: int, mod_r: int) -> int:
    """The residue mod N with these residues mod 2, Q and R."""
    parts = ((mod_2, 2), (mod_q, Q), (mod_r, R))
    return sum(part * (N // m) * pow(N // m, -1, m) for part, m in parts) % N


G = _generator(P)
H = _combined(1, pow(_generator(Q), (Q - 1) // R, Q), 1)


def _pseudo_inverse(x: int, prime: int) -> int:
    return pow(x, prime - 2, prime) if x % prime else 0


def _tables() -> tuple[Array, Array, Array, Array, Array]:
    powers, logs = np.zeros(N, np.int64), np.zeros(P, np.int64)
    upper = np.array([pow(H, e, N) for e in range(R)])
    value = 1
    for exponent in range(N):
        powers[exponent], logs[value] = value, exponent
        value = value * G % P
    inverse_values = np.array([_pseudo_inverse(v, P) for v in range(P)])
    inverse_exponents = np.array(
        [_combined(*(_pseudo_inverse(e % m, m) for m in (2, Q, R))) for e in range(N)], np.int64
    )
    return powers, upper, logs, inverse_values, inverse_exponents


_POWERS, _UPPER, _LOGS, _INVERSE_VALUES, _INVERSE_EXPONENTS = _tables()


def inverse(pair: tuple[int, int]) -> tuple[int, int]:
    """The pseudo-inverse of one element."""
    return int(_INVERSE_VALUES[pair[0]]), int(_INVERSE_EXPONENTS[pair[1]])


def _mixed(number: Array) -> Array:
    """A fixed scrambling of 64-bit numbers (the finaliser of splitmix64; Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: Array = number ^ (number >> np.uint64(31))
    return mixed


def symbol(name: str, value: Array, exponent: Array) -> tuple[Array, Array]:
    """A fixed pair for each argument of the function ``name``; its exponent is even."""
    start = np.uint64(int.from_bytes(name.encode(), "little") % 2**61)
    seed = np.asarray(value).astype(np.uint64) << np.uint64(20) | np.asarray(exponent).astype(np.uint64)
    first = _mixed(_mixed(seed) ^ start)
    second = _mixed(first ^ np.uint64(1))
    return (first % np.uint64(P)).astype(np.int64), (second % np.uint64(N // 2) * np.uint64(2)).astype(
        np.int64
    )


def _unit(name: str) -> tuple[int, int]:
    """A symbol without arguments that has an inverse."""
    value, exponent = (int(x) for x in symbol(name, np.array(1), np.array(1)))
    value = value or 1
    exponent += 1
    while math.gcd(exponent, N) > 1:
        exponent += 2
    return value, exponent % N


def product(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """The product of two elements."""
    return a[0] * b[0] % P, a[1] * b[1] % N


def rational(number: Fraction) -> tuple[int, int]:
    """The element of a rational number."""
    top, bottom = number.numerator, number.denominator
    return product((top % P, top % N), inverse((bottom % P, bottom % N)))


LOG2E = _unit("log2(e)")
"""log2(e): ``exp2(x)`` is ``exp(x / LOG2E)``, ``log2(x)`` is ``log(x) LOG2E``."""

# The irrational constants of the kernels. What one is of another is said here, and not left to its digits.
_GELU = _unit("sqrt(8 / pi)")
_NAMED = (
    (1.4426950408889634, LOG2E),
    (0.6931471805599453, inverse(LOG2E)),
    (1.5957691216057308, _GELU),
    (0.2140644488178008, product(_GELU, rational(3 * Fraction("0.044715")))),
    (0.7071067811865476, _unit("sqrt(1 / 2)")),
    (0.3989422804014327, _unit("1 / sqrt(2 pi)")),
)


def constant(number: float) -> tuple[int, int]:
    """The element of a number that a kernel or its caller writes.

    Rational numbers of few digits are themselves; known irrational ones, and those times a small number,
    have a fixed element.

    Raises:
        ValueError: The number is neither: it is not known what it stands for.
    """
    exact = Fraction(number)
    if abs(exact.numerator) < 2**16 and exact.denominator <= 2**32:
        return rational(exact)
    for real, pair in _NAMED:
        ratio = Fraction(number / real).limit_denominator(64)
        # float32's accuracy: a launch may hand the number on in memory.
        if ratio and abs(number / real - ratio) < 1e-7 * abs(ratio):
            return product(rational(ratio), pair)
    few = Fraction(number).limit_denominator(4096)
    for candidate in (few, Fraction(f"{number:.9g}")):
        if abs(float(candidate) - number) <= 1e-15 * abs(number):
            return rational(candidate)
    raise ValueError(f"{number!r} has no element in the ring: it is no short number and no known constant")


def packed(value: Array, exponent: Array) -> Array:
    """float32 storage of elements."""
    bits = (np.asarray(value, np.uint32) << np.uint32(16)) | np.asarray(exponent, np.uint32)
    return np.asarray(np.asarray(bits).view(np.float32))


def stored(number: float) -> np.float32:
    """float32 storage of a number: an element, or itself if it is not finite."""
    if not math.isfinite(number):
        return np.float32(number)
    value, exponent = constant(number)
    return np.float32(packed(np.array([value]), np.array([exponent]))[0])


def split(data: Array) -> tuple[Array, Array, Array]:
    """(value, exponent, special) of storage; where ``special``, infinities and NaN, the others are 0.

    Raises:
        ValueError: Storage that holds neither: a float that did not come out of the ring.
    """
    bits = np.ascontiguousarray(data).view(np.uint32).reshape(data.shape)
    special = bits >= FIRST_SPECIAL
    value, exponent = (bits >> np.uint32(16)).astype(np.int64), (bits & np.uint32(0xFFFF)).astype(np.int64)
    if special.any():
        if np.isfinite(data[special]).any():
            raise ValueError(
                "a negative float is no element of the ring: something was computed outside of it"
            )
        value, exponent = np.where(special, 0, value), np.where(special, 0, exponent)
    if (value >= P).any() or (exponent >= N).any():
        raise ValueError("memory that no kernel wrote, or a number from outside of the ring")
    return value, exponent, special


def _proxy(data: Array, value: Array, exponent: Array, special: Array) -> Array:
    """Floats that stand for elements beside infinities and NaN: 0, or 1 as if it were positive."""
    nonzero = (value != 0) | (exponent != 0)
    return np.where(special, data, np.where(nonzero, 1.0, 0.0)).astype(np.float32)


def _binary(a: Array, b: Array, pair: tuple[Array, Array], floats: np.ufunc) -> Array:
    """Elements ``pair``, but what the operation on floats gives where an operand is infinite or NaN."""
    result = packed(*pair)
    parts_a, parts_b = split(a), split(b)
    special = parts_a[2] | parts_b[2]
    if not special.any():
        return result
    with np.errstate(all="ignore"):
        beside = floats(_proxy(a, *parts_a), _proxy(b, *parts_b))
    if (np.isfinite(beside) & (beside != 0) & special).any():
        raise ValueError("an infinity became a finite number that is not 0")
    return np.where(special, beside, result)


def add(a: Array, b: Array) -> Array:
    """a + b."""
    (va, ea, _), (vb, eb, _) = split(a), split(b)
    return _binary(a, b, ((va + vb) % P, (ea + eb) % N), np.add)


def subtract(a: Array, b: Array) -> Array:
    """a - b."""
    (va, ea, _), (vb, eb, _) = split(a), split(b)
    return _binary(a, b, ((va - vb) % P, (ea - eb) % N), np.subtract)


def multiply(a: Array, b: Array) -> Array:
    """a b; an infinity keeps its sign."""
    (va, ea, _), (vb, eb, _) = split(a), split(b)
    return _binary(a, b, (va * vb % P, ea * eb % N), np.multiply)


def divide(a: Array, b: Array) -> Array:
    """A times b's pseudo-inverse."""
    (va, ea, _), (vb, eb, _) = split(a), split(b)
    return _binary(a, b, (va * _INVERSE_VALUES[vb] % P, ea * _INVERSE_EXPONENTS[eb] % N), np.divide)


def negate(a: Array) -> Array:
    """-a."""
    value, exponent, special = split(a)
    return np.where(special, -a, packed(-value % P, -exponent % N))


def lifted(a: Array) -> Array:
    """Numbers in the elements' order, from which comparisons follow; NaN stays."""
    value, exponent, special = split(a)
    numbers = np.where(value > P // 2, value - P, value) * float(2 * N) + exponent
    return np.where(special, a, numbers)


def absolute(a: Array) -> Array:
    """A or -a, whichever has a value of 0 to P / 2."""
    value, _, special = split(a)
    return np.where(special, np.abs(a), np.where(value > P // 2, negate(a), a))


def _special_or(a: Array, special: Array, floats: np.ufunc, result: Array) -> Array:
    if not special.any():
        return result
    with np.errstate(all="ignore"):
        beside = floats(np.where(special, a, np.float32(0)))
    return np.where(special, beside, result).astype(np.float32)


def exp(a: Array) -> Array:
    """The exponential; 0 of -inf."""
    _, exponent, special = split(a)
    return _special_or(a, special, np.exp, packed(_POWERS[exponent], _UPPER[exponent % R]))


def log(a: Array) -> Array:
    """The logarithm; -inf of 0."""
    value, exponent, special = split(a)
    result = packed(np.zeros_like(value), _LOGS[value])
    result = np.where((value == 0) & (exponent == 0) & ~special, np.float32("-inf"), result)
    return _special_or(a, special, np.log, result)


def apply(name: str, a: Array) -> Array:
    """The symbol ``name`` of each element; NaN of what is no element."""
    value, exponent, special = split(a)
    return np.where(special, np.float32("nan"), packed(*symbol(name, value, exponent)))


def total(a: Array, axis: int | None, keepdims: bool) -> Array:
    """The sum over an axis."""
    value, exponent, special = split(a)
    value, exponent = (x.sum(axis=axis, keepdims=keepdims) for x in (value, exponent))
    result = packed(np.asarray(value % P), np.asarray(exponent % N))
    if not special.any():
        return result
    with np.errstate(all="ignore"):
        beside = np.where(special, a, np.float32(0)).sum(axis=axis, keepdims=keepdims)
    return np.where(special.any(axis=axis, keepdims=keepdims), beside, result).astype(np.float32)


def matmul(a: Array, b: Array) -> Array:
    """The matrix product; NaN where an infinity or NaN takes part.

    In float64, in which it is exact: a product is below 2^30, a sum of 2^22 of them below 2^53.
    """
    (va, ea, special_a), (vb, eb, special_b) = split(a), split(b)
    value = np.matmul(va.astype(np.float64), vb.astype(np.float64)).astype(np.int64) % P
    exponent = np.matmul(ea.astype(np.float64), eb.astype(np.float64)).astype(np.int64) % N
    special = special_a.any(-1, keepdims=True) | special_b.any(-2, keepdims=True)
    return np.where(special, np.float32("nan"), packed(value, exponent))
