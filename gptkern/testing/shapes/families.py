"""The ops that take part: how the sizes and options of each are drawn, and its call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gptkern import ops
from gptkern.ops._cases import Call
from gptkern.ops._types import HeadNorm, RmsNorm, Rotary
from gptkern.testing.shapes import terms
from gptkern.testing.shapes.drawing import VALUES, Draw, Numbers, Trial, distant


@dataclass(frozen=True)
class Family:
    """An op: how its sizes and options are drawn, its call, and the largest terms of its results' sums.

    ``terms`` are in the order of results and gradients; an ulp of them is accepted (see ``assert_accurate``).
    """

    sizes: Callable[[Draw], tuple[int, ...]]
    make: Callable[[Numbers, tuple[int, ...]], Call]
    options: Callable[[Draw], dict[str, Any]] = lambda draw: {}
    terms: terms.Terms | None = None
    function: Callable[..., Any] | None = None
    far: bool = False


def _attention_sizes(draw: Draw) -> tuple[int, ...]:
    queries = draw.edge("flash_attention_forward", "BLOCK_M", 64)
    keys = draw.edge("flash_attention_forward", "BLOCK_N", 64)
    group, kv_heads = draw.one((1, 1), (2, 1), (3, 2))
    return (draw.one(1, 3), queries, keys, group * kv_heads, kv_heads, draw.one(1, 15, 16, 17, 24, 32))


def _attention(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
    batch, seq_q, seq_k, heads, kv_heads, dim = sizes
    q, k = numbers.pair((batch, seq_q, heads, dim), (batch, seq_k, kv_heads, dim), dim**-0.5)
    return Call((q, k, numbers.normal(batch, seq_k, kv_heads, dim)))


def _packed_attention(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
    _, seq_q, seq_k, heads, kv_heads, dim = sizes
    q, k = numbers.pair((seq_q + 1, heads, dim), (seq_k + 1, kv_heads, dim), dim**-0.5)
    starts = [torch.tensor([0, n, n + 1], dtype=torch.int32) for n in (seq_q, seq_k)]
    return Call((q, k, numbers.normal(seq_k + 1, kv_heads, dim), *starts, seq_q, seq_k))


def _attention_options(draw: Draw) -> dict[str, Any]:
    options: dict[str, Any] = draw.one({}, {"causal": False}, {"window": draw.one(1, 5, 33)})
    return options


def _norm_sizes(draw: Draw) -> tuple[int, ...]:
    return (draw.one(1, 2, 3, 7, 9), draw.one(1, 2, 15, 16, 17, 127, 128, 129, 257, 1023, 1025))


def _norm(residual: bool, bias: bool) -> Callable[[Numbers, tuple[int, ...]], Call]:
    def make(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
        rows, width = sizes
        tensors = [numbers.first(rows, width)]
        if residual:
            tensors.append(numbers.normal(rows, width))
        return Call((*tensors, *(numbers.normal(width) for _ in range(1 + bias))))

    return make


def _linear_sizes(draw: Draw) -> tuple[int, ...]:
    edges = (draw.edge("linear", f"BLOCK_{axis}", 64) for axis in "MKN")
    m, k, n = edges
    return (m + 1, k, n)


def _linear(residual: bool) -> Callable[[Numbers, tuple[int, ...]], Call]:
    def make(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
        m, k, n = sizes
        tensors = [numbers.first(m, k), numbers.normal(n, k, scale=max(k, 1) ** -0.5), numbers.normal(n)]
        return Call((*tensors, *([numbers.normal(m, n)] if residual else [])))

    return make


def _mlp(gated: bool) -> Callable[[Numbers, tuple[int, ...]], Call]:
    def make(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
        m, d, inner = sizes
        outer = 2 * inner if gated else inner
        weights = numbers.normal(outer, d, scale=d**-0.5), numbers.normal(outer)
        return Call(
            (
                *(numbers.first(m, d), *weights),
                *(numbers.normal(d, inner, scale=inner**-0.5), numbers.normal(d)),
            )
        )

    return make


def _activations(draw: Draw) -> dict[str, Any]:
    return {"activation": draw.one("gelu_tanh", "gelu", "relu", "silu", "none")}


def _loss_sizes(draw: Draw) -> tuple[int, ...]:
    tokens = draw.edge("linear_cross_entropy_loss", "BLOCK_M", 64)
    words = draw.edge("linear_cross_entropy_logits", "BLOCK_N", 128)
    return (tokens + 1, words, draw.edge("linear_cross_entropy_logits", "BLOCK_K", 64))


def _loss(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
    tokens, words, width = sizes
    hidden, weight = numbers.pair((tokens, width), (words, width), 1.0)
    targets = numbers.integers(words, tokens)
    targets[0] = -100
    return Call((hidden, weight, targets))


def _rotary(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
    batch, seq, heads, kv_heads, dim = sizes
    q, k = numbers.first(batch, seq, heads, dim), numbers.normal(batch, seq, kv_heads, dim)
    angles = torch.randn(seq, dim // 2, generator=numbers.generator)
    return Call((q, k, angles.cos(), angles.sin()))


def _cached(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
    rows, longest, heads, kv_heads, dim, page_size = sizes
    pages = -(-longest // page_size)
    numbers.grad = False
    far, numbers.far = numbers.far, False
    q, k = numbers.pair((rows, heads, dim), (rows * pages, page_size, kv_heads, dim), dim**-0.5)
    v = numbers.normal(*k.shape)
    table = torch.randperm(rows * pages, generator=numbers.generator).int().view(rows, pages)
    lens = torch.tensor([longest, *range(rows - 1)], dtype=torch.int32)
    return Call((q, distant(k) if far else k, distant(v) if far else v, table, lens))


def _cached_sizes(draw: Draw) -> tuple[int, ...]:
    longest = draw.one(1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 257)
    group, kv_heads = draw.one((1, 1), (2, 1), (3, 2), (17, 1))
    return (
        draw.one(1, 2, 3),
        longest,
        group * kv_heads,
        kv_heads,
        draw.one(1, 16, 17),
        draw.one(1, 7, 16, 32),
    )


def _decode_sizes(draw: Draw) -> tuple[int, ...]:
    width = draw.edge("decode_linear", "BLOCK_K", 128)
    return (draw.one(1, 2, 15, 16, 17), width, draw.edge("decode_linear", "BLOCK_N", 64))


def _decode(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
    rows, width, outputs = sizes
    numbers.grad = False
    norm = (numbers.normal(width), numbers.normal(width), 1e-5)
    weight = numbers.normal(outputs, width, scale=width**-0.5)
    return Call((numbers.first(rows, width), weight, numbers.normal(outputs)), {"norm": norm})


def _decode_qkv(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
    rows, width, heads, kv_heads, dim, normed = sizes
    numbers.grad = False
    weight = numbers.normal((heads + 2 * kv_heads) * dim, width, scale=width**-0.5)
    caches = [numbers.normal(rows, 4, kv_heads, dim) for _ in range(2)]
    slots = torch.randperm(4 * rows, generator=numbers.generator)[:rows]
    slots[0] = -1
    lens = torch.arange(rows, dtype=torch.int32) + 1
    angles = torch.randn(rows, dim // 2, generator=numbers.generator)
    options: dict[str, Any] = {
        "norm": RmsNorm(numbers.normal(width), 1e-5),
        "rotary": Rotary(angles.cos(), angles.sin(), lens),
    }
    if normed:
        options["head_norm"] = HeadNorm(numbers.normal(dim), numbers.normal(dim), 1e-6)
    return Call((numbers.first(rows, width), weight, None, *caches, slots), options)


def _qkv_and_caches(*args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    caches = tuple(cache.clone() for cache in args[3:5])
    # Tables are fp32 beside every dtype, float64 among them.
    rotary = options["rotary"]
    options["rotary"] = rotary._replace(cos=rotary.cos.float(), sin=rotary.sin.float())
    return (ops.decode_qkv(*args[:3], *caches, *args[5:], **options), *caches)


def _appended(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
    tokens, heads, dim, page_size = sizes
    numbers.grad = False
    caches = [numbers.normal(tokens, page_size, heads, dim) for _ in range(2)]
    slots = torch.randperm(tokens * page_size, generator=numbers.generator)[:tokens]
    slots[-1] = -1
    return Call((numbers.first(tokens, heads, dim), numbers.normal(tokens, heads, dim), *caches, slots))


def _caches_after(*args: Any) -> tuple[torch.Tensor, ...]:
    k, v, k_cache, v_cache, slots = args
    caches = k_cache.clone(), v_cache.clone()
    ops.append_kv(k, v, caches[0], caches[1], slots)
    return caches


def _embedded(numbers: Numbers, sizes: tuple[int, ...]) -> Call:
    rows, words, width = sizes
    numbers.grad = False
    weights = numbers.first(words, width), numbers.normal(8, width)
    live = torch.tensor([max(1, rows - 1)], dtype=torch.int32)
    table = torch.arange(4 * rows, dtype=torch.int32).view(rows, 4)
    lens = (torch.arange(rows) % 8).int()
    return Call((numbers.integers(words, rows), live, *weights, table, lens, 2))


FAMILIES: dict[str, Family] = {
    "flash_attention": Family(_attention_sizes, _attention, _attention_options, terms.attention, far=True),
    "flash_attention_varlen": Family(
        _attention_sizes, _packed_attention, _attention_options, terms.attention
    ),
    "layer_norm": Family(_norm_sizes, _norm(False, True), terms=terms.norm(False, True), far=True),
    "add_layer_norm": Family(_norm_sizes, _norm(True, True), terms=terms.norm(True, True), far=True),
    "rms_norm": Family(_norm_sizes, _norm(False, False), terms=terms.norm(False, False), far=True),
    "add_rms_norm": Family(_norm_sizes, _norm(True, False), terms=terms.norm(True, False), far=True),
    "linear": Family(_linear_sizes, _linear(False), terms=terms.linear, far=True),
    "linear_act": Family(_linear_sizes, _linear(False), _activations, terms.linear, far=True),
    "linear_residual": Family(_linear_sizes, _linear(True), terms=terms.linear, far=True),
    "gelu_mlp": Family(_linear_sizes, _mlp(False), _activations, terms.mlp(False)),
    "gated_mlp": Family(_linear_sizes, _mlp(True), _activations, terms.mlp(True)),
    "linear_cross_entropy": Family(
        _loss_sizes, _loss, lambda draw: {"reduction": draw.one("mean", "sum", "none")}, terms.loss, far=True
    ),
    "rotary": Family(
        lambda draw: (
            draw.one(1, 3),
            draw.one(1, 7),
            *draw.one((1, 1), (3, 1), (4, 2)),
            draw.one(2, 16, 18, 64),
        ),
        _rotary,
        lambda draw: {"pairs": draw.one("halves", "interleaved")},
        far=True,
    ),
    "decode_attention": Family(_cached_sizes, _cached, lambda draw: draw.one({}, {"window": 5}), far=True),
    "append_kv": Family(
        lambda draw: (draw.one(1, 2, 5), draw.one(1, 3, 17), draw.one(1, 16, 17), draw.one(1, 7)),
        _appended,
        function=_caches_after,
    ),
    "decode_linear": Family(_decode_sizes, _decode, lambda draw: draw.one({}, _activations(draw))),
    "decode_qkv": Family(
        lambda draw: (
            *(draw.one(1, 2, 5), draw.one(1, 16, 33, 130)),
            *draw.one((1, 1), (3, 1), (4, 2)),
            *(draw.one(2, 16, 18), draw.one(0, 1)),
        ),
        _decode_qkv,
        function=_qkv_and_caches,
    ),
    "decode_embed": Family(
        lambda draw: (draw.one(1, 2, 5), draw.one(1, 11), draw.one(1, 127, 128, 129, 1025)), _embedded
    ),
}


def trial(seed: int) -> Trial:
    """The trial of a seed: ops in turn, the rest at random."""
    draw = Draw(seed)
    op = list(FAMILIES)[seed % len(FAMILIES)]
    family = FAMILIES[op]
    far = family.far and draw.random.random() < 0.1
    # Two bytes a number: half the address space.
    dtype = draw.one("float16", "bfloat16") if far else draw.one("float32", "float16", "bfloat16")
    values = "normal" if far or draw.random.random() < 0.25 else draw.one(*VALUES)
    return Trial(op, family.sizes(draw), dtype, values, far, family.options(draw), seed)
