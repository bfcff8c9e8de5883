"""Decode kernels in a finite ring: splits of sums and of sequences, and the persistent step's phases."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_reference import (
    ACTIVATIONS,
    Number,
    attention,
    decimal,
    matmul,
    norm,
    read,
    written,
)

from gptkern import ops
from gptkern.ops import _launch
from gptkern.ops._types import HeadNorm, RmsNorm, Rotary
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_step import launch as step_launch
from gptkern.ops.decode_step import persistent_step
from gptkern.ops.decode_step.cases import Sizes, _Maker
from gptkern.ops.decode_step.rows import Positions, StepProgram
from gptkern.testing import exact

pytestmark = pytest.mark.kernels
EPS = decimal("0.00001")


@pytest.fixture(autouse=True)
def interpreted(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("kernels are compiled here, not interpreted")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "multiprocessors", lambda _: 2)


def quantized(format: str, outputs: int, width: int) -> tuple[QuantizedWeight, np.ndarray]:
    """A quantised weight and its matrix: value * scale, of int4 plus the minimum."""
    generator = np.random.default_rng(5)
    if format == "int8":
        values, scales = generator.integers(-127, 128, (outputs, width)), exact.numbers(outputs, seed=6)
        whole = np.vectorize(Number, otypes=[object])(values) * read(scales)[:, None]
        return QuantizedWeight(format, torch.from_numpy(values.astype(np.int8)), scales), whole
    groups = width // 32
    codes = generator.integers(0, 16, (outputs, groups, 32))
    scales, minimums = exact.numbers(outputs, groups, seed=6), exact.numbers(outputs, groups, seed=7)
    whole = np.vectorize(Number, otypes=[object])(codes) * read(scales)[..., None] + read(minimums)[..., None]
    packed = (codes[..., :16] | codes[..., 16:] << 4).reshape(outputs, -1).astype(np.uint8)
    weight = QuantizedWeight(format, torch.from_numpy(packed), scales, minimums)
    return weight, whole.reshape(outputs, width)


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("gated", [True, False])
def test_products_in_splits(format, gated):
    """Four parts of k, added up by the last; their sum is the product in one pass."""
    rows, width, outputs = 3, 160, 36
    x, bias, weights = exact.numbers(rows, width, seed=1), exact.numbers(outputs, seed=2), exact.numbers(
        2, width, seed=3
    )  # fmt: skip
    residual = exact.numbers(rows, outputs // 2 if gated else outputs, seed=4)
    if format == "fp32":
        weight = exact.numbers(outputs, width, seed=5)
        matrix = read(weight)
    else:
        weight, matrix = quantized(format, outputs, width)
    activation = "silu" if gated else "gelu_tanh"
    with exact.algebra():
        out = ops.decode_linear(
            x, weight, bias, norm=(weights[0], weights[1], 1e-5), activation=activation, gated=gated,
            residual=residual, scale=3.0,
        )  # fmt: skip
    h, _ = norm(read(x), EPS, centered=True)
    y = matmul(h * read(weights)[0] + read(weights)[1], matrix.T) + read(bias)
    function = ACTIVATIONS[activation][0]
    y = function(y[:, : outputs // 2]) * y[:, outputs // 2 :] if gated else function(y)
    exact.assert_same(out, written(y * 3 + read(residual)))


def attended(q, keys, values, scale):
    return attention(q, keys, values, scale, np.ones((len(q), len(keys)), int).astype(object))[0]


@pytest.mark.parametrize("window", [None, 140])
def test_attention_in_splits(window):
    """No, one and three splits of 128 tokens, in pages in any order, two heads to a key head."""
    lengths, heads, dim, page_size, pages = [1, 40, 300], 4, 16, 16, 19
    q = exact.numbers(3, heads, dim, seed=1)
    k, v = (exact.numbers(3 * pages, page_size, 2, dim, seed=seed) for seed in (2, 3))
    table = torch.randperm(3 * pages, dtype=torch.int32).view(3, pages)
    with exact.algebra():
        lens = torch.tensor(lengths, dtype=torch.int32)
        out = ops.decode_attention(q, k, v, table, lens, scale=0.25, window=window)
    queries, all_keys, all_values = read(q), read(k), read(v)
    for row, length in enumerate(lengths):
        places = np.arange(max(0, length - window) if window else 0, length)
        where = table[row].numpy()[places // page_size], places % page_size
        for head in range(heads):
            keys, values = (cache[(*where, head // 2)] for cache in (all_keys, all_values))
            right = attended(queries[row, head : head + 1], keys, values, decimal("0.25"))
            exact.assert_same(out[row, head : head + 1], written(right), f"sequence {row}, head {head}")


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
@pytest.mark.parametrize("heads_normed", [True, False])
def test_queries_keys_and_values(pairs, heads_normed):
    rows, width, heads, kv_heads, dim, context = 2, 40, 4, 2, 16, 8
    x, weight = exact.numbers(rows, width, seed=1), exact.numbers((heads + 2 * kv_heads) * dim, width, seed=2)
    cos, sin = exact.numbers(context, dim // 2, seed=3), exact.numbers(context, dim // 2, seed=4)
    head_weights = exact.numbers(2, dim, seed=5)
    lens = torch.tensor([3, 7], dtype=torch.int32)
    slots = torch.tensor([5, 2])
    k, v = (exact.numbers(2, 4, kv_heads, dim, seed=seed) for seed in (6, 7))
    before = [cache.clone() for cache in (k, v)]
    with exact.algebra():
        q = ops.decode_qkv(
            x, weight, None, k, v, slots, rotary=Rotary(cos, sin, lens, pairs),
            head_norm=HeadNorm(*head_weights, 1e-5) if heads_normed else None,
        )  # fmt: skip
    y = matmul(read(x), read(weight).T).reshape(rows, -1, dim)
    if heads_normed:
        for part, own in ((slice(0, heads), 0), (slice(heads, heads + kv_heads), 1)):
            y[:, part] = norm(y[:, part], EPS, centered=False)[0] * read(head_weights)[own]
    places = lens.numpy() - 1
    c, s = read(cos)[places][:, None], read(sin)[places][:, None]
    half = dim // 2
    pair = [(i, i + half) if pairs == "halves" else (2 * i, 2 * i + 1) for i in range(half)]
    first, second = (np.array([p[i] for p in pair]) for i in (0, 1))
    turned, part = y.copy(), slice(0, heads + kv_heads)
    turned[:, part, first] = y[:, part, first] * c - y[:, part, second] * s
    turned[:, part, second] = y[:, part, second] * c + y[:, part, first] * s
    exact.assert_same(q, written(turned[:, :heads].reshape(rows, -1)), "q")
    for cache, old, start in ((k, before[0], heads), (v, before[1], heads + kv_heads)):
        right = read(old)
        for row, slot in enumerate(slots.tolist()):
            right[slot // 4, slot % 4] = turned[row, start : start + kv_heads]
        exact.assert_same(cache, written(right), "cache")


class _Exact(_Maker):
    """Rows of a pass whose weights are elements of the ring."""

    count = 0

    def value(self, *shape, dtype=None):
        self.count += 1
        return exact.numbers(*shape, seed=100 + self.count)


def program_of(sizes: Sizes) -> StepProgram:
    """The cases' two layers, with numbers that the ring has."""
    program = _Exact(sizes, torch.device("cpu"), torch.float32, None).program(post_norm=False)
    rows = []
    for row in program.rows:
        if row.rotary is not None:
            row = replace(row, rotary=Positions(*(t[:64].clone() for t in row.rotary[:2])))
        rows.append(replace(row, attention_scale=0.25) if row.kind == "attention" else row)
    return replace(program, rows=tuple(rows))


def separately(program, tokens, live, k_cache, v_cache, table, lens):
    """The launches that the persistent step stands for, by the public ops."""
    x, slots = ops.decode_embed(
        tokens, live, program.token_weight, program.position_weight, table, lens, k_cache.shape[2]
    )
    buffers = {"x": x}
    for row in program.rows:
        of = buffers[row.read]
        if row.kind == "attention":
            q = of.unflatten(1, (program.heads, -1))
            out = ops.decode_attention(
                q, k_cache[row.layer], v_cache[row.layer], table, lens, scale=row.attention_scale
            ).flatten(1)
        elif row.kind == "qkv":
            rotary = row.rotary and Rotary(*row.rotary[:2], lens, row.rotary.pairs)
            out = ops.decode_qkv(
                of, row.linear.weight, row.linear.bias, k_cache[row.layer], v_cache[row.layer], slots,
                norm=row.norm, rotary=rotary, head_norm=row.head_norm,
            )  # fmt: skip
        else:
            out = ops.decode_linear(
                of, row.linear.weight, row.linear.bias, norm=row.norm, activation=row.activation,
                residual=buffers.get(row.residual), gated=row.gated,
            )  # fmt: skip
        buffers[row.write] = out
    return buffers["logits"]


SIZES = {
    "GPT-2's kind": Sizes(32, 2, 2, 16, 64, 37),
    "Llama's kind": Sizes(32, 4, 2, 16, 40, 37, gated=True),
    "Qwen 3's kind": Sizes(32, 4, 2, 16, 40, 37, gated=True, head_norm=True),
}


@pytest.mark.parametrize("kind", list(SIZES))
def test_persistent_step_is_separate_launches(kind, monkeypatch):
    sizes = SIZES[kind]
    program = program_of(sizes)
    assert isinstance(program.rows[0].norm, RmsNorm) == sizes.gated
    rows, page_size, pages = 3, 4, 5
    results = []
    plain_scales = step_launch._attention_scales
    monkeypatch.setattr(
        step_launch, "_attention_scales", lambda program: exact.encoded(plain_scales(program))
    )
    for step in (persistent_step, separately):
        caches = [exact.numbers(2, rows * pages, page_size, 2, 16, seed=seed) for seed in (1, 2)]
        table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
        lens = torch.tensor([0, 5, 17], dtype=torch.int32)
        with exact.algebra():
            tokens, live = torch.tensor([3, 36, 0]), torch.tensor([rows], dtype=torch.int32)
            logits = step(program, tokens, live, *caches, table, lens)
        results.append((logits, *caches))
    for name, a, b in zip(("logits", "keys", "values"), *results, strict=True):
        exact.assert_same(a, b, name)
