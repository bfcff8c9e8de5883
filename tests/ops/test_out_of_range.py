"""Offsets, pages, slots, lengths and tokens beyond what there is, and calls that have shapes alone.

On a CPU they are errors, by the public function and by the registered op alike. On a GPU nobody looks:
there the kernels, launched here as a GPU launches them, read and write nothing beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_degenerate import FUNCTIONS, ROWS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import gptkern
from gptkern import ops
from gptkern.ops._cases import tensors
from gptkern.ops._dispatch import INTERPRETED
from gptkern.ops._types import CachedSequences, PagedCache
from gptkern.ops.decode_attention import launch as decode
from gptkern.ops.decode_embed.launch import EmbedArguments, embed
from gptkern.ops.decode_linear import launch as decode_linear
from gptkern.ops.flash_attention import launch as flash
from gptkern.ops.flash_attention.launch import NO_EXTRAS, Options, Packed

pytestmark = pytest.mark.usefixtures("on_device")
FAR = 10**6
registered = torch.ops.gptkern


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def longs(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def caches(pages: int = 4, page_size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Of NaN to both sides, which nothing may read, and nothing may write."""
    around = [torch.full((pages + 2, page_size, 2, 16), float("nan")) for _ in range(2)]
    for cache in around:
        cache[1:-1] = torch.randn(pages, page_size, 2, 16)
    return around[0][1:-1], around[1][1:-1]


@pytest.mark.parametrize("page_size", [32, 5], ids=["blocks in a page", "blocks over pages"])
def test_decode_attention_of_missing_pages_and_impossible_lengths(page_size: int) -> None:
    k, v = caches(12, page_size)
    q = torch.randn(7, 2, 16)
    table = torch.arange(14, dtype=torch.int32).view(7, 2) % 12
    lens = ints(page_size * 2, 3, 3, page_size + 1, page_size * 2 + 1, -1, 2**31 - 1)
    table[0, 1] = 11  # the last page there is
    cache = PagedCache(k, v)
    sound = decode.attend(q, cache, CachedSequences(table, lens.clamp(0, page_size)), 0.25, None)[0]
    broken = table.clone()
    broken[1, 0], broken[2, 0], broken[3, 1] = FAR, -1, 12
    out = decode.attend(q, cache, CachedSequences(broken, lens), 0.25, None)[0]
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()
    # What lies past a length is never looked at.
    table[:, 1] = FAR
    lens = lens.clamp(0, page_size)
    assert torch.equal(decode.attend(q, cache, CachedSequences(table, lens), 0.25, None)[0], sound)


def test_slots_beyond_the_cache_are_not_written() -> None:
    k, v = caches()
    before = k.clone(), v.clone()
    new = torch.randn(5, 2, 16)
    decode.append(new, new, PagedCache(k, v), longs(-1, -7, 4 * 32, FAR * FAR, 4 * 32 - 1))
    x, weight = torch.randn(4, 16), torch.randn(96, 16)
    slots = longs(-1, 4 * 32, FAR, 0)
    inputs = decode_linear.LinearInputs(x, weight, None, None, None)
    decode_linear.linear(inputs, cache=PagedCache(k, v), slots=slots)
    for cache, old in zip((k, v), before, strict=True):
        assert torch.equal(cache[3, 31], new[4])
        assert not torch.equal(cache[0, 0], old[0, 0])
        cache[3, 31], cache[0, 0] = old[3, 31], old[0, 0]
        assert torch.equal(cache, old)
        base = cache._base
        assert base is not None
        assert base[0].isnan().all()
        assert base[-1].isnan().all()


def test_tokens_and_places_without_a_weight() -> None:
    words, places = torch.randn(7, 8), torch.randn(6, 8)
    table = torch.arange(12, dtype=torch.int32).view(6, 2)
    lens = ints(0, 1, 6, 8, -1, 0)
    x, slots = embed(EmbedArguments(longs(7, -1, 2, 2, 2, 3), ints(6), words, places, table, lens, 4))
    assert x[:5].isnan().all()
    torch.testing.assert_close(x[5], words[3] + places[0])
    assert slots.tolist() == [0, 9, 5 * 4 + 2, -1, -1, 40]
    assert lens.tolist() == [1, 2, 7, 9, 0, 1]


def test_packed_offsets_are_cut_off_at_what_there_is() -> None:
    around = [torch.full((10, 2, 16), float("nan")) for _ in range(4)]
    q, k, v, do = (t[2:8] for t in around)
    for t in (q, k, v, do):
        t.copy_(torch.randn(6, 2, 16))

    def run(cu_q: torch.Tensor, cu_k: torch.Tensor) -> list[torch.Tensor]:
        packed, options = Packed(cu_q, cu_k, 16, 16), Options(-1, 0, 0.25, 0.0, 0.0)
        out, lse = flash.forward(q, k, v, packed, NO_EXTRAS, options)
        return [out, lse, *flash.backward(do, None, q, k, v, out, lse, packed, NO_EXTRAS, options)]

    # 4 tokens, fewer than none, and more than there are.
    got, expected = run(ints(0, 4, 2, 17), ints(-5, 3, 3, 18)), run(ints(0, 4, 4), ints(0, 3, 3))
    assert not any(t.isnan().any() for t in got)
    assert torch.equal(got[0][:2], expected[0][:2])


def results_of_packed(
    cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int, window: int, softcap: float
) -> list[torch.Tensor]:
    """out, lse, dq, dk and dv of 60 tokens of queries and 75 of keys, beside memory of NaN."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(n, 2, 16) for n in (60, 75, 75, 60))
    packed, options = Packed(cu_q, cu_k, max_q, max_k), Options(window, 0, 0.25, softcap, 0.0)
    out, lse = flash.forward(q, k, v, packed, NO_EXTRAS, options)
    return [out, lse, *flash.backward(do, None, q, k, v, out, lse, packed, NO_EXTRAS, options)]


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds a number that no result has."""
    for name in ("empty", "empty_like"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: made(*a, **k).fill_(12345.0))


@pytest.mark.usefixtures("unwritten")
@pytest.mark.parametrize(("max_q", "max_k"), [(3, 40), (25, 40), (30, 5), (30, 39), (0, 0)])
@pytest.mark.parametrize("window", [-1, 12])
def test_a_sequence_longer_than_promised_is_nan_and_no_other(max_q: int, max_k: int, window: int) -> None:
    """Sequence 1 is longer than promised; rows of no sequence are 0, and nothing else is read or left."""
    cu_q, cu_k = ints(0, 3, 33, 34, 50), ints(0, 5, 45, 45, 50)
    lengths = zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True)
    longer = [a > max_q or b > max_k for a, b in lengths]
    got = results_of_packed(cu_q, cu_k, max_q, max_k, window, 5.0)
    sound = results_of_packed(cu_q, cu_k, 30, 40, window, 5.0)
    for name, value, expected in zip(("out", "lse", "dq", "dk", "dv"), got, sound, strict=True):
        cu = cu_k if name in ("dk", "dv") else cu_q
        value, expected = (t.t() if name == "lse" else t for t in (value, expected))
        assert not expected.isnan().any() and not (expected == 12345.0).any()
        for i, broken in enumerate(longer):
            rows = slice(int(cu[i]), int(cu[i + 1]))
            assert value[rows].isnan().all() if broken else torch.equal(value[rows], expected[rows]), name
        assert torch.equal(value[50:], torch.zeros_like(value[50:])), name


@pytest.mark.usefixtures("unwritten")
def test_every_row_of_packed_results_is_written() -> None:
    """Offsets that begin later, decrease, and leave most rows to no sequence; more sequences than a block."""
    for cu_q, cu_k in (
        (ints(9, 4, 12), ints(70, 3, 10)),
        (ints(20), ints(20)),
        (ints(*[7] * 40, *range(7, 57)), ints(*[9] * 50, *range(9, 49))),
    ):
        got = results_of_packed(cu_q, cu_k, 75, 75, -1, 0.0)
        for name, value in zip(("out", "lse", "dq", "dk", "dv"), got, strict=True):
            cu = (cu_k if name in ("dk", "dv") else cu_q).tolist()
            value = value.t() if name == "lse" else value
            inside = [any(a <= row < b for a, b in pairwise(cu)) for row in range(len(value))]
            outside = ~torch.tensor(inside)
            assert torch.equal(value[outside], torch.zeros_like(value[outside])), name
            assert value.isfinite().all() or (name == "lse" and not value.isnan().any()), name
            assert not (value == 12345.0).any(), name


def paged(**changes: Any) -> tuple[Any, ...]:
    given = {"q": torch.zeros(2, 2, 16), "k": torch.zeros(4, 8, 2, 16), "v": torch.zeros(4, 8, 2, 16)}
    given |= {"table": torch.zeros(2, 2, dtype=torch.int32), "lens": ints(9, 3), **changes}
    return tuple(given.values())


def packed(cu_q: torch.Tensor, cu_k: torch.Tensor) -> tuple[Any, ...]:
    return (*(torch.zeros(6, 2, 16) for _ in range(3)), cu_q, cu_k)


def new(*slots: int) -> tuple[Any, ...]:
    kv, cache = torch.zeros(len(slots), 2, 16), torch.zeros(4, 8, 2, 16)
    return kv, kv, cache, cache.clone(), longs(*slots)


def embedded(tokens: torch.Tensor, lens: torch.Tensor) -> tuple[Any, ...]:
    return tokens, ints(1), torch.zeros(7, 8), torch.zeros(6, 8), ints(0, 1)[:, None], lens, 4


ATTEND = (0.25, None, None)
PACK = (None, None, None, 6, 6, -1, 0, 0.25, 0.0, 0.0)
DENSE = (None, None, None, None, None, 6, 9, -1, 0, 0.25, 0.0, 0.0)
# (public function or None, registered op, arguments of both, the op's further ones, message)
Refused = tuple[Callable[..., Any] | None, Callable[..., Any], tuple[Any, ...], tuple[Any, ...], str]
REFUSED: dict[str, Refused] = {
    "offsets decrease": (
        lambda *a: ops.flash_attention_varlen(*a, 6, 6), registered.flash_attention,
        packed(ints(0, 5, 4), ints(0, 3, 6)), PACK, r"cu_seqlens_q is \[0, 5, 4\]",
    ),
    "offsets pass the end": (
        lambda *a: ops.flash_attn_varlen_func(*a, 6, 6), registered.flash_attention,
        packed(ints(0, 5, 6), ints(0, 3, 7)), PACK, r"cu_seqlens_k is \[0, 3, 7\]; .*at most 6",
    ),
    "offsets begin later": (
        lambda *a: ops.flash_attention_varlen(*a, 6, 6), registered.flash_attention,
        packed(ints(1, 5), ints(0, 6)), PACK, r"cu_seqlens_q is \[1, 5\]",
    ),
    "more queries than promised": (
        lambda *a: ops.flash_attention_varlen(*a, 4, 6), registered.flash_attention,
        packed(ints(0, 5, 6), ints(0, 3, 6)), (*PACK[:3], 4, *PACK[4:]),
        "max_seqlen_q is 4; cu_seqlens_q has a sequence of 5",
    ),
    "more keys than promised": (
        lambda *a: ops.flash_attn_varlen_func(*a, 6, 2), registered.flash_attention,
        packed(ints(0, 5, 6), ints(0, 3, 6)), (*PACK[:4], 2, *PACK[5:]),
        "max_seqlen_k is 2; cu_seqlens_k has a sequence of 3",
    ),
    "lengths that q and k have not": (
        None, registered.flash_attention, tuple(torch.zeros(1, 6, 2, 16) for _ in range(3)), DENSE,
        "max_seqlen_q and max_seqlen_k are 6 and 9",
    ),
    "a page beyond": (
        ops.decode_attention, registered.decode_attention,
        paged(table=ints(0, 4, 1, 9).view(2, 2)), ATTEND, "page_table holds 4; the cache has pages 0 to 3",
    ),
    "a page before": (
        ops.decode_attention, registered.decode_attention,
        paged(table=ints(-1, 0, 1, 2).view(2, 2)), ATTEND, "page_table holds -1",
    ),
    "a length beyond": (
        ops.decode_attention, registered.decode_attention, paged(lens=ints(17, 3)), ATTEND,
        "2 pages hold 0 to 16",
    ),
    "dtypes": (
        ops.decode_attention, registered.decode_attention, paged(lens=longs(1, 3)), ATTEND,
        "seq_lens is int64",
    ),
    "a slot beyond": (
        ops.append_kv, registered.append_kv, new(3, 32), (), "slots holds 32; the cache has slots 0 to 31",
    ),
    "a slot too few": (
        lambda *a: ops.append_kv(*a[:4], a[4][:1]), lambda *a: registered.append_kv(*a[:4], a[4][:1]),
        new(3, 4), (), "slots has shape",
    ),
    "a token beyond": (
        ops.decode_embed, registered.decode_embed, embedded(longs(7, 9), ints(0, 0)), (), "tokens holds 7",
    ),
    "a place beyond": (
        ops.decode_embed, registered.decode_embed, embedded(longs(1, 9), ints(4, 0)), (),
        "seq_lens holds 4; 0 to 3",
    ),
    "widths": (
        None, registered.linear, (torch.zeros(2, 3), torch.zeros(4, 5), None, None, "none", False), (),
        "weight has shape",
    ),
    "a short bias": (
        None, registered.decode_linear,
        (torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(1), None, None, 0.0, "none", None, None), (),
        "bias has shape",
    ),
    "a gradient of another shape": (
        None, registered.linear_backward,
        (torch.zeros(1, 4), torch.zeros(2, 8), torch.zeros(4, 8), None, "none", [True] * 3), (),
        "dout has shape",
    ),
    "an MLP's inner width": (
        None, registered.gelu_mlp,
        (torch.zeros(2, 8), torch.zeros(6, 8), None, torch.zeros(8, 5), None, None, "gelu", False), (),
        "w_proj has shape",
    ),
    "a norm's weight": (
        None, registered.layer_norm, (torch.zeros(2, 8), torch.zeros(7), None, 1e-5, torch.float32), (),
        "weight has shape",
    ),
    "a norm's statistics": (
        None, registered.norm_backward,
        (torch.zeros(2, 8), None, torch.zeros(2, 8), torch.zeros(8), torch.zeros(2, 1), None, 0.0, True,
         False, torch.float32, torch.float32, None, True), (),
        "stats has shape",
    ),
    "a target beyond": (
        ops.linear_cross_entropy,
        lambda *a: registered.linear_cross_entropy(
            *a, None, None, -100, "mean", 0.0, 0.0, 0.0, False, torch.float32, True, True, False
        ),
        (torch.zeros(2, 8), torch.zeros(5, 8), longs(0, 5)), (), "targets holds 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_the_function_and_by_the_registered_op(case: str, implementation: Any) -> None:
    if implementation == "kernel" and not INTERPRETED:
        pytest.skip("on a CPU kernels run interpreted alone, and on a GPU nobody looks")
    function, op, given, more, message = REFUSED[case]
    if "norm" in case and implementation == "reference":
        pytest.skip("the norms' registered ops are the kernels alone")
    with gptkern.backend(implementation):
        if function is not None:
            with pytest.raises((ValueError, TypeError), match=message):
                function(*given)
        with pytest.raises((ValueError, TypeError), match=message):
            op(*given, *more)


def one_of_each() -> list[Any]:
    """A call of every op that computes something."""
    found = []
    for name, rows in ROWS.items():
        row = next(r for r in rows if all(t.numel() for t in tensors((r.call.args, r.call.kwargs))))
        found.append(pytest.param(name, row, id=name))
    return found


@pytest.mark.parametrize(("name", "row"), one_of_each())
def test_tensors_with_the_negative_bit_are_refused_by_name(name: str, row: Any, device: torch.device) -> None:
    """Their memory has the opposites of their elements. A call before that is sound makes no difference."""
    row = row.on(device)
    op = FUNCTIONS.get(name, getattr(ops, name))
    op(*row.call.args, **row.call.kwargs)
    leaves, spec = pytree.tree_flatten((row.call.args, row.call.kwargs))
    tried = 0
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            continue
        changed = [*leaves[:i], torch._neg_view(-leaf.detach()), *leaves[i + 1 :]]
        args, kwargs = pytree.tree_unflatten(changed, spec)
        if name in ("append_kv", "decode_qkv") and leaf.dim() == 4:
            continue  # the table's own calls copy the caches
        with pytest.raises(ValueError, match=r"^\w+: [\w.]+ has the negative bit.*\.resolve_neg\(\)"):
            op(*args, **kwargs)
        tried += 1
    assert tried


def test_caches_with_the_negative_bit_are_not_written() -> None:
    cache, keys = torch.zeros(3, 4, 2, 8), torch.ones(1, 2, 8)
    opposite = torch._neg_view(cache)
    for given in ((opposite, cache), (cache, opposite)):
        with pytest.raises(ValueError, match=r"^append_kv: [kv]_cache has the negative bit"):
            ops.append_kv(keys, keys, *given, longs(3))
    assert torch.equal(cache, torch.zeros_like(cache))


def test_a_launch_refuses_what_its_op_did_not() -> None:
    with pytest.raises(ValueError, match="a kernel is given a tensor with the negative bit"):
        flash.forward(
            *[torch._neg_view(torch.ones(1, 4, 1, 16))] * 3, None, NO_EXTRAS, Options(-1, 0, 1, 0, 0)
        )


def test_the_reference_takes_tensors_with_the_negative_bit() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with gptkern.backend("reference"):
        assert torch.equal(ops.linear(torch._neg_view(x), weight), ops.linear(-x, weight))


@pytest.mark.parametrize(("name", "row"), one_of_each())
def test_gradients_with_the_negative_bit(name: str, row: Any, device: torch.device) -> None:
    row = row.on(device)
    op = FUNCTIONS.get(name, getattr(ops, name))
    out = next(iter(tensors(op(*row.call.args, **row.call.kwargs))))
    wanted = [t for t in tensors((row.call.args, row.call.kwargs)) if t.requires_grad]
    if not out.requires_grad:
        pytest.skip("the op has no gradient")
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, wanted, grad, retain_graph=True, allow_unused=True)
    got = torch.autograd.grad(out, wanted, torch._neg_view(-grad), allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize(("name", "row"), one_of_each())
def test_shapes_alone(name: str, row: Any, where: str, device: torch.device) -> None:
    """Meta and fake tensors give the result's shapes and dtypes, and launch nothing."""
    row = row.on(device)
    op = FUNCTIONS.get(name, getattr(ops, name))
    expected = tensors(op(*row.call.args, **row.call.kwargs))
    mode = FakeTensorMode()

    def bare(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to("meta") if where == "meta" else mode.from_tensor(value)

    args, kwargs = pytree.tree_map(bare, (row.call.args, row.call.kwargs))
    with mode if where == "fake" else nullcontext():
        got = tensors(op(*args, **kwargs))
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in expected]
    assert all(t.is_meta or where == "fake" for t in got)


@pytest.mark.parametrize(("name", "row"), one_of_each())
def test_compiles_without_a_graph_break(name: str, row: Any, device: torch.device) -> None:
    row = row.on(device)
    op = FUNCTIONS.get(name, getattr(ops, name))
    torch.compiler.reset()
    got = torch.compile(op, fullgraph=True, backend="aot_eager")(*row.call.args, **row.call.kwargs)
    expected = op(*row.call.args, **row.call.kwargs)
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
