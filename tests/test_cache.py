"""The KV cache against a plain model of it: lists of tokens, one per sequence."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptkern import GPTConfig
from gptkern.engine.cache import KVCache
from gptkern.engine.pages import CacheFullError
from gptkern.ops.flash_attention.reference import attention

CONFIG = GPTConfig(vocab_size=11, n_positions=64, n_layer=2, n_head=2, n_embd=4)


def make(**changes: int | None) -> KVCache:
    sizes: dict[str, int | None] = {"max_seqs": 4, "max_len": 20, "page_size": 4, **changes}
    return KVCache.for_config(CONFIG, **sizes)  # type: ignore[arg-type]


def append(cache: KVCache, values: list[list[float]], sequences: list[int] | None = None) -> None:
    """Append tokens whose keys and values are these numbers (values negative), in every layer."""
    step = cache.extend([len(new) for new in values], sequences)
    flat = torch.tensor([x for new in values for x in new], dtype=torch.float32)
    _, _, _, heads, dim = cache.k.shape
    for layer in range(cache.k.shape[0]):
        cache.k[layer].flatten(0, 1)[step.slots] = (flat + layer)[:, None, None].expand(-1, heads, dim)
        cache.v[layer].flatten(0, 1)[step.slots] = -(flat + layer)[:, None, None].expand(-1, heads, dim)
    step.commit()


def contents(cache: KVCache) -> list[list[float]]:
    """What each live sequence holds, read through the device's table and lengths alone."""
    held = []
    for row, length in enumerate(cache.lengths):
        pages = cache.page_table[row, : -(-length // cache.page_size)].long()
        k = cache.k[:, pages].flatten(1, 2)[:, :length]
        v = cache.v[:, pages].flatten(1, 2)[:, :length]
        assert torch.equal(k, -v)
        assert bool((k == k[..., :1, :1]).all())
        assert torch.equal(k[1], k[0] + 1)
        held.append(k[0, :, 0, 0].tolist())
    return held


def held_pages(cache: KVCache) -> set[int]:
    return {
        page
        for row, length in enumerate(cache.lengths)
        for page in cache.page_table[row, : -(-length // cache.page_size)].tolist()
    }


class Plain:
    """The same cache as lists."""

    def __init__(self) -> None:
        self.held: dict[int, list[float]] = {}
        self.counter = 0

    def fresh(self, count: int) -> list[float]:
        self.counter += count
        return [float(self.counter - count + i) for i in range(count)]


def _random_append(cache: KVCache, plain: Plain, rng: random.Random) -> None:
    ids = cache.sequences
    chosen = rng.sample(ids, rng.randint(0, len(ids)))
    values = [plain.fresh(rng.choice([0, 1, 1, 1, 3, 7])) for _ in chosen]
    everyone = rng.random() < 0.5
    if everyone:
        chosen, values = ids, [plain.fresh(1) for _ in ids]
    append(cache, values, None if everyone else chosen)
    for sequence, new in zip(chosen, values, strict=True):
        plain.held[sequence] = plain.held[sequence] + new


def _random_change(cache: KVCache, plain: Plain, rng: random.Random) -> None:
    ids = cache.sequences
    actions = ["allocate", "free", "fork", "truncate", "reorder", "abandon", "append", "append", "append"]
    action = rng.choice(actions)
    if action == "append":
        _random_append(cache, plain, rng)
    elif action == "allocate":
        plain.held.update((i, []) for i in cache.allocate(rng.randint(0, 2)))
    elif action == "abandon":
        cache.extend([rng.choice([0, 1, 5]) for _ in ids])
    elif not ids:
        return
    elif action == "free":
        sequence = rng.choice(ids)
        cache.free(sequence)
        del plain.held[sequence]
    elif action == "fork":
        source = rng.choice(ids)
        plain.held[cache.fork(source)] = plain.held[source]
    elif action == "truncate":
        sequence = rng.choice(ids)
        length = rng.randint(0, len(plain.held[sequence]))
        cache.truncate(sequence, length)
        plain.held[sequence] = plain.held[sequence][:length]
    else:
        sources = [rng.choice(ids) for _ in ids]
        cache.reorder(sources)
        plain.held = dict(zip(ids, [plain.held[s] for s in sources], strict=True))


@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 30), (4, 9), (20, 4)])
def test_random_operations_agree_with_a_plain_model(page_size: int, num_pages: int) -> None:
    rng = random.Random(page_size)
    cache = make(page_size=page_size, memory_bytes=num_pages * page_size * make().bytes_per_token)
    plain = Plain()
    full = 0
    for _ in range(3400):
        before = (cache.sequences, cache.lengths, cache.free_pages)
        try:
            _random_change(cache, plain, rng)
        except CacheFullError:
            full += 1
            assert (cache.sequences, cache.lengths, cache.free_pages) == before
        assert cache.sequences == list(plain.held)
        assert cache.lengths == list(map(len, plain.held.values()))
        assert contents(cache) == list(plain.held.values())
    assert full > 20
    cache.clear()
    assert cache.free_pages == cache.num_pages
    assert cache.lengths == []


def test_pages_are_counted_exactly() -> None:
    cache = make()
    assert (cache.num_pages, cache.free_pages, cache.max_len) == (20, 20, 20)
    a, b = cache.allocate(2)
    append(cache, [[1, 2, 3, 4, 5], [6]])
    assert cache.free_pages == 17
    c = cache.fork(a)
    assert cache.free_pages == 17
    append(cache, [[7]], [c])  # the half-full page is copied, the full one stays shared
    assert cache.free_pages == 16
    assert contents(cache) == [[1, 2, 3, 4, 5], [6], [1, 2, 3, 4, 5, 7]]
    cache.free(a)
    assert cache.free_pages == 17
    append(cache, [[8]], [c])  # alone by now: written in place
    assert cache.free_pages == 17
    cache.truncate(c, 4)
    assert cache.free_pages == 18
    cache.free(b)
    cache.free(c)
    assert cache.free_pages == 20


def test_last_reader_of_a_shared_page_writes_in_place() -> None:
    cache = make(max_seqs=2, page_size=20)
    (a,) = cache.allocate()
    append(cache, [[1, 2]])
    b = cache.fork(a)
    append(cache, [[3], [4]])
    assert contents(cache) == [[1, 2, 3], [1, 2, 4]]
    assert cache.free_pages == 0
    cache.reorder([b, b])
    append(cache, [[5], [6]])
    assert contents(cache) == [[1, 2, 4, 5], [1, 2, 4, 6]]


def test_sequences_never_share_a_page_they_write() -> None:
    cache = make()
    (a,) = cache.allocate()
    append(cache, [[1, 2, 3]])
    cache.fork(a)
    step = cache.extend([1, 1])
    pages = (step.slots // cache.page_size).tolist()
    assert len(set(pages)) == 2


def test_memory_budget_fixes_the_pages() -> None:
    per_token = 2 * CONFIG.n_layer * CONFIG.n_embd * 4
    cache = make(memory_bytes=per_token * 4 * 7 + 3)
    assert cache.bytes_per_token == per_token
    assert cache.num_pages == 7
    assert cache.k.nbytes + cache.v.nbytes == 7 * 4 * per_token
    # More than all sequences can hold is for pages that are found again.
    assert make(memory_bytes=per_token * 4 * 50).num_pages == 50
    assert make(cache_tokens=13).num_pages == 4
    half = KVCache.for_config(CONFIG, max_seqs=1, max_len=4, dtype=torch.bfloat16)
    assert half.bytes_per_token == per_token // 2


def test_a_full_cache_says_what_is_missing_and_stays_as_it_was() -> None:
    cache = make(memory_bytes=make().bytes_per_token * 4 * 3)
    cache.allocate(2)
    append(cache, [[1, 2, 3, 4], [5]])
    with pytest.raises(CacheFullError, match=r"3 pages of 4 tokens are needed, 1 of 3 are free"):
        cache.extend([5, 4])
    with pytest.raises(CacheFullError, match=r"of 1 tokens and 20 more passes .* of 20"):
        cache.extend([0, 20])
    with pytest.raises(CacheFullError, match=r"3 sequences asked for, 2 of 4 are in use"):
        cache.allocate(3)
    assert contents(cache) == [[1, 2, 3, 4], [5]]
    assert cache.free_pages == 1


def test_a_forward_pass_that_fails_leaves_the_cache_as_it_was() -> None:
    cache = make()
    (a,) = cache.allocate()
    append(cache, [[1, 2, 3]])
    b = cache.fork(a)
    cache.extend([4, 1])  # never committed
    assert contents(cache) == [[1, 2, 3], [1, 2, 3]]
    append(cache, [[4], [5]])
    assert contents(cache) == [[1, 2, 3, 4], [1, 2, 3, 5]]
    cache.truncate(a, 0)
    cache.truncate(b, 0)
    assert cache.free_pages == cache.num_pages


@pytest.mark.parametrize(
    "change",
    [
        lambda cache, a: cache.free(a),
        lambda cache, a: cache.truncate(a, 1),
        lambda cache, a: cache.fork(a),
        lambda cache, a: cache.reorder([a]),
        lambda cache, a: cache.extend([1]),
        lambda cache, a: cache.clear(),
    ],
)
def test_a_step_is_void_once_the_cache_was_changed(change: Callable[[KVCache, int], object]) -> None:
    cache = make()
    (a,) = cache.allocate()
    append(cache, [[1, 2]])
    step = cache.extend([1])
    change(cache, a)
    with pytest.raises(RuntimeError, match="was changed"):
        step.commit()


def test_a_step_commits_once() -> None:
    cache = make()
    cache.allocate()
    step = cache.extend([1])
    step.commit()
    with pytest.raises(RuntimeError, match="was changed"):
        step.commit()
    assert cache.lengths == [1]


def test_advance_counts_reserved_tokens_only() -> None:
    cache = make()
    cache.allocate(2)
    cache.reserve([4, 1])
    cache.advance([4, 1])
    assert cache.lengths == [4, 1]
    with pytest.raises(ValueError, match="not reserved"):
        cache.advance([1, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.free(9), "sequence 9 is not alive"),
        (lambda c: c.truncate(0, 3), "length is 3; sequence 0 holds 2 tokens"),
        (lambda c: c.truncate(0, -1), "length is -1"),
        (lambda c: c.reorder([0, 0]), "2 sources for 1 sequences"),
        (lambda c: c.reorder([5]), "sequence 5 is not alive"),
        (lambda c: c.extend([1, 1]), "2 lengths for 1 sequences"),
        (lambda c: c.extend([-1]), "0 or more is needed"),
        (lambda c: c.extend([1, 1], [0, 0]), "repeat an id"),
        (lambda c: c.allocate(-1), "n is -1"),
        (lambda c: make(max_len=0), "max_len 0"),
        (lambda c: make(page_size=0), "page_size is 0"),
        (lambda c: make(cache_tokens=0), "cache_tokens is 0; 1 or more is needed"),
        (lambda c: make(cache_tokens=9, memory_bytes=9), "cache_tokens and memory_bytes are given"),
        (lambda c: make(max_seqs=2**70), "lower max_seqs, or bound the cache by cache_tokens"),
        (lambda c: make(page_size=2**70), "lower max_seqs, or bound the cache by cache_tokens"),
        (lambda c: make(cache_tokens=2**70), "at most 2147483647 pages are accepted"),
        (lambda c: make(memory_bytes=2**70), "at most 2147483647 pages are accepted"),
        (lambda c: make(memory_bytes=5), "memory_bytes is 5; one page of 4 tokens takes 256"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(call: Callable[[KVCache], object], message: str) -> None:
    cache = make()
    cache.allocate()
    append(cache, [[1, 2]])
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert contents(cache) == [[1, 2]]
    assert cache.free_pages == 19


def _mapping(address: int) -> dict[str, str]:
    """What the system says of the memory at an address."""
    fields: dict[str, str] = {}
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(" ")
        if not name.endswith(":"):
            begin, end = (int(edge, 16) for edge in name.split("-"))
            within = begin <= address < end
        elif within:
            fields[name[:-1]] = value.strip()
    return fields


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not Path("/proc/self/smaps").exists(),
    reason="this system has no huge pages, or does not show them",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_cache_takes_memory_as_it_is_written_and_asks_for_huge_pages(dtype: torch.dtype) -> None:
    config = GPTConfig(vocab_size=11, n_positions=1024, n_layer=4, n_head=8, n_embd=512)
    cache = KVCache.for_config(config, max_seqs=4, max_len=1024, dtype=dtype)
    for memory in (cache.k, cache.v):
        mapping = _mapping(memory.data_ptr())
        assert "hg" in mapping["VmFlags"].split()
        # The system shows neighbours as one mapping: something of another's may be in it.
        assert int(mapping["Rss"].split()[0]) * 1024 < memory.nbytes / 2
        memory[1, 2, 3] = 1
        assert memory.sum(dtype=torch.float32) == 512
        assert memory.is_contiguous()


def test_a_cache_beyond_memory_says_what_bounds_it() -> None:
    with pytest.raises(MemoryError, match="which cpu does not have: lower max_seqs, or bound the cache"):
        make(page_size=2**50)  # beyond any address space


@pytest.mark.parametrize("page_size", [24, 1, 4])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_through_the_cache_is_attention(page_size: int | None, kv_heads: int) -> None:
    heads, dim, scale = 2, 6, 0.3
    size = 24 if page_size is None else page_size
    cache = KVCache(
        n_layer=2,
        n_kv_head=kv_heads,
        head_dim=dim,
        num_pages=72 // size,
        page_size=size,
        max_seqs=3,
        max_pages_per_seq=24 // size,
        dtype=torch.float64,
        device="cpu",
    )
    cache.allocate(3)
    past: list[tuple[torch.Tensor, torch.Tensor]] = [
        (torch.empty(0, kv_heads, dim, dtype=torch.float64),) * 2 for _ in range(3)
    ]
    for new_lengths in ([5, 2, 1], [1, 1, 1], [3, 0, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1], [2, 2, 2]):
        step = cache.extend(new_lengths)
        q = torch.randn(sum(new_lengths), heads, dim, dtype=torch.float64)
        k, v = torch.randn(2, sum(new_lengths), kv_heads, dim, dtype=torch.float64)
        out = step.attention(1, q, k, v, scale=scale)
        step.commit()
        starts = step.cu_seqlens_q.tolist()
        positions = []
        for i, (a, b) in enumerate(itertools.pairwise(starts)):
            positions += range(len(past[i][0]), len(past[i][0]) + b - a)
            past[i] = (torch.cat([past[i][0], k[a:b]]), torch.cat([past[i][1], v[a:b]]))
            expected, _ = attention(q[None, a:b], past[i][0][None], past[i][1][None], scale=scale)
            torch.testing.assert_close(out[a:b], expected[0])
        assert step.positions.tolist() == positions
        assert step.seq_lens_k.tolist() == cache.lengths == [len(kv[0]) for kv in past]
    assert not cache.k[0].any()


def test_no_gradient_flows_through_a_cache() -> None:
    cache = make()
    cache.allocate()
    q, k, v = (torch.randn(3, 2, 2, requires_grad=True) for _ in range(3))
    step = cache.extend([3])
    assert not step.attention(0, q, k, v, scale=1.0).requires_grad
    assert not cache.k.requires_grad


def test_a_cache_made_in_inference_mode_can_be_used_outside() -> None:
    with torch.inference_mode():
        cache = make()
        cache.allocate()
        append(cache, [[1]])
    append(cache, [[2]])
    assert contents(cache) == [[1, 2]]
