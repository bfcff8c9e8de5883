"""Decode attention against float64, and bit for bit against itself in other batches and other pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptkern import backend, ops
from gptkern.engine.cache import KVCache
from gptkern.ops import _launch
from gptkern.ops.decode_attention import reference
from gptkern.ops.flash_attention.reference import attention

SPLIT = 128


def close_to_float64(
    out: torch.Tensor, expression: Callable[..., torch.Tensor], *floats: torch.Tensor, **others: Any
) -> None:
    """At most twice the error of the plain expression in the same dtype, plus an ulp of its scale."""
    plain = expression(*floats, **others).double()
    exact = expression(*(x.double() for x in floats), **others)
    ulp = torch.finfo(out.dtype).eps * exact.abs().max()
    assert out.isfinite().all()
    assert (out.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + ulp


class Paged:
    """Random sequences of these lengths, in pages dealt at random."""

    def __init__(
        self, lengths: list[int], heads: int, kv_heads: int, dim: int, page_size: int, device: torch.device,
        dtype: torch.dtype = torch.float32, capacity: int | None = None,
    ) -> None:  # fmt: skip
        capacity = max(lengths) if capacity is None else capacity
        max_pages = -(-capacity // page_size)
        pages = len(lengths) * max_pages + 3
        self.q = torch.randn(len(lengths), heads, dim, device=device).to(dtype)
        # What no sequence holds is NaN: whoever reads it shows.
        self.k = torch.full((pages, page_size, kv_heads, dim), torch.nan, device=device, dtype=dtype)
        self.v = self.k.clone()
        self.table = (
            torch.randperm(pages, device=device)[: len(lengths) * max_pages].int().view(-1, max_pages)
        )
        self.lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        for row, length in enumerate(lengths):
            places = torch.arange(length, device=device)
            pages_of = self.table[row, places // page_size].long()
            for cache in (self.k, self.v):
                cache[pages_of, places % page_size] = torch.randn(length, kv_heads, dim, device=device).to(
                    dtype
                )

    def attend(self, **options: Any) -> torch.Tensor:
        return ops.decode_attention(self.q, self.k, self.v, self.table, self.lens, **options)

    def check(self, **options: Any) -> None:
        close_to_float64(
            self.attend(**options), plain, self.q, self.k, self.v, table=self.table, lens=self.lens, **options
        )


def plain(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    table: torch.Tensor,
    lens: torch.Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Row by row through the specification of attention: nothing shared with decode attention."""
    rows = []
    for i, length in enumerate(lens.tolist()):
        places = torch.arange(length, device=q.device)
        at = table[i, places // k_cache.shape[1]].long(), places % k_cache.shape[1]
        k, v = k_cache[at], v_cache[at]
        if window is not None:
            k, v = k[-window:], v[-window:]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("hd,khd->hk", q[i], k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(torch.einsum("hk,khd->hd", scores.softmax(-1, dtype=q.dtype), v))
    return torch.stack(rows)


def test_split_is_what_these_tests_think(device: torch.device) -> None:
    assert (
        _launch.config("decode_attention", device, dtype="fp32", head_dim=64, capacity=1024)["SPLIT"] == SPLIT
    )


@pytest.mark.parametrize("page_size", [16, 64, 256, 100])
def test_lengths_around_every_page_and_split_boundary(page_size: int, device: torch.device) -> None:
    lengths = sorted(
        {1, 2, page_size - 1, page_size, page_size + 1, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 1}
    )
    Paged(lengths, 2, 2, 16, page_size, device).check()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 2), (20, 1), (80, 1), (16, 8)])
def test_query_heads_share_key_heads(heads: int, kv_heads: int, device: torch.device) -> None:
    Paged([150, 7], heads, kv_heads, 16, 16, device).check()


@pytest.mark.parametrize("dim", [16, 20, 64, 96, 128, 200, 256])
def test_head_dims(dim: int, device: torch.device) -> None:
    Paged([33, 140], 2, 1, dim, 32, device).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    Paged([1, 70, 200], 4, 2, 32, 64, device, dtype).check()


@pytest.mark.parametrize("window", [1, 5, SPLIT, SPLIT + 1, 1000])
def test_window(window: int, device: torch.device) -> None:
    Paged([1, 4, 100, 3 * SPLIT], 2, 1, 16, 64, device).check(window=window)


@pytest.mark.parametrize("softcap", [0.3, 2.0, 50.0])
def test_softcap(softcap: float, device: torch.device) -> None:
    paged = Paged([1, 4, 2 * SPLIT + 3], 2, 1, 16, 64, device)
    paged.check(softcap=softcap)
    paged.check(softcap=softcap, window=20, scale=1.5)
    paged.q = paged.q * 1e4
    assert torch.isfinite(paged.attend(softcap=softcap)).all()
    Paged([1, 70, 200], 4, 2, 32, 64, device, torch.bfloat16).check(softcap=softcap)


@pytest.mark.parametrize("scale", [0.5, 0.0, -1.0])
def test_scale(scale: float, device: torch.device) -> None:
    Paged([5, 200], 2, 1, 16, 64, device).check(scale=scale)


@pytest.mark.parametrize("capacity", [20000])
def test_short_sequences_in_a_long_cache(capacity: int, device: torch.device) -> None:
    Paged([1, 600], 1, 1, 16, 2000, device, capacity=capacity).check()


def test_scores_beyond_exp(device: torch.device) -> None:
    case = Paged([300, 2], 2, 1, 16, 64, device)
    case.q *= 1e3
    case.check()


def test_an_empty_sequence_gives_zeros(device: torch.device) -> None:
    case = Paged([130, 1, 40], 2, 1, 16, 16, device)
    case.lens[1] = 0
    out = case.attend()
    assert not out[1].any()
    assert torch.equal(out[0], Paged.attend(case)[0])
    assert out[0].isfinite().all()


def test_nan_stays_in_its_sequence(device: torch.device) -> None:
    case = Paged([140, 140], 2, 1, 16, 16, device)
    clean = case.attend()
    case.k[case.table[0, 2].long(), 3] = torch.nan
    out = case.attend()
    assert out[0].isnan().all()
    assert torch.equal(out[1], clean[1])


@pytest.mark.parametrize("window", [None, 90])
def test_a_sequence_is_the_same_alone_and_in_any_batch(window: int | None, device: torch.device) -> None:
    case = Paged([1, 129, 260, 64, 257, 128, 5, 200, 30], 1, 1, 16, 64, device)
    together = case.attend(window=window)
    for row in range(9):
        one = slice(row, row + 1)
        alone = ops.decode_attention(
            case.q[one], case.k, case.v, case.table[one], case.lens[one], window=window
        )
        assert torch.equal(alone, together[one]), row
    order = torch.randperm(9, device=device)
    shuffled = ops.decode_attention(
        case.q[order], case.k, case.v, case.table[order], case.lens[order], window=window
    )
    assert torch.equal(shuffled, together[order])


def test_pages_do_not_change_a_bit(device: torch.device) -> None:
    case = Paged([300, 77], 2, 1, 16, 64, device)
    expected = case.attend()
    for page_size in (16, 100):
        other = Paged([300, 77], 2, 1, 16, page_size, device, capacity=320)
        for row, length in enumerate(case.lens.tolist()):
            places = torch.arange(length, device=device)
            source = case.table[row, places // 64].long(), places % 64
            target = other.table[row, places // page_size].long(), places % page_size
            other.k[target], other.v[target] = case.k[source], case.v[source]
        other.q = case.q
        assert torch.equal(other.attend(), expected), page_size


@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_the_number_of_programs_changes_no_bit(
    multiprocessors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Paged([500, 130, 1], 1, 1, 16, 64, device)
    expected = case.attend()
    monkeypatch.setattr(_launch, "multiprocessors", lambda _: multiprocessors)
    assert torch.equal(case.attend(), expected)


def test_forked_and_truncated_sequences(device: torch.device) -> None:
    cache = KVCache(
        n_layer=1, n_kv_head=1, head_dim=16, num_pages=40, page_size=16, max_seqs=4, max_pages_per_seq=16,
        dtype=torch.float32, device=device,
    )  # fmt: skip
    (a,) = cache.allocate()
    held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def append(sequence: int, tokens: int) -> None:
        step = cache.extend([tokens], [sequence])
        k, v = torch.randn(2, tokens, 1, 16, device=device)
        cache.k[0].flatten(0, 1)[step.slots], cache.v[0].flatten(0, 1)[step.slots] = k, v
        step.commit()
        old = held.get(sequence, (k[:0], v[:0]))
        held[sequence] = torch.cat([old[0], k]), torch.cat([old[1], v])

    append(a, 150)
    b = cache.fork(a)
    held[b] = held[a]
    append(b, 1)
    append(a, 7)
    cache.truncate(b, 40)
    held[b] = held[b][0][:40], held[b][1][:40]
    c = cache.fork(b)
    held[c] = held[b]
    append(c, 100)
    append(b, 9)
    q = torch.randn(3, 2, 16, device=device)
    lengths = torch.tensor(cache.lengths, dtype=torch.int32, device=device)
    out = ops.decode_attention(q, cache.k[0], cache.v[0], cache.page_table[:3], lengths)
    for row, sequence in enumerate(cache.sequences):
        k, v = held[sequence]
        expected, _ = attention(q[None, row, None], k[None], v[None])
        torch.testing.assert_close(out[row], expected[0, 0])


def test_offsets_past_two_to_the_31(device: torch.device) -> None:
    case = Paged([40], 1, 1, 16, 16, device)
    expected = case.attend()
    for cache, name in ((case.k, "k"), (case.v, "v")):
        # One page that lies 2^31 elements on: the buffer is virtual memory, its other pages untouched.
        far = torch.empty((2**31 + 16 * 16 * 3,), dtype=torch.float32, device=device)
        strided = far.as_strided((4, 16, 1, 16), (2**31 // 3 + 1, 16, 16, 1))
        strided[1:4] = cache[case.table[0].long()]
        setattr(case, name, strided)
    case.table = torch.tensor([[1, 2, 3]], dtype=torch.int32, device=device)
    assert torch.equal(case.attend(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_writes_these_slots_and_no_others(dtype: torch.dtype, device: torch.device) -> None:
    k, v = torch.randn(2, 5, 3, 20, device=device)
    caches = [torch.zeros(4, 7, 3, 20, device=device, dtype=dtype) for _ in range(2)]
    slots = torch.tensor([27, 0, -1, 13, 14], device=device)
    ops.append_kv(k.transpose(0, 1).contiguous().transpose(0, 1), v, *caches, slots)
    for new, cache in zip((k, v), caches, strict=True):
        expected = torch.zeros(28, 3, 20, device=device, dtype=dtype)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot] = new[token].to(dtype)
        assert torch.equal(cache.flatten(0, 1), expected)


def test_strided_arguments_are_used_as_they_are(device: torch.device) -> None:
    case = Paged([70, 3], 2, 2, 16, 16, device)
    expected = case.attend()
    case.q = torch.stack([case.q, case.q], 1)[:, 0]
    both = torch.stack([case.k, case.v], 2)
    case.k, case.v = both[:, :, 0], both[:, :, 1]
    case.table = torch.stack([case.table, case.table], 1)[:, 1]
    assert torch.equal(case.attend(), expected)


def test_one_launch(device: torch.device) -> None:
    case = Paged([300, 2], 2, 1, 16, 16, device)
    names: list[str] = []

    def note(launch: _launch.Launch) -> bool:
        names.append(launch.name)
        return True

    with _launch.observe(note):
        case.attend()
    assert names == ["decode_attention_kernel"]


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_registered_ops_agree_with_their_schemas(implementation: str, device: torch.device) -> None:
    case = Paged([20, 3], 2, 1, 16, 16, device)
    new = torch.randn(2, 1, 16, device=device)
    slots = torch.tensor([3, 40], device=device)
    for cache in (case.k, case.v):
        cache.nan_to_num_()
    with backend(implementation):  # type: ignore[arg-type]
        torch.library.opcheck(
            torch.ops.gptkern.decode_attention,
            (case.q, case.k, case.v, case.table, case.lens, 0.25, None, None),
        )
        torch.library.opcheck(torch.ops.gptkern.append_kv, (new, new, case.k, case.v, slots))


def test_reference_is_attention() -> None:
    case = Paged([1, 40, 33], 4, 2, 12, 16, torch.device("cpu"))
    arguments = case.q.double(), case.k.double(), case.v.double()
    for window in (None, 7):
        out = reference.decode_attention(*arguments, case.table, case.lens, None, window)
        expected = plain(*arguments, table=case.table, lens=case.lens, window=window)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 16)}, ValueError, "k_cache has 2 heads, q has 3"),
        ({"q": torch.zeros(2, 4, 8)}, ValueError, "q has head dimension 8, the cache 16"),
        ({"q": torch.zeros(2, 4, 16, dtype=torch.int32)}, TypeError, "q is torch.int32, the cache"),
        ({"q": torch.zeros(4, 16)}, ValueError, "q has shape"),
        ({"q": None}, TypeError, "q is NoneType"),
        ({"q": torch.zeros(2, 4, 32)[..., ::2]}, ValueError, "q has strides"),
        ({"v_cache": torch.zeros(4, 8, 1, 16)}, ValueError, "v_cache has shape"),
        (
            {"k_cache": torch.zeros(4, 8, 2, 300), "v_cache": torch.zeros(4, 8, 2, 300)},
            ValueError,
            "1 to 256",
        ),
        ({"page_table": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "page_table is int64"),
        ({"page_table": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, "page_table has 3 rows, q 2"),
        ({"seq_lens": torch.zeros(3, dtype=torch.int32)}, ValueError, "seq_lens has 3 rows"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 4, 16),
        "k_cache": torch.zeros(4, 8, 2, 16),
        "v_cache": torch.zeros(4, 8, 2, 16),
        "page_table": torch.zeros(2, 2, dtype=torch.int32),
        "seq_lens": torch.ones(2, dtype=torch.int32),
        **change,
    }
    with pytest.raises(error, match=message):
        ops.decode_attention(**arguments)


def test_lengths_beyond_the_pages_are_refused_on_a_cpu() -> None:
    case = Paged([20], 1, 1, 16, 16, torch.device("cpu"))
    case.lens[0] = 33
    with pytest.raises(ValueError, match="2 pages hold 0 to 32 tokens"):
        case.attend()
