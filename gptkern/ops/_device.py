"""Device code that more than one kernel uses, as small functions on fp32 values."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 ``x``: gelu_tanh, gelu, relu, silu or none.

    gelu_tanh is x (1 + tanh u) / 2 = x / (1 + exp(-2 u)) (Hendrycks and Gimpel 2016), the form
    without the cancellation near tanh u = -1; where exp overflows the quotient is 0.
    """
    tl.static_assert(
        ACTIVATION == "gelu_tanh"
        or ACTIVATION == "gelu"
        or ACTIVATION == "relu"
        or ACTIVATION == "silu"
        or ACTIVATION == "none"
    )
    if ACTIVATION == "gelu_tanh":
        x = x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def sigmoid_grad(x):
    """(sigmoid, its derivative) without the cancellation in s (1 - s), and without overflow."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e * r, r), e * r * r


@triton.jit
def activation_grad(x, ACTIVATION: tl.constexpr):
    """The derivative of ``activate`` at fp32 ``x``."""
    if ACTIVATION == "gelu_tanh":
        s, ds = sigmoid_grad(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        grad = s + x * ds * (1.5957691216057308 + 0.2140644488178008 * x * x)
    elif ACTIVATION == "gelu":
        grad = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "relu":
        grad = (x > 0.0).to(tl.float32)
    elif ACTIVATION == "silu":
        s, ds = sigmoid_grad(x)
        grad = s + x * ds
    else:
        grad = tl.full(x.shape, 1.0, tl.float32)
    return grad
