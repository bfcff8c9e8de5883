"""Inputs at which a divisor, a maximum or a whole dimension vanishes: each op beside a plain expression.

``ROWS`` is the table: for every public op its degenerate calls and what plain PyTorch gives there, values,
gradients and NaN alike. A new op is asked for its row. The sampler has tests of its own for these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import gptkern
from gptkern import ops
from gptkern.ops.rotary.reference import rotary as turned
from gptkern.testing import Call, _double, _run, assert_accurate

SAMPLER = {
    "SamplerState",
    "SamplingParams",
    "sample",
    "sampling_probs",
    "speculative_accept",
    "top_k_logprobs",
}
NO_OP = {"backend"}
pytestmark = pytest.mark.usefixtures("on_device")
NAN = float("nan")


class Row(NamedTuple):
    """A call, and the expression that takes the same arguments."""

    case: str
    call: Call
    plain: Callable[..., Any]
    terms: float = 0.0  # as of gptkern.testing.assert_accurate

    def on(self, device: torch.device) -> Row:
        """The row for a test: the table's are made on the CPU, when the file is read."""

        def moved(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.detach().to(device).requires_grad_(value.requires_grad)

        args, kwargs = pytree.tree_map(moved, (self.call.args, self.call.kwargs))
        return self._replace(call=Call(args, kwargs))


def leaf(*shape: int, value: float | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    x = torch.randn(shape, generator=generator, device="cpu") if value is None else torch.full(shape, value)
    return x.requires_grad_()


def fixed(*shape: int) -> torch.Tensor:
    return leaf(*shape).detach()


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str = "mean",
    z_loss: float = 0.0, label_smoothing: float = 0.0, upstream: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """PyTorch's loss; of the z-loss, which PyTorch has not, the mean over the tokens that count."""
    logits, flat = F.linear(hidden, weight).flatten(0, -2), targets.flatten()
    loss = F.cross_entropy(logits, flat, reduction=reduction, label_smoothing=label_smoothing)
    if z_loss:
        counted = flat != -100
        squares = logits[counted].logsumexp(-1).square()
        loss = loss + z_loss * (squares.mean() if reduction == "mean" else squares.sum())
    loss = loss.view(targets.shape) if reduction == "none" else loss
    return loss if upstream is None else loss * upstream


def weighed(*args: Any, upstream: torch.Tensor, **settings: Any) -> torch.Tensor:
    return ops.linear_cross_entropy(*args, **settings) * upstream


def loss_rows() -> list[Row]:
    def call(targets: torch.Tensor, vocab: int = 7, **settings: Any) -> Call:
        return Call((leaf(*targets.shape, 8), leaf(vocab, 8), targets), settings)

    ignored, one = torch.full((3,), -100), torch.tensor([2, -100, 3])
    none = torch.zeros(0, dtype=torch.int64)
    rows = []
    for reduction in ("mean", "sum", "none"):
        for extra in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0}):
            given = {"reduction": reduction, **extra}
            rows.append(Row(f"all ignored {given}", call(ignored, **given), cross_entropy))
            rows.append(Row(f"some ignored {given}", call(one, **given), cross_entropy))
        rows.append(Row(f"no token, {reduction}", call(none, reduction=reduction), cross_entropy))
        rows.append(Row(f"no batch, {reduction}", call(none.view(0, 4), reduction=reduction), cross_entropy))
        zero = torch.zeros(2, dtype=torch.int64)
        rows.append(Row(f"one word, {reduction}", call(zero, 1, reduction=reduction), cross_entropy))
    rows.append(Row("all ignored, z-loss, mean", call(ignored, z_loss=0.1), cross_entropy))
    rows.append(Row("all ignored, z-loss, sum", call(ignored, z_loss=0.1, reduction="sum"), cross_entropy))
    return rows


def loss_of_weighed_tokens() -> Row:
    """What ignored tokens' losses are divided by does not matter."""
    given = {"reduction": "none", "upstream": torch.tensor([1.0, NAN, 0.5])}
    call = Call((leaf(3, 8), leaf(7, 8), torch.tensor([2, -100, 3])), given)
    return Row("an ignored token's upstream gradient is NaN", call, cross_entropy)


def seen(seq_q: int, seq_k: int, causal: bool, window: int | None) -> torch.Tensor:
    ahead = torch.arange(seq_k)[None, :] - (torch.arange(seq_q)[:, None] + seq_k - seq_q)
    mask = ahead <= 0 if causal else torch.ones(seq_q, seq_k, dtype=torch.bool)
    if window is not None:
        mask &= ahead > -window
        mask &= ahead < window
    return mask


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True, window: int | None = None,
    scale: float | None = None, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """PyTorch's attention, which gives 0 where a query sees no key."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = seen(q.shape[2], k.shape[2], causal, window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float) -> torch.Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = softcap * torch.tanh(scores / softcap)
    hidden = ~seen(q.shape[1], k.shape[1], True, None)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, *_: int,
    causal: bool = True, **settings: Any,
) -> torch.Tensor:  # fmt: skip
    parts = []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        parts.append(attention(q[None, a:b], k[None, c:d], v[None, c:d], causal, **settings)[0])
    return torch.cat([*parts, 0.0 * q[cu_q[-1] :]])


def qkv(batch: int, seq_q: int, seq_k: int, heads: int = 2, dim: int = 8) -> tuple[torch.Tensor, ...]:
    return tuple(leaf(batch, seq, heads, dim) for seq in (seq_q, seq_k, seq_k))


def dense_rows(causal: str = "causal") -> list[Row]:
    def row(case: str, shape: tuple[int, ...], **settings: Any) -> Row:
        return Row(case, Call(qkv(*shape), settings), attention)

    zeros = tuple(leaf(1, 5, 2, 8, value=0.0) for _ in range(3))
    return [
        row("no batch", (0, 4, 4), causal=True),
        row("no query", (2, 0, 4), causal=True),
        row("no key", (2, 4, 0), causal=False),
        row("no key under a causal mask", (2, 4, 0), causal=True),
        row("no head", (2, 4, 4, 0), causal=False),
        row("queries that see nothing", (1, 9, 3), causal=True),
        row("one query, one key, one number", (1, 1, 1, 1, 1), causal=True),
        Row("zeros", Call(zeros, {"causal": False}), attention),
    ]


def one_tensor(row: Row, first: int) -> Row:
    """A row of dense attention whose tensors from ``first`` on are one, side by side before the heads."""

    def plain(*args: torch.Tensor, **settings: Any) -> torch.Tensor:
        return attention(*args[:first], *args[first].unbind(2), **settings)

    args = row.call.args
    parts = [t.detach()[:, : args[1].shape[1]] for t in args[first:]]
    return Row(
        row.case, Call((*args[:first], torch.stack(parts, 2).requires_grad_()), row.call.kwargs), plain
    )


def attention_rows() -> list[Row]:
    q, k, v = qkv(1, 40, 5)
    return [
        *(row for row in dense_rows() if row.case != "no head"),
        Row("a window that hides every key of some", Call((q, k, v), {"window": 2}), attention),
        # One key: dp - delta is exactly 0, and dp at most about 8 numbers of size 1 times as many.
        Row("a window of one", Call(qkv(1, 5, 5), {"window": 1}), attention, terms=8.0),
        Row("a tiny softcap", Call(qkv(1, 5, 5), {"softcap": 1e-3}), capped),
        Row("a tiny scale", Call(qkv(1, 5, 5), {"scale": 1e-30}), attention),
    ]


def packed_rows() -> list[Row]:
    def row(case: str, q: int, k: int, cu_q: torch.Tensor, cu_k: torch.Tensor, dim: int = 8) -> Row:
        lengths = [int((c[1:] - c[:-1]).max()) if len(c) > 1 else 0 for c in (cu_q, cu_k)]
        tensors = (leaf(q, 2, dim), leaf(k, 2, dim), leaf(k, 2, dim))
        return Row(case, Call((*tensors, cu_q, cu_k, *lengths), {"causal": True}), packed)

    return [
        row("no sequence", 0, 0, ints(0), ints(0)),
        row("no sequence, tokens of none", 3, 3, ints(0), ints(0)),
        row("no token", 0, 0, ints(0, 0), ints(0, 0)),
        row("empty queries", 0, 4, ints(0, 0, 0), ints(0, 3, 4)),
        row("empty keys", 4, 0, ints(0, 3, 4), ints(0, 0, 0)),
        row("q 0, 1, 0, 1 beside k 0, 3, 0, 5", 2, 8, ints(0, 0, 1, 1, 2), ints(0, 0, 3, 3, 8)),
        row("no query at head_dim 256", 0, 5, ints(0, 0), ints(0, 5), 256),
        row("tokens of no sequence", 6, 6, ints(0, 2), ints(0, 3)),
    ]


def normed(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, eps: float = 1e-5) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def root_normed(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def norm_rows(plain: Callable[..., Any], residual: bool, bias: bool, constant: float) -> list[Row]:
    def expression(x: torch.Tensor, *rest: Any, **settings: Any) -> Any:
        if not residual:
            return plain(x, *rest, **settings)
        total = x + rest[0]
        return plain(total, *rest[1:], **settings), total

    def row(case: str, shape: tuple[int, ...], value: float | None = None, **settings: Any) -> Row:
        x = [leaf(*shape, value=value) for _ in range(1 + residual)]
        parameters = [leaf(shape[-1]) for _ in range(1 + bias)]
        return Row(case, Call((*x, *parameters), settings), expression)

    return [
        row("no row", (0, 8)),
        row("no batch", (0, 4, 8)),
        row("one column", (3, 1)),
        row("constant rows", (3, 8), constant),
        row("constant rows, eps 0", (3, 8), constant, eps=0.0),
        row("zeros, eps 0", (3, 8), 0.0, eps=0.0),
        row("zeros", (3, 8), 0.0),
        row("one column, eps 0", (3, 1), constant, eps=0.0),
    ]


def activated(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, activation: str = "gelu_tanh") -> Any:
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if activation == "gelu_tanh" else out


def mlp(x: torch.Tensor, w_fc: torch.Tensor, b_fc: Any, w_proj: torch.Tensor, b_proj: Any) -> torch.Tensor:
    return F.linear(activated(x, w_fc, b_fc), w_proj, b_proj)


def linear_rows(plain: Callable[..., Any], residual: bool = False) -> list[Row]:
    def row(case: str, shape: tuple[int, ...], outputs: int) -> Row:
        tensors = [leaf(*shape), leaf(outputs, shape[-1]), leaf(outputs)]
        if residual:
            tensors.append(leaf(*shape[:-1], outputs))
        return Row(case, Call(tuple(tensors)), plain)

    return [
        row("no row", (0, 8), 5),
        row("no batch", (0, 4, 8), 5),
        row("no column", (3, 0), 5),
        row("no output", (3, 8), 0),
        row("one of each", (1, 1), 1),
    ]


def mlp_rows() -> list[Row]:
    def row(case: str, shape: tuple[int, ...], inner: int, outputs: int) -> Row:
        tensors = (leaf(*shape), leaf(inner, shape[-1]), leaf(inner), leaf(outputs, inner), leaf(outputs))
        return Row(case, Call(tensors), mlp)

    return [
        row("no row", (0, 8), 6, 8),
        row("no batch", (0, 4, 8), 6, 8),
        row("no column", (3, 0), 6, 8),
        row("no inner column", (3, 8), 0, 8),
        row("no output", (3, 8), 6, 0),
        row("one of each", (1, 1), 1, 1),
    ]


def gated_rows() -> list[Row]:
    def plain(
        x: torch.Tensor, w_fc: torch.Tensor, b_fc: torch.Tensor, w_proj: torch.Tensor, b_proj: torch.Tensor
    ) -> torch.Tensor:
        gate, up = F.linear(x, w_fc, b_fc).chunk(2, -1)
        return F.linear(F.silu(gate) * up, w_proj, b_proj)

    def row(case: str, shape: tuple[int, ...], inner: int, outputs: int) -> Row:
        first = (leaf(*shape), leaf(2 * inner, shape[-1]), leaf(2 * inner))
        return Row(case, Call((*first, leaf(outputs, inner), leaf(outputs))), plain)

    return [
        row("no row", (0, 8), 6, 8),
        row("no batch", (0, 4, 8), 6, 8),
        row("no column", (3, 0), 6, 8),
        row("no inner column", (3, 8), 0, 8),
        row("no output", (3, 8), 6, 0),
        row("one of each", (1, 1), 1, 1),
    ]


def over_pages(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, table: torch.Tensor, lens: torch.Tensor
) -> torch.Tensor:
    """Attention of one query over a paged cache: 0 where there is nothing to attend."""
    out = []
    for row in range(len(q)):
        k, v = (c[table[row].long()].flatten(0, 1)[: int(lens[row])] for c in (k_cache, v_cache))
        one = F.scaled_dot_product_attention(
            q[row][:, None], k.transpose(0, 1), v.transpose(0, 1), enable_gqa=True
        )
        out.append(one[:, 0])
    return torch.stack(out) if out else torch.zeros_like(q)


def paged_rows() -> list[Row]:
    def row(case: str, table: torch.Tensor, *lens: int, pages: int = 6) -> Row:
        tensors = (fixed(len(lens), 2, 8), fixed(pages, 4, 2, 8), fixed(pages, 4, 2, 8))
        return Row(case, Call((*tensors, table, ints(*lens))), over_pages)

    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    return [
        row("no sequence", table[:0]),
        row("lengths of 0", table, 0, 0),
        row("one token, none", table, 1, 0),
        row("no page", table[:, :0], 0, 0, pages=0),
    ]


def with_cache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **settings: Any
) -> torch.Tensor:
    """Dense caches: keys from ``cache_leftpad`` on, up to ``cache_seqlens``."""
    lens, pads = settings["cache_seqlens"], settings.get("cache_leftpad", torch.zeros(len(q)))
    out = [torch.zeros_like(q[:0])]
    for row in range(len(q)):
        kept = slice(int(pads[row]), int(lens[row]))
        out.append(attention(q[row, None], k_cache[row, None, kept], v_cache[row, None, kept], causal=True))
    return torch.cat(out)


def cache_rows() -> list[Row]:
    def row(case: str, seq_q: int, lens: torch.Tensor, **settings: Any) -> Row:
        batch = len(lens)
        tensors = (fixed(batch, seq_q, 2, 8), fixed(batch, 9, 2, 8), fixed(batch, 9, 2, 8))
        return Row(case, Call(tensors, {"cache_seqlens": lens, "causal": True, **settings}), with_cache)

    return [
        row("no sequence", 1, ints()),
        row("nothing in the cache", 1, ints(0, 0)),
        row("nothing but padding", 1, ints(5, 3), cache_leftpad=ints(5, 0)),
        row("padding past the length", 1, ints(5, 3), cache_leftpad=ints(7, 0)),
        row("several queries over nothing", 3, ints(0, 2)),
        row("no query", 0, ints(4, 2)),
    ]


def appended(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: Any
) -> Any:
    caches = [cache.clone().flatten(0, 1) for cache in (k_cache, v_cache)]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            caches[0][slot], caches[1][slot] = k[token], v[token]
    return caches[0].view(k_cache.shape), caches[1].view(v_cache.shape)


def append(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: Any) -> Any:
    caches = k_cache.clone(), v_cache.clone()
    ops.append_kv(k, v, *caches, slots)
    return caches


def append_rows() -> list[Row]:
    def row(case: str, *slots: int) -> Row:
        tokens = len(slots)
        tensors = (fixed(tokens, 2, 8), fixed(tokens, 2, 8) + 1, fixed(3, 4, 2, 8), fixed(3, 4, 2, 8))
        return Row(case, Call((*tensors, torch.tensor(slots, dtype=torch.int64))), appended)

    return [row("no token"), row("skipped tokens alone", -1, -1), row("some skipped", -1, 5, -1, 11)]


def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: Any, norm: Any = None) -> torch.Tensor:
    return F.linear(x if norm is None else normed(x, *norm), weight, bias)


def decode_linear_rows() -> list[Row]:
    def row(case: str, rows: int, width: int, outputs: int, **settings: Any) -> Row:
        return Row(
            case, Call((fixed(rows, width), fixed(outputs, width), fixed(outputs)), settings), few_rows
        )

    constant = Call((torch.full((2, 8), 3.0), fixed(5, 8), fixed(5)), {"norm": (fixed(8), fixed(8), 0.0)})
    return [
        row("no row", 0, 8, 5),
        row("no output", 3, 8, 0),
        row("one of each", 1, 1, 1),
        row("norm of one column", 2, 1, 5, norm=(fixed(1), fixed(1), 1e-5)),
        Row("norm of constant rows, eps 0", constant, few_rows),
    ]


def qkv_into(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Any, weight: Any, bias: Any, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: Any) -> Any:
        caches = k_cache.clone(), v_cache.clone()
        return op(x, weight, bias, *caches, slots), *caches

    return run


def plain_qkv(
    x: Any, weight: Any, bias: Any, k_cache: Any, v_cache: Any, slots: torch.Tensor
) -> torch.Tensor:
    q, k, v = F.linear(x, weight, bias).split(16, dim=1)
    new = appended(k.unflatten(1, (2, 8)), v.unflatten(1, (2, 8)), k_cache, v_cache, slots)
    k_cache.copy_(new[0]), v_cache.copy_(new[1])
    return q


def qkv_rows() -> list[Row]:
    def row(case: str, *slots: int) -> Row:
        given = (fixed(len(slots), 8), fixed(48, 8), fixed(48), fixed(3, 4, 2, 8), fixed(3, 4, 2, 8))
        return Row(case, Call((*given, torch.tensor(slots, dtype=torch.int64))), qkv_into(plain_qkv))

    return [row("no row"), row("skipped rows alone", -1, -1), row("some skipped", 5, -1)]


def embed(tokens: Any, live: Any, words: Any, places: Any, table: Any, lens: torch.Tensor, size: int) -> Any:
    lens = lens.clone()
    return *ops.decode_embed(tokens, live, words, places, table, lens, size), lens


def plain_embed(
    tokens: torch.Tensor,
    live: torch.Tensor,
    words: Any,
    places: Any,
    table: Any,
    lens: torch.Tensor,
    size: int,
) -> Any:
    x, slots = words.new_zeros(len(tokens), words.shape[1]), torch.full((len(tokens),), -1)
    for row in range(min(int(live), len(tokens))):
        place = int(lens[row])
        x[row] = words[tokens[row]] + places[place]
        slots[row] = table[row, place // size] * size + place % size
    return x, slots, lens + (torch.arange(len(tokens)) < live)


def embed_rows() -> list[Row]:
    def row(case: str, live: int, *tokens: int, words: int = 7) -> Row:
        rows = len(tokens)
        table = torch.arange(rows * 2, dtype=torch.int32).view(rows, 2)
        given = (torch.tensor(tokens, dtype=torch.int64), ints(live), fixed(words, 8), fixed(8, 8))
        return Row(case, Call((*given, table, ints(*range(3, 3 + rows)), 4)), plain_embed)

    return [
        row("no row", 0),
        row("no live row", 0, 1, 2),
        row("one word", 2, 0, 0, words=1),
        row("some live", 1, 3, 4),
    ]


def rotary_rows() -> list[Row]:
    def plain(q: torch.Tensor, k: torch.Tensor, *settings: Any) -> Any:
        return turned(q, k, *settings, None, "halves", None, False)

    return [
        Row(
            case,
            Call((leaf(seq, heads, 2 * dim), leaf(seq, 1, 2 * dim), fixed(4, dim), fixed(4, dim))),
            plain,
        )
        for case, seq, heads, dim in (("no token", 0, 3, 4), ("one of each", 1, 1, 1), ("one pair", 3, 2, 1))
    ]


def squeezed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any) -> torch.Tensor:
    return attention(q, k, v, **{"causal": False, **settings})


ROWS: dict[str, list[Row]] = {
    "add_layer_norm": norm_rows(normed, True, True, 3.0),
    "add_rms_norm": norm_rows(root_normed, True, False, 3.0),
    "append_kv": append_rows(),
    "decode_attention": paged_rows(),
    "decode_embed": embed_rows(),
    "decode_linear": decode_linear_rows(),
    "decode_qkv": qkv_rows(),
    "flash_attention": attention_rows(),
    "flash_attention_varlen": packed_rows(),
    "flash_attn_func": [row for row in dense_rows() if row.case != "no head"],
    "flash_attn_kvpacked_func": [one_tensor(row, 1) for row in dense_rows() if row.case != "no head"],
    "flash_attn_qkvpacked_func": [
        one_tensor(row, 0)
        for row in dense_rows()
        if row.case in ("no batch", "zeros", "one query, one key, one number")
    ],
    "flash_attn_varlen_func": packed_rows(),
    "flash_attn_with_kvcache": cache_rows(),
    "gated_mlp": gated_rows(),
    "gelu_mlp": mlp_rows(),
    "layer_norm": norm_rows(normed, False, True, 3.0),
    "linear": linear_rows(F.linear),
    "linear_act": linear_rows(activated),
    "linear_cross_entropy": loss_rows(),
    "linear_residual": linear_rows(
        lambda x, weight, bias, residual: residual + F.linear(x, weight, bias), True
    ),
    "rms_norm": norm_rows(root_normed, False, False, 3.0),
    "rotary": rotary_rows(),
}
# Ops that write into what they are given, as functions of it.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "append_kv": append,
    "decode_embed": embed,
    "decode_qkv": qkv_into(ops.decode_qkv),
}


def test_every_op_has_its_rows() -> None:
    assert set(ROWS) == set(ops.__all__) - SAMPLER - NO_OP


def assert_same(op: Callable[..., Any], row: Row) -> None:
    got, rough, exact = _run(op, row.call), _run(row.plain, row.call), _run(row.plain, _double(row.call))
    assert len(got) == len(exact)
    for index, tensors in enumerate(zip(got, rough, exact, strict=True)):
        assert_accurate(*tensors, f"tensor {index}", terms=row.terms)


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@pytest.mark.parametrize(
    ("name", "row"),
    [pytest.param(name, row, id=f"{name}: {row.case}") for name, rows in ROWS.items() for row in rows],
)
def test_as_plain_pytorch(name: str, row: Row, implementation: Any, device: torch.device) -> None:
    with gptkern.backend(implementation):
        assert_same(FUNCTIONS.get(name, getattr(ops, name)), row.on(device))


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_gradients_of_ignored_tokens(implementation: Any, device: torch.device) -> None:
    row = loss_of_weighed_tokens().on(device)
    with gptkern.backend(implementation):
        assert_same(weighed, row)
