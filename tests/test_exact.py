"""Kernels in a finite ring against references in the same ring: equal bit for bit, in any order."""

import numpy as np
import pytest
import torch
from exact_reference import (
    ACTIVATIONS,
    Number,
    attention,
    attention_backward,
    decimal,
    exp,
    log,
    matmul,
    norm,
    norm_backward,
    read,
    written,
)

from gptkern import ops
from gptkern.testing import exact
from gptkern.testing.exact import ring

pytestmark = pytest.mark.kernels
EPS = decimal("0.00001")


@pytest.fixture(autouse=True)
def interpreted(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("kernels are compiled here, not interpreted")


def grads(outputs: list[torch.Tensor], inputs: list[torch.Tensor], upstream: list[torch.Tensor]) -> list:
    return list(torch.autograd.grad(outputs, inputs, upstream))


def leaf(*shape: int, seed: int) -> torch.Tensor:
    return exact.numbers(*shape, seed=seed).requires_grad_()


def plain(tensor: torch.Tensor) -> np.ndarray:
    return read(tensor.detach())


# Widths and row counts: one tile, several, and rows so wide that they take the kernels in chunks.
@pytest.mark.parametrize(("rows", "width"), [(3, 20), (9, 130)])
@pytest.mark.parametrize("centered", [True, False])
def test_norms(rows, width, centered):
    x, weight, bias = leaf(rows, width, seed=1), leaf(width, seed=2), leaf(width, seed=3)
    grad = exact.numbers(rows, width, seed=4)
    inputs = [x, weight, bias] if centered else [x, weight]
    with exact.algebra():
        out = ops.layer_norm(x, weight, bias) if centered else ops.rms_norm(x, weight, 1e-5)
        got = [out, *grads([out], inputs, [grad])]
    h, _ = norm(plain(x), EPS, centered=centered)
    right = [h * plain(weight) + (plain(bias) if centered else Number(0))]
    right += norm_backward(plain(x), plain(weight), plain(grad), EPS, centered=centered)[: len(inputs)]
    for name, a, b in zip(("out", "dx", "dweight", "dbias"), got, right, strict=False):
        exact.assert_same(a, written(b), name)


def test_norm_of_a_sum():
    x, residual, weight = leaf(4, 24, seed=1), leaf(4, 24, seed=2), leaf(24, seed=3)
    upstream = [exact.numbers(4, 24, seed=seed) for seed in (4, 5)]
    with exact.algebra():
        out, total = ops.add_rms_norm(x, residual, weight, 1e-5)
        got = [out, total, *grads([out, total], [x, residual, weight], upstream)]
    summed = plain(x) + plain(residual)
    h, _ = norm(summed, EPS, centered=False)
    dx, dweight, _ = norm_backward(summed, plain(weight), plain(upstream[0]), EPS, centered=False)
    dx = dx + plain(upstream[1])
    for index, (a, b) in enumerate(zip(got, (h * plain(weight), summed, dx, dx, dweight), strict=True)):
        exact.assert_same(a, written(b), f"tensor {index}")


@pytest.mark.slow
@pytest.mark.parametrize("centered", [True, False])
def test_norm_in_chunks(centered):
    """Rows wider than registers hold: moments merge chunk by chunk, and sums stay what they are."""
    width = 16384 + 40
    x, weight, grad = leaf(1, width, seed=1), leaf(width, seed=2), exact.numbers(1, width, seed=3)
    with exact.algebra():
        out = ops.layer_norm(x, weight) if centered else ops.rms_norm(x, weight, 1e-5)
        got = [out, *grads([out], [x, weight], [grad])]
    h, _ = norm(plain(x), EPS, centered=centered)
    right = norm_backward(plain(x), plain(weight), plain(grad), EPS, centered=centered)[:2]
    for a, b in zip(got, (h * plain(weight), *right), strict=True):
        exact.assert_same(a, written(b))


# (tokens, inputs, outputs): one tile; more than one each way, tokens split for the weight's gradient.
@pytest.mark.parametrize(
    ("m", "k", "n", "activation"), [(140, 36, 70, "gelu_tanh"), *((3, 20, 9, name) for name in ACTIVATIONS)]
)
def test_linear(m, k, n, activation):
    x, weight, bias = leaf(m, k, seed=1), leaf(n, k, seed=2), leaf(n, seed=3)
    grad = exact.numbers(m, n, seed=5)
    with exact.algebra():
        out = ops.linear_act(x, weight, bias, activation=activation)
        got = [out, *grads([out], [x, weight, bias], [grad])]
    function, derivative = ACTIVATIONS[activation]
    pre = matmul(plain(x), plain(weight).T) + plain(bias)
    dpre = plain(grad) * derivative(pre)
    right = function(pre), matmul(dpre, plain(weight)), matmul(dpre.T, plain(x)), dpre.sum(0)
    for name, a, b in zip(("out", "dx", "dweight", "dbias"), got, right, strict=True):
        exact.assert_same(a, written(b), name)


def test_linear_residual():
    x, weight, bias, residual = (
        leaf(70, 20, seed=1),
        leaf(9, 20, seed=2),
        leaf(9, seed=3),
        leaf(70, 9, seed=4),
    )
    grad = exact.numbers(70, 9, seed=5)
    with exact.algebra():
        out = ops.linear_residual(x, weight, bias, residual)
        dx, dresidual = grads([out], [x, residual], [grad])
    exact.assert_same(out, written(matmul(plain(x), plain(weight).T) + plain(bias) + plain(residual)))
    exact.assert_same(dx, written(matmul(plain(grad), plain(weight))), "dx")
    exact.assert_same(dresidual, grad, "dresidual")


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_gelu_mlp(activation):
    m, d, inner = 20, 24, 70
    x = leaf(m, d, seed=1)
    weights = [leaf(inner, d, seed=2), leaf(inner, seed=3), leaf(d, inner, seed=4), leaf(d, seed=5)]
    grad = exact.numbers(m, d, seed=6)
    with exact.algebra():
        out = ops.gelu_mlp(x, *weights, activation=activation)
        got = [out, *grads([out], [x, *weights], [grad])]
    function, derivative = ACTIVATIONS[activation]
    w1, b1, w2, b2 = (plain(w) for w in weights)
    pre = matmul(plain(x), w1.T) + b1
    hidden = function(pre)
    dpre = matmul(plain(grad), w2) * derivative(pre)
    right = (
        *(matmul(hidden, w2.T) + b2, matmul(dpre, w1), matmul(dpre.T, plain(x)), dpre.sum(0)),
        *(matmul(plain(grad).T, hidden), plain(grad).sum(0)),
    )
    for index, (a, b) in enumerate(zip(got, right, strict=True)):
        exact.assert_same(a, written(b), f"tensor {index}")


def test_gated_mlp():
    m, d, inner = 20, 24, 70
    x, w_in, w_out = leaf(m, d, seed=1), leaf(2 * inner, d, seed=2), leaf(d, inner, seed=3)
    grad = exact.numbers(m, d, seed=4)
    with exact.algebra():
        out = ops.gated_mlp(x, w_in, None, w_out, None)
        got = [out, *grads([out], [x, w_in, w_out], [grad])]
    function, derivative = ACTIVATIONS["silu"]
    pre = matmul(plain(x), plain(w_in).T)
    gate, up = pre[:, :inner], pre[:, inner:]
    hidden = function(gate) * up
    dhidden = matmul(plain(grad), plain(w_out))
    dpre = np.concatenate([dhidden * up * derivative(gate), dhidden * function(gate)], 1)
    right = (
        matmul(hidden, plain(w_out).T),
        matmul(dpre, plain(w_in)),
        matmul(dpre.T, plain(x)),
        matmul(plain(grad).T, hidden),
    )
    for index, (a, b) in enumerate(zip(got, right, strict=True)):
        exact.assert_same(a, written(b), f"tensor {index}")


# (queries, keys, dim): inside a tile; several tiles each way; more keys than queries.
@pytest.mark.parametrize(("seq_q", "seq_k", "dim"), [(5, 5, 16), (70, 70, 16), (9, 140, 32)])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention(seq_q, seq_k, dim, causal):
    q, k, v = leaf(1, seq_q, 2, dim, seed=1), leaf(1, seq_k, 1, dim, seed=2), leaf(1, seq_k, 1, dim, seed=3)
    grad = exact.numbers(1, seq_q, 2, dim, seed=4)
    with exact.algebra():
        out, lse = ops.flash_attention(q, k, v, causal=causal, scale=0.25, return_lse=True)
        dq, dk, dv = grads([out], [q, k, v], [grad])
    seen = np.ones((seq_q, seq_k), int)
    if causal:
        seen = np.tril(seen, seq_k - seq_q)
    seen = seen.astype(object)
    scale, keys, values = decimal("0.25"), plain(k)[0, :, 0], plain(v)[0, :, 0]
    dk_right = dv_right = Number(0)
    for head in range(2):
        queries, upstream = plain(q)[0, :, head], plain(grad)[0, :, head]
        out_right, lse_right = attention(queries, keys, values, scale, seen)
        dq_right, dk_head, dv_head = attention_backward(queries, keys, values, upstream, scale, seen)
        dk_right, dv_right = dk_right + dk_head, dv_right + dv_head
        exact.assert_same(out[0, :, head], written(out_right), "out")
        exact.assert_same(lse[0, head], written(lse_right), "lse", of="exponent")
        exact.assert_same(dq[0, :, head], written(dq_right), "dq")
    exact.assert_same(dk[0, :, 0], written(dk_right), "dk")
    exact.assert_same(dv[0, :, 0], written(dv_right), "dv")


# More words than a tile, more tokens than one.
@pytest.mark.parametrize(("tokens", "vocab", "width"), [(5, 9, 20), (70, 140, 20)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_linear_cross_entropy(tokens, vocab, width, smoothing):
    hidden, weight, bias = leaf(tokens, width, seed=1), leaf(vocab, width, seed=2), leaf(vocab, seed=3)
    targets = torch.randint(0, vocab, (tokens,))
    targets[1] = -100
    grad = exact.numbers(tokens, seed=4)
    with exact.algebra():
        loss = ops.linear_cross_entropy(
            hidden, weight, targets, bias=bias, reduction="none", label_smoothing=smoothing
        )
        got = grads([loss], [hidden, weight, bias], [grad])
    logits = matmul(plain(hidden), plain(weight).T) + plain(bias)
    lse = log(exp(logits).sum(-1))
    share = decimal(str(smoothing))
    hit = np.zeros((tokens, vocab), object)
    hit[np.arange(tokens), targets.clamp(min=0).numpy()] = 1
    wanted = hit * (1 - share) + share / vocab
    losses = lse - (logits * wanted).sum(-1)
    dlogits = (exp(logits - lse[:, None]) - wanted) * plain(grad)[:, None]
    losses[1], dlogits[1] = Number(0), Number(0)
    exact.assert_same(loss.detach(), written(losses), "loss", of="exponent")
    right = matmul(dlogits, plain(weight)), matmul(dlogits.T, plain(hidden)), dlogits.sum(0)
    for name, a, b in zip(("dhidden", "dweight", "dbias"), got, right, strict=True):
        exact.assert_same(a, written(b), name)


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
@pytest.mark.parametrize("norms", [True, False])
def test_rotary(pairs, norms):
    seq, dim = 6, 12
    q, k, cos, sin = leaf(2, seq, 3, 16, seed=1), leaf(2, seq, 1, 16, seed=2), *_tables(seq, dim)
    weights = leaf(16, seed=5), leaf(16, seed=6)
    upstream = [exact.numbers(2, seq, heads, 16, seed=7) for heads in (3, 1)]
    inputs = [q, k, *weights] if norms else [q, k]
    with exact.algebra():
        outputs = ops.rotary(q, k, cos, sin, pairs=pairs, norm=(*weights, 1e-5) if norms else None)
        got = [*outputs, *grads(list(outputs), inputs, upstream)]
    c, s = plain(cos)[:, None, :], plain(sin)[:, None, :]
    half = dim // 2
    places = [(i, i + half) if pairs == "halves" else (2 * i, 2 * i + 1) for i in range(half)]
    first, second = (np.array([place[i] for place in places]) for i in (0, 1))
    right, gradients, weight_grads = [], [], []
    for x, weight, grad in zip((q, k), weights, upstream, strict=True):
        h, _ = norm(plain(x), EPS, centered=False)
        y = h * plain(weight) if norms else plain(x)
        out, back = y.copy(), plain(grad).copy()
        out[..., first] = y[..., first] * c - y[..., second] * s
        out[..., second] = y[..., second] * c + y[..., first] * s
        back[..., first] = plain(grad)[..., first] * c + plain(grad)[..., second] * s
        back[..., second] = plain(grad)[..., second] * c - plain(grad)[..., first] * s
        if norms:
            rows = back.reshape(-1, 16)
            dx, dweight, _ = norm_backward(
                plain(x).reshape(-1, 16), plain(weight), rows, EPS, centered=False
            )  # fmt: skip
            back = dx.reshape(back.shape)
            weight_grads.append(dweight)
        right.append(out)
        gradients.append(back)
    for index, (a, b) in enumerate(zip(got, (*right, *gradients, *weight_grads), strict=True)):
        exact.assert_same(a, written(b), f"tensor {index}")


def _tables(seq: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return exact.numbers(seq, dim // 2, seed=3), exact.numbers(seq, dim // 2, seed=4)


def test_the_ring_is_one():
    """What kernels rely on, for random elements: the library's arrays and Python's integers agree."""
    a, b, c = (exact.numbers(200, seed=seed).numpy() for seed in (1, 2, 3))
    x, y, z = (read(torch.from_numpy(array)) for array in (a, b, c))
    for library, python in (
        (ring.add(a, b), x + y),
        (ring.subtract(a, b), x - y),
        (ring.multiply(a, b), x * y),
        (ring.divide(a, b), x / y),
        (ring.exp(a), exp(x)),
        (ring.log(ring.exp(a)), log(exp(x))),
        (ring.total(a, 0, False), x.sum()),
        (ring.divide(ring.multiply(a, ring.exp(c)), ring.multiply(b, ring.exp(c))), x / y),
        (ring.multiply(ring.exp(a), ring.exp(b)), exp(x + y)),
        (ring.log(ring.multiply(ring.exp(a), ring.exp(b))), log(exp(x)) + log(exp(y))),
        (ring.multiply(a, ring.add(b, c)), x * y + x * z),
    ):
        exact.assert_same(torch.from_numpy(library), written(np.asarray(python)))
    sums = ring.total(ring.exp(a), 0, False)
    exact.assert_same(
        torch.from_numpy(ring.exp(ring.log(sums))), written(np.asarray(exp(x).sum())), of="value"
    )


def test_constants_have_their_relations():
    log2e, ln2 = ring.constant(1.4426950408889634), ring.constant(0.6931471805599453)
    assert ring.product(log2e, ln2) == (1, 1)
    assert ring.constant(0.25 * 1.4426950408889634) == ring.product(ring.constant(0.25), log2e)
    assert ring.constant(-0.1) == (-ring.constant(0.1)[0] % ring.P, -ring.constant(0.1)[1] % ring.N)
    with pytest.raises(ValueError, match="no element"):
        ring.constant(3.141592653589793)


def test_what_is_no_algebra_is_refused():
    x = exact.numbers(4, 16)
    with exact.algebra(), pytest.raises(RuntimeError, match="outside of the ring"):
        x + x
    with exact.algebra(), pytest.raises(Exception, match="float32"):
        ops.layer_norm(torch.zeros(4, 16, dtype=torch.bfloat16))
    with exact.algebra(), pytest.raises(Exception, match="outside of the ring"):
        ops.layer_norm(-torch.ones(4, 16))
    assert not exact.parts(torch.zeros(3))[0].any()
