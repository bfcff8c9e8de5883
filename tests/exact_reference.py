"""The ring once more, in Python's integers, and the ops' expressions in it: the reference of exact algebra.

Nothing here is shared with ``gptkern.testing.exact.ring`` but its moduli, generators, and symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gptkern.testing import exact
from gptkern.testing.exact import ring

P, N = ring.P, ring.N
FACTORS = (2, ring.Q, ring.R)
Array = np.ndarray


class Number:
    """One element."""

    __slots__ = ("exponent", "value")

    def __init__(self, value: int, exponent: int | None = None) -> None:
        self.value, self.exponent = value % P, (value if exponent is None else exponent) % N

    def __add__(self, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return NotImplemented
        other = _number(other)
        return Number(self.value + other.value, self.exponent + other.exponent)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return NotImplemented
        other = _number(other)
        return Number(self.value * other.value, self.exponent * other.exponent)

    def __neg__(self) -> Number:
        return Number(-self.value, -self.exponent)

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __truediv__(self, other: Any) -> Any:
        return self * _number(other).inverse()

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __rtruediv__(self, other: Any) -> Any:
        return self.inverse() * other

    def inverse(self) -> Number:
        """1 / x in every residue field, 0 of 0: Fermat's little theorem and Chinese remainders."""
        exponent = 0
        for factor in FACTORS:
            rest = N // factor
            residue = pow(self.exponent, factor - 2, factor) if self.exponent % factor else 0
            exponent += residue * rest * pow(rest, factor - 2, factor)
        return Number(pow(self.value, P - 2, P), exponent)

    def exp(self) -> Number:
        return Number(pow(ring.G, self.exponent, P), pow(ring.H, self.exponent, N))

    def log(self) -> Number:
        return Number(0, _discrete_logs()[self.value])


def _number(value: Any) -> Number:
    return value if isinstance(value, Number) else Number(int(value))


_LOGS: dict[int, int] = {}


def _discrete_logs() -> dict[int, int]:
    if not _LOGS:
        _LOGS.update({pow(ring.G, exponent, P): exponent for exponent in range(N)})
    return _LOGS


def half() -> Number:
    return Number(2).inverse()


def decimal(digits: str) -> Number:
    """A decimal number as a fraction of a power of ten."""
    whole, _, fraction = digits.partition(".")
    return Number(int(whole + fraction)) / Number(10 ** len(fraction))


def symbol(name: str) -> Callable[[Array], Array]:
    """An uninterpreted function, elementwise."""

    def one(x: Number) -> Number:
        value, exponent = ring.symbol(name, np.array(x.value), np.array(x.exponent))
        return Number(int(value), int(exponent))

    return np.vectorize(one, otypes=[object])


exp = np.vectorize(Number.exp, otypes=[object])
log = np.vectorize(Number.log, otypes=[object])
rsqrt, erf = symbol("rsqrt"), symbol("erf")


def read(tensor: torch.Tensor) -> Array:
    """The elements of a tensor."""
    value, exponent = exact.parts(tensor)
    return np.frompyfunc(lambda v, e: Number(int(v), int(e)), 2, 1)(value, exponent)


def written(array: Array) -> torch.Tensor:
    """A tensor of elements, as the kernels store them."""
    value = np.vectorize(lambda x: x.value, otypes=[np.int64])(array)
    exponent = np.vectorize(lambda x: x.exponent, otypes=[np.int64])(array)
    bits = np.asarray((value << 16) | exponent).astype(np.int32)
    return torch.from_numpy(bits).view(torch.float32)


def matmul(a: Array, b: Array) -> Array:
    """``a @ b``, component by component: products of 15 bits, so int64 holds their sums."""
    values, exponents = (
        np.vectorize(lambda x, name=name: getattr(x, name), otypes=[np.int64])
        for name in ("value", "exponent")
    )
    value, exponent = values(a) @ values(b), exponents(a) @ exponents(b)
    return np.frompyfunc(lambda v, e: Number(int(v), int(e)), 2, 1)(value, exponent)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + exp(-x))


C, A = Number(*ring.constant(1.5957691216057308)), decimal("0.044715")


def gelu_tanh(x: Array) -> Array:
    """x sigmoid(sqrt(8 / pi) (x + 0.044715 x^3))."""
    return x * sigmoid(C * (x + A * x * x * x))


def gelu_tanh_grad(x: Array) -> Array:
    """By the product and chain rules."""
    s = sigmoid(C * (x + A * x * x * x))
    return s + x * s * (1 - s) * C * (1 + 3 * A * x * x)


def silu_grad(x: Array) -> Array:
    s = sigmoid(x)
    return s + x * s * (1 - s)


def gelu(x: Array) -> Array:
    root = Number(*ring.constant(0.7071067811865476))
    return half() * x * (1 + erf(x * root))


def gelu_grad(x: Array) -> Array:
    """The distribution function, and x times the density."""
    root, density = Number(*ring.constant(0.7071067811865476)), Number(*ring.constant(0.3989422804014327))
    return half() * (1 + erf(x * root)) + x * density * exp(-half() * x * x)


def relu_grad(x: Array) -> Array:
    positive = np.vectorize(lambda y: Number(int(0 < y.value <= P // 2 or (not y.value and y.exponent > 0))))
    return positive(x)


ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "gelu_tanh": (gelu_tanh, gelu_tanh_grad),
    "gelu": (gelu, gelu_grad),
    "silu": (lambda x: x * sigmoid(x), silu_grad),
    "relu": (lambda x: x * relu_grad(x), relu_grad),
    "none": (lambda x: x, lambda x: x * 0 + 1),
}


def norm(x: Array, eps: Number, *, centered: bool) -> tuple[Array, Array]:
    """(normalised rows, 1 / standard deviation as a column)."""
    width = Number(x.shape[-1])
    if centered:
        x = x - (x.sum(-1) / width)[..., None]
    rstd = rsqrt((x * x).sum(-1) / width + eps)[..., None]
    return x * rstd, rstd


def norm_backward(x: Array, weight: Array, grad: Array, eps: Number, *, centered: bool) -> tuple[Array, ...]:
    """(dx, dweight, dbias) of rows, as vector-Jacobian products term by term."""
    width = Number(x.shape[-1])
    h, rstd = norm(x, eps, centered=centered)
    g = grad * weight
    dx = g - h * ((g * h).sum(-1) / width)[..., None]
    if centered:
        dx = dx - (g.sum(-1) / width)[..., None]
    return dx * rstd, (grad * h).sum(0), grad.sum(0)


def softmax_parts(scores: Array, seen: Array) -> tuple[Array, Array]:
    """(softmax over the last axis, log of the sum of exponentials): exponentials alone, no maximum."""
    terms = exp(scores) * seen
    total = terms.sum(-1)
    return terms / total[..., None], log(total)


def attention(q: Array, k: Array, v: Array, scale: Number, seen: Array) -> tuple[Array, Array]:
    """(out, lse) of one head: q (queries, dim), k and v (keys, dim), seen (queries, keys)."""
    weights, lse = softmax_parts(matmul(q, k.T) * scale, seen)
    return matmul(weights, v), lse


def attention_backward(
    q: Array, k: Array, v: Array, grad: Array, scale: Number, seen: Array
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of one head, weights as exp(scores - lse)."""
    scores = matmul(q, k.T) * scale
    out, lse = attention(q, k, v, scale, seen)
    weights = exp(scores - lse[:, None]) * seen
    dscores = weights * (matmul(grad, v.T) - (grad * out).sum(-1)[:, None])
    return matmul(dscores, k) * scale, matmul(dscores.T, q) * scale, matmul(weights.T, grad)
