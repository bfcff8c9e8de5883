"""Calls at the edges of an op: sizes around its tiles, strides beyond 2^31, numbers that trip kernels.

``trial(seed)`` draws one call of one op, ``check`` compares it with the reference, values and gradients, by
the op's own measure. A trial's ``repr`` is the whole call, so that a failing one can be pasted::

    from gptkern.testing.shapes import Trial, check
    check(Trial("layer_norm", sizes=(2, 17), values="inf", seed=5))

Ops that do not take part have tests of their own for this: the sampler, and the persistent step, whose
phases are those of the decode ops bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from gptkern import ops
from gptkern.ops import _launch
from gptkern.ops._cases import Call, tensors
from gptkern.ops._dispatch import backend
from gptkern.ops._types import HeadNorm, RmsNorm, Rotary
from gptkern.testing import _double, _run, assert_accurate, attention_terms, norm_terms

VALUES = ("normal", "denormal", "low", "equal", "inf", "nan")
"""Kinds of numbers: ``low`` makes all logits about -6e4, ``equal`` all 3e4; ``inf`` is one element of the
first tensor, ``nan`` one row of it."""

_LEVELS = {"low": -6e4, "equal": 3e4}
_PRIMES = (2, 3, 5, 7, 13, 37, 67, 101)


@dataclass(frozen=True)
class Trial:
    """One call.

    Attributes:
        op: A public op of ``gptkern.ops``.
        sizes: The op's extents, in the order of its family in this file.
        dtype: Of its tensors, by name.
        values: One of ``VALUES``.
        far: The first tensor's rows, or the cache's pages, lie more than 2^31 elements apart.
        options: Keywords of the op.
        seed: Of its numbers.
    """

    op: str
    sizes: tuple[int, ...]
    dtype: str = "float32"
    values: str = "normal"
    far: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


class _Numbers:
    """The tensors of a trial."""

    def __init__(self, trial: Trial) -> None:
        self.kind, self.dtype = trial.values, getattr(torch, trial.dtype)
        self.far, self.grad = trial.far, not trial.far
        self.generator = torch.Generator().manual_seed(trial.seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A parameter: no kind of numbers changes it."""
        drawn = torch.randn(shape, generator=self.generator) * scale
        return drawn.to(dtype or self.dtype).requires_grad_(self.grad)

    def first(self, *shape: int) -> torch.Tensor:
        """The op's first tensor, of the kind of numbers that is asked for."""
        x = torch.randn(shape, generator=self.generator)
        if self.kind == "denormal":
            x *= 1e-6 if self.dtype == torch.float16 else 1e-39
        elif self.kind in _LEVELS:
            x = (_LEVELS[self.kind] + (x * 4).round() * (self.kind == "low")).expand(shape).clone()
        elif self.kind == "inf" and x.numel():
            x.view(-1)[x.numel() // 2] = torch.inf
        elif self.kind == "nan" and x.numel():
            x.view(-1, shape[-1])[-1] = torch.nan
        return self._placed(x)

    def pair(self, shape: tuple[int, ...], other: tuple[int, ...], scale: float) -> tuple[Any, Any]:
        """Two tensors whose products over the last dimension, times ``scale``, are an op's logits."""
        if self.kind not in _LEVELS:
            return self.first(*shape), self.normal(*other)
        level = _LEVELS[self.kind]
        size = (abs(level) / (max(shape[-1], 1) * scale)) ** 0.5
        a, b = torch.full(shape, size), torch.full(other, size if level > 0 else -size)
        if self.kind == "low" and other[0] * other[1] > 1:
            b[0, 0] *= 1.125
        return self._placed(a), b.to(self.dtype).requires_grad_(self.grad)

    def _placed(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        return (distant(x) if self.far else x).requires_grad_(self.grad)

    def integers(self, end: int, *shape: int) -> torch.Tensor:
        """Indices below ``end``."""
        return torch.randint(end, shape, generator=self.generator)


def distant(x: torch.Tensor) -> torch.Tensor:
    """A copy whose entries along the first dimension lie over 2^31 elements apart, in virtual memory."""
    if x.shape[0] < 2:
        return x
    apart = (2**31 // (x.shape[0] - 1) + 16) // 16 * 16
    memory = torch.empty((x.shape[0] - 1) * apart + x[0].numel(), dtype=x.dtype)
    return memory.as_strided(x.shape, (apart, *x[0].stride())).copy_(x)


class _Draw:
    """Sizes at the edges of tiles."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def edge(self, kernel: str, tile: str, most: int) -> int:
        """1, a prime, or a tile of ``kernel``'s launch rows, and one less or more than it."""
        tiles = sorted({row[tile] for row in _launch.table(90)[kernel] if row.get(tile, most + 1) <= most})
        size = int(self.random.choice(tiles))
        prime = self.random.choice([p for p in _PRIMES if p <= most])
        return max(1, self.random.choice([1, prime, size - 1, size, size + 1]))

    def one(self, *choices: Any) -> Any:
        """One of these."""
        return self.random.choice(choices)


# The upstream gradients are normally distributed: none of a trial's passes 5 or so.
_UPSTREAM = 5.0
Terms = Callable[[Trial, Call], list[float]]


@dataclass(frozen=True)
class _Family:
    """An op: how its sizes and options are drawn, its call, and the largest terms of its results' sums.

    ``terms`` are in the order of results and gradients; an ulp of them is accepted (see ``assert_accurate``).
    """

    sizes: Callable[[_Draw], tuple[int, ...]]
    make: Callable[[_Numbers, tuple[int, ...]], Call]
    options: Callable[[_Draw], dict[str, Any]] = lambda draw: {}
    terms: Terms | None = None
    function: Callable[..., Any] | None = None
    far: bool = False


def _attention_sizes(draw: _Draw) -> tuple[int, ...]:
    queries = draw.edge("flash_attention_forward", "BLOCK_M", 64)
    keys = draw.edge("flash_attention_forward", "BLOCK_N", 64)
    group, kv_heads = draw.one((1, 1), (2, 1), (3, 2))
    return (draw.one(1, 3), queries, keys, group * kv_heads, kv_heads, draw.one(1, 15, 16, 17, 24, 32))


def _attention(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
    batch, seq_q, seq_k, heads, kv_heads, dim = sizes
    q, k = numbers.pair((batch, seq_q, heads, dim), (batch, seq_k, kv_heads, dim), dim**-0.5)
    return Call((q, k, numbers.normal(batch, seq_k, kv_heads, dim)))


def _packed_attention(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
    _, seq_q, seq_k, heads, kv_heads, dim = sizes
    q, k = numbers.pair((seq_q + 1, heads, dim), (seq_k + 1, kv_heads, dim), dim**-0.5)
    starts = [torch.tensor([0, n, n + 1], dtype=torch.int32) for n in (seq_q, seq_k)]
    return Call((q, k, numbers.normal(seq_k + 1, kv_heads, dim), *starts, seq_q, seq_k))


def _attention_options(draw: _Draw) -> dict[str, Any]:
    options: dict[str, Any] = draw.one({}, {"causal": False}, {"window": draw.one(1, 5, 33)})
    return options


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().nan_to_num(0.0, 0.0, 0.0)


def _largest(x: torch.Tensor) -> float:
    return float(_finite(x).abs().max()) if x.numel() else 0.0


def _over_rows(trial: Trial, rows: int) -> float:
    """The error of a sum over rows, in terms: their root, or where all rows are alike their number."""
    return float(rows if trial.values in ("denormal", "low", "equal") else rows**0.5)


def _attention_terms(trial: Trial, call: Call) -> list[float]:
    """The terms of dq, dk and dv, with the largest score there can be for the largest lse."""
    q, k, v = (_finite(x if x.dim() == 4 else x[None]) for x in call.args[:3])
    lse = (q.abs().amax() * k.abs().amax() * q.shape[-1] ** 0.5).reshape(1)
    grad = torch.full((*q.shape[:-1], v.shape[-1]), _UPSTREAM)
    # The ulps are those of the op's dtype.
    q, k, v, grad = (x.to(call.args[0].dtype) for x in (q, k, v, grad))
    return [0.0, *attention_terms(q, k, v, grad, lse).values()]


def _norm_sizes(draw: _Draw) -> tuple[int, ...]:
    return (draw.one(1, 2, 3, 7, 9), draw.one(1, 2, 15, 16, 17, 127, 128, 129, 257, 1023, 1025))


def _norm(residual: bool, bias: bool) -> Callable[[_Numbers, tuple[int, ...]], Call]:
    def make(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
        rows, width = sizes
        tensors = [numbers.first(rows, width)]
        if residual:
            tensors.append(numbers.normal(rows, width))
        return Call((*tensors, *(numbers.normal(width) for _ in range(1 + bias))))

    return make


def _norm_terms(residual: bool, centered: bool) -> Terms:
    def terms(trial: Trial, call: Call) -> list[float]:
        x, *rest = (_finite(t) for t in call.args)
        weight, total = (rest[1], x + rest[0]) if residual else (rest[0], x)
        eps, grad = 1e-5 if centered else 1e-6, torch.full_like(x, _UPSTREAM)
        of = norm_terms(total, weight, grad, eps, centered=centered)
        rows = _over_rows(trial, len(x))
        inputs = [of["dx"]] * (1 + residual)
        return [
            of["out"],
            *([0.0] * residual),
            *inputs,
            rows * of["dweight"],
            *([rows * _UPSTREAM] * centered),
        ]

    return terms


def _linear_sizes(draw: _Draw) -> tuple[int, ...]:
    edges = (draw.edge("linear", f"BLOCK_{axis}", 64) for axis in "MKN")
    m, k, n = edges
    return (m + 1, k, n)


def _linear(residual: bool) -> Callable[[_Numbers, tuple[int, ...]], Call]:
    def make(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
        m, k, n = sizes
        tensors = [numbers.first(m, k), numbers.normal(n, k, scale=max(k, 1) ** -0.5), numbers.normal(n)]
        return Call((*tensors, *([numbers.normal(m, n)] if residual else [])))

    return make


def _mlp(gated: bool) -> Callable[[_Numbers, tuple[int, ...]], Call]:
    def make(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
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


def _derivative(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(activation, its derivative)."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "gelu": F.gelu,
        "relu": F.relu,
        "silu": F.silu,
        "none": lambda y: y,
    }
    x = x.requires_grad_()
    y = functions[activation](x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def _linear_terms(trial: Trial, call: Call) -> list[float]:
    """A product's terms are those of its largest row and column."""
    x, weight, bias, *_ = (_finite(t) for t in call.args)
    _, slope = _derivative(x @ weight.T + bias, trial.options.get("activation", "none"))
    dpre, rows = _UPSTREAM * _largest(slope), _over_rows(trial, len(x))
    out = max(_largest(x) * _largest(weight), _largest(bias))
    return [out, dpre * _largest(weight), rows * dpre * _largest(x), rows * dpre]


def _mlp_terms(gated: bool) -> Terms:
    def terms(trial: Trial, call: Call) -> list[float]:
        x, w_fc, b_fc, w_proj, b_proj = (_finite(t) for t in call.args)
        pre = x @ w_fc.T + b_fc
        gate, up = pre.chunk(2, -1) if gated else (pre, torch.ones_like(pre))
        active, slope = _derivative(gate, trial.options["activation"])
        dhidden, rows = _UPSTREAM * _largest(w_proj) * w_proj.shape[0] ** 0.5, _over_rows(trial, len(x))
        dpre = dhidden * max(_largest(slope * up), _largest(active) if gated else 0.0)
        hidden = _largest(active * up)
        out = max(hidden * _largest(w_proj), _largest(b_proj))
        first = [dpre * _largest(w_fc), rows * dpre * _largest(x), rows * dpre]
        return [out, *first, rows * _UPSTREAM * hidden, rows * _UPSTREAM]

    return terms


def _loss_terms(trial: Trial, call: Call) -> list[float]:
    """A logit's gradient is at most 1, times the upstream one."""
    hidden, weight, targets = call.args
    each = (
        _UPSTREAM / max(1, int((targets != -100).sum()))
        if trial.options["reduction"] == "mean"
        else _UPSTREAM
    )
    return [0.0, each * _largest(weight), _over_rows(trial, len(hidden)) * each * _largest(hidden)]


def _activations(draw: _Draw) -> dict[str, Any]:
    return {"activation": draw.one("gelu_tanh", "gelu", "relu", "silu", "none")}


def _loss_sizes(draw: _Draw) -> tuple[int, ...]:
    tokens = draw.edge("linear_cross_entropy_loss", "BLOCK_M", 64)
    words = draw.edge("linear_cross_entropy_logits", "BLOCK_N", 128)
    return (tokens + 1, words, draw.edge("linear_cross_entropy_logits", "BLOCK_K", 64))


def _loss(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
    tokens, words, width = sizes
    hidden, weight = numbers.pair((tokens, width), (words, width), 1.0)
    targets = numbers.integers(words, tokens)
    targets[0] = -100
    return Call((hidden, weight, targets))


def _rotary(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
    batch, seq, heads, kv_heads, dim = sizes
    q, k = numbers.first(batch, seq, heads, dim), numbers.normal(batch, seq, kv_heads, dim)
    angles = torch.randn(seq, dim // 2, generator=numbers.generator)
    return Call((q, k, angles.cos(), angles.sin()))


def _cached(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
    rows, longest, heads, kv_heads, dim, page_size = sizes
    pages = -(-longest // page_size)
    numbers.grad = False
    far, numbers.far = numbers.far, False
    q, k = numbers.pair((rows, heads, dim), (rows * pages, page_size, kv_heads, dim), dim**-0.5)
    v = numbers.normal(*k.shape)
    table = torch.randperm(rows * pages, generator=numbers.generator).int().view(rows, pages)
    lens = torch.tensor([longest, *range(rows - 1)], dtype=torch.int32)
    return Call((q, distant(k) if far else k, distant(v) if far else v, table, lens))


def _cached_sizes(draw: _Draw) -> tuple[int, ...]:
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


def _decode_sizes(draw: _Draw) -> tuple[int, ...]:
    width = draw.edge("decode_linear", "BLOCK_K", 128)
    return (draw.one(1, 2, 15, 16, 17), width, draw.edge("decode_linear", "BLOCK_N", 64))


def _decode(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
    rows, width, outputs = sizes
    numbers.grad = False
    norm = (numbers.normal(width), numbers.normal(width), 1e-5)
    weight = numbers.normal(outputs, width, scale=width**-0.5)
    return Call((numbers.first(rows, width), weight, numbers.normal(outputs)), {"norm": norm})


def _decode_qkv(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
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


def _appended(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
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


def _embedded(numbers: _Numbers, sizes: tuple[int, ...]) -> Call:
    rows, words, width = sizes
    numbers.grad = False
    weights = numbers.first(words, width), numbers.normal(8, width)
    live = torch.tensor([max(1, rows - 1)], dtype=torch.int32)
    table = torch.arange(4 * rows, dtype=torch.int32).view(rows, 4)
    lens = (torch.arange(rows) % 8).int()
    return Call((numbers.integers(words, rows), live, *weights, table, lens, 2))


FAMILIES: dict[str, _Family] = {
    "flash_attention": _Family(_attention_sizes, _attention, _attention_options, _attention_terms, far=True),
    "flash_attention_varlen": _Family(
        _attention_sizes, _packed_attention, _attention_options, _attention_terms
    ),
    "layer_norm": _Family(_norm_sizes, _norm(False, True), terms=_norm_terms(False, True), far=True),
    "add_layer_norm": _Family(_norm_sizes, _norm(True, True), terms=_norm_terms(True, True), far=True),
    "rms_norm": _Family(_norm_sizes, _norm(False, False), terms=_norm_terms(False, False), far=True),
    "add_rms_norm": _Family(_norm_sizes, _norm(True, False), terms=_norm_terms(True, False), far=True),
    "linear": _Family(_linear_sizes, _linear(False), terms=_linear_terms, far=True),
    "linear_act": _Family(_linear_sizes, _linear(False), _activations, _linear_terms, far=True),
    "linear_residual": _Family(_linear_sizes, _linear(True), terms=_linear_terms, far=True),
    "gelu_mlp": _Family(_linear_sizes, _mlp(False), _activations, _mlp_terms(False)),
    "gated_mlp": _Family(_linear_sizes, _mlp(True), _activations, _mlp_terms(True)),
    "linear_cross_entropy": _Family(
        _loss_sizes, _loss, lambda draw: {"reduction": draw.one("mean", "sum", "none")}, _loss_terms, far=True
    ),
    "rotary": _Family(
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
    "decode_attention": _Family(_cached_sizes, _cached, lambda draw: draw.one({}, {"window": 5}), far=True),
    "append_kv": _Family(
        lambda draw: (draw.one(1, 2, 5), draw.one(1, 3, 17), draw.one(1, 16, 17), draw.one(1, 7)),
        _appended,
        function=_caches_after,
    ),
    "decode_linear": _Family(_decode_sizes, _decode, lambda draw: draw.one({}, _activations(draw))),
    "decode_qkv": _Family(
        lambda draw: (
            *(draw.one(1, 2, 5), draw.one(1, 16, 33, 130)),
            *draw.one((1, 1), (3, 1), (4, 2)),
            *(draw.one(2, 16, 18), draw.one(0, 1)),
        ),
        _decode_qkv,
        function=_qkv_and_caches,
    ),
    "decode_embed": _Family(
        lambda draw: (draw.one(1, 2, 5), draw.one(1, 11), draw.one(1, 127, 128, 129, 1025)), _embedded
    ),
}


def trial(seed: int) -> Trial:
    """The trial of a seed: ops in turn, the rest at random."""
    draw = _Draw(seed)
    op = list(FAMILIES)[seed % len(FAMILIES)]
    family = FAMILIES[op]
    far = family.far and draw.random.random() < 0.1
    # Two bytes a number: half the address space.
    dtype = draw.one("float16", "bfloat16") if far else draw.one("float32", "float16", "bfloat16")
    values = "normal" if far or draw.random.random() < 0.25 else draw.one(*VALUES)
    return Trial(op, family.sizes(draw), dtype, values, far, family.options(draw), seed)


def _comparable(trial: Trial, call: Call, results: list[torch.Tensor], forward: int) -> list[torch.Tensor]:
    """The tensors that are compared: where one row is inf or NaN, no gradients but those of other rows.

    No expression says what that row's gradient is. The weights' are sums over all rows, and those of keys NaN
    in the query's tiles, whether it sees them or not: to look would cost every tile.
    """
    if trial.values not in ("inf", "nan") or len(results) == forward:
        return results
    alive = call.args[0].detach().isfinite().all(-1, keepdim=True)
    return [*results[:forward], results[forward].masked_fill(~alive, 0.0)]


def _compare(trial: Trial) -> None:
    family = FAMILIES[trial.op]
    function = family.function or getattr(ops, trial.op)
    call = family.make(_Numbers(trial), trial.sizes)
    call = Call(call.args, {**call.kwargs, **trial.options})
    with backend("reference"):
        results = [_run(function, call), _run(function, _double(call))]
    with backend("kernel"):
        results.insert(0, _run(function, call))
    inputs = sum(t.requires_grad for t in tensors((call.args, call.kwargs)))
    forward = len(results[0]) - inputs
    compared = [_comparable(trial, call, r, forward) for r in results]
    terms = [] if family.terms is None else family.terms(trial, call)
    terms += [0.0] * (len(compared[0]) - len(terms))
    for index, (got, plain, exact) in enumerate(zip(*compared, strict=True)):
        assert_accurate(got, plain, exact, f"tensor {index} of results and gradients", terms=terms[index])


def check(trial: Trial) -> None:
    """Compare the kernels' results and gradients with the reference's.

    Raises:
        AssertionError: as ``assert_accurate``, with the trial as a call that can be pasted.
    """
    try:
        _compare(trial)
    except Exception as error:
        raise AssertionError(f"check({trial!r})\n{type(error).__name__}: {error}") from error
