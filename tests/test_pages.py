"""The pool of pages against a plain model of it, and what the cache makes of it."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch

from gptkern import GPT
from gptkern.config import GPTConfig
from gptkern.engine.cache import KVCache
from gptkern.engine.pages import CacheFullError, PagePool
from gptkern.engine.prefix import PageKeys
from gptkern.ops import _dispatch

CONFIG = GPTConfig(vocab_size=11, n_positions=64, n_layer=1, n_head=1, n_embd=2)


class Plain:
    """The same pool: every holder's pages, and in which order pages with keys came to be held by nobody."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.held: list[list[int]] = []
        self.page_of: dict[bytes, int] = {}
        self.idle: list[int] = []
        self.evictions = 0

    def counts(self) -> Counter[int]:
        return Counter(page for pages in self.held for page in pages)

    def free(self) -> set[int]:
        return set(range(self.num_pages)) - set(self.counts()) - set(self.idle)

    def evict(self, page: int) -> None:
        self.idle.remove(page)
        self.forget(page)
        self.evictions += 1

    def forget(self, page: int) -> None:
        self.page_of = {key: other for key, other in self.page_of.items() if other != page}


def _take(pool: PagePool, plain: Plain, rng: random.Random) -> None:
    count = rng.randint(1, max(4, plain.num_pages // 4))
    before = plain.free() | set(plain.idle)
    if count > len(before):
        with pytest.raises(CacheFullError, match=f"{count} pages are needed, {len(before)} of"):
            pool.take(count)
        return
    grows = rng.choice(plain.held) if plain.held and rng.random() < 0.5 else None
    after = grows[-1] if grows else None
    free = plain.free()
    while len(free) < count:
        free.add(plain.idle[0])
        plain.evict(plain.idle[0])
    pages = pool.take(count, after)
    assert set(pages) <= free and len(set(pages)) == count
    # The next page wherever that is free.
    if after is not None and after + 1 in free:
        assert pages[0] == after + 1
    for page, following in itertools.pairwise(pages):
        assert following == page + 1 or page + 1 not in free - set(pages)
    if grows is None:
        plain.held.append(pages)
    else:
        grows += pages


def _change(pool: PagePool, plain: Plain, rng: random.Random) -> None:
    action = rng.choice(["take", "take", "release", "fork", "remember", "find", "forget"])
    if action == "take":
        _take(pool, plain, rng)
    elif action == "find":
        keys = [*rng.sample(sorted(plain.page_of), len(plain.page_of))[:3], b"unknown"]
        pages = pool.find(keys)
        assert pages == [plain.page_of[key] for key in keys[:-1]]
        if pages:
            pool.share(pages)
            plain.held.append(pages)
            plain.idle = [page for page in plain.idle if page not in pages]
    elif not plain.held:
        return
    elif action == "release":
        pages = plain.held.pop(rng.randrange(len(plain.held)))
        pool.release(pages)
        left = plain.counts()
        plain.idle += [p for p in reversed(pages) if not left[p] and p in plain.page_of.values()]
    elif action == "fork":
        pages = list(rng.choice(plain.held))
        pool.share(pages)
        plain.held.append(pages)
    elif action == "remember":
        for page in rng.choice(plain.held):
            key = rng.randbytes(1)
            pool.remember(page, key)
            if key not in plain.page_of and page not in plain.page_of.values():
                plain.page_of[key] = page
    elif rng.random() < 0.1:
        pool.forget_all()
        plain.page_of, plain.idle = {}, []
    else:
        page = rng.randrange(plain.num_pages)
        pool.forget(page)
        plain.forget(page)
        plain.idle = [other for other in plain.idle if other != page]


@pytest.mark.parametrize("num_pages", [12, 40, 100])
def test_ten_thousand_random_operations_agree_with_a_plain_model(num_pages: int) -> None:
    rng, pool, plain = random.Random(num_pages), PagePool(num_pages, 3), Plain(num_pages)
    for _ in range(3400):
        _change(pool, plain, rng)
        counts = plain.counts()
        assert [pool.holders(page) for page in range(num_pages)] == [counts[p] for p in range(num_pages)]
        assert pool.idle == len(plain.idle)
        assert pool.available == len(plain.idle) + len(plain.free())
        if len(plain.held) > 6:
            pool.release(plain.held[0])
            gone = plain.held.pop(0)
            left = plain.counts()
            plain.idle += [p for p in reversed(gone) if not left[p] and p in plain.page_of.values()]
    assert plain.evictions > 20
    for pages in plain.held:
        pool.release(pages)
    assert pool.available == num_pages
    pool.forget_all()
    assert (pool.available, pool.idle) == (num_pages, 0)


def make(**changes: int) -> KVCache:
    return KVCache.for_config(CONFIG, **{"max_seqs": 4, "max_len": 32, "page_size": 4, **changes})


def grow(cache: KVCache, counts: list[int], sequences: list[int] | None = None) -> None:
    cache.extend(counts, sequences).commit()


def test_sequences_that_grow_together_stay_in_one_piece() -> None:
    cache = make()
    cache.allocate(4)
    for _ in range(32):
        grow(cache, [1] * 4)
    for sequence in cache.sequences:
        pages = cache.pages(sequence)
        assert pages == list(range(pages[0], pages[0] + 8))


def test_neighbouring_pages_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    seen: list[tuple[int, ...]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        storage = k.untyped_storage().data_ptr()
        seen.append((k.shape[0], int(storage == cache.k.untyped_storage().data_ptr())))
        return torch.zeros_like(q)

    monkeypatch.setattr("gptkern.engine.forward_pass.reference.attend", attend)
    cache.allocate(2)
    grow(cache, [5, 0])
    grow(cache, [0, 9])
    cache.assign({cache.sequences[0]: cache.sequences[1]})
    grow(cache, [1, 1])
    grow(cache, [3, 3])
    forward = cache.extend([1, 1])
    one = torch.zeros(2, 1, 2)
    forward.attention(0, one, one, one, scale=1.0)
    pages = [cache.pages(sequence) for sequence in cache.sequences]
    expected = [int(p == list(range(p[0], p[0] + len(p)))) for p in pages]
    assert seen == [(14, expected[0]), (14, expected[1])]
    assert expected == [0, 1]


def test_a_shared_page_is_copied_and_no_other() -> None:
    cache = make()
    (first,) = cache.allocate()
    grow(cache, [30])
    second = cache.fork(first)
    for _ in range(2):
        grow(cache, [1, 1])
    assert cache.copied_pages == 1
    assert cache.pages(first)[:7] == cache.pages(second)[:7]
    assert cache.pages(first)[7] != cache.pages(second)[7]


def test_beams_copy_at_most_one_page_a_beam_and_step() -> None:
    rng = random.Random(0)
    cache = make()
    cache.allocate(4)
    grow(cache, [6, 0, 0, 0])
    for _ in range(20):
        cache.reorder([rng.choice(cache.sequences) for _ in range(4)])
        copied = cache.copied_pages
        grow(cache, [1] * 4)
        assert cache.copied_pages - copied <= 4
    assert cache.copied_pages > 4


def test_generate_with_beams_copies_pages_and_not_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    torch.manual_seed(0)
    model = GPT(CONFIG.replace(n_positions=256, n_embd=8, initializer_range=0.5)).eval()
    copied: list[tuple[int, int]] = []
    own_tail = KVCache._own_tail

    def counted(cache: KVCache, row: Any) -> None:
        copied.append((row.length, row.length % cache.page_size))
        own_tail(cache, row)

    monkeypatch.setattr(KVCache, "_own_tail", counted)
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=200, num_beams=4, eos_token_id=None)
    # At most one a beam and step; the last beam of a page writes in place, so that it is one fewer.
    assert max(Counter(length for length, _ in copied).values()) <= 3
    assert len(copied) > 10
    assert all(tokens for _, tokens in copied)


def test_sequences_may_swap_what_they_hold() -> None:
    cache = make()
    a, b, c = cache.allocate(3)
    grow(cache, [5, 9, 2])
    pages = {sequence: cache.pages(sequence) for sequence in (a, b, c)}
    cache.assign({a: b, b: a})
    assert [cache.pages(s) for s in (a, b, c)] == [pages[b], pages[a], pages[c]]
    assert cache.lengths == [9, 5, 2]
    with pytest.raises(ValueError, match="sequence 7 is not alive"):
        cache.assign({a: 7})
    assert cache.lengths == [9, 5, 2]


TOKENS = list(range(32))


def test_a_prefix_is_found_again_after_its_sequence_has_ended() -> None:
    cache = make()
    keys = PageKeys(1, 4)
    (first,) = cache.allocate()
    grow(cache, [14])
    cache.remember(first, keys.first(3, TOKENS))
    pages = cache.pages(first)[:3]
    cache.free(first)
    assert cache.free_pages == cache.num_pages
    again, held = cache.begin(keys.first(8, TOKENS))
    assert (held, cache.pages(again)) == (12, pages)
    grouped, held = cache.begin(keys.first(8, TOKENS), group=2)
    assert (held, cache.pages(grouped)) == (8, pages[:2])
    other, held = cache.begin(PageKeys(2, 4).first(8, TOKENS))
    assert (held, cache.pages(other)) == (0, [])
    assert cache.begin(PageKeys(1, 4).first(2, [0, 1, 2, 3, 9, 9, 9, 9]))[1] == 4
    cache.clear()
    cache.forget_prefixes()
    assert cache.begin(keys.first(8, TOKENS))[1] == 0


def test_memory_that_is_wanted_is_taken_from_the_least_recently_used() -> None:
    cache = make(cache_tokens=24)
    keys = [PageKeys(version, 4) for version in range(3)]
    for one in keys:
        (sequence,) = cache.allocate()
        grow(cache, [8])
        cache.remember(sequence, one.first(2, TOKENS))
        cache.free(sequence)
    used, _ = cache.begin(keys[0].first(2, TOKENS))
    cache.free(used)
    (other,) = cache.allocate()
    grow(cache, [5])
    # The second is the longest unused.
    assert [cache.begin(one.first(2, TOKENS))[1] for one in keys] == [8, 0, 8]
    with pytest.raises(CacheFullError, match="1 pages of 4 tokens are needed, 0 of 6 are free"):
        grow(cache, [4], [other])


def test_what_a_key_leads_to_never_changes() -> None:
    cache = make()
    keys = PageKeys(1, 4)
    (first,) = cache.allocate()
    grow(cache, [8])
    cache.remember(first, keys.first(2, TOKENS))
    cache.truncate(first, 6)
    # It is alone: it writes in place, and what it writes is not what the key says.
    grow(cache, [1])
    assert cache.copied_pages == 0
    assert cache.begin(keys.first(2, TOKENS))[1] == 4
    with pytest.raises(ValueError, match="2 keys; sequence 0 holds 7 tokens, a key is of 4"):
        cache.remember(first, keys.first(2, TOKENS))


def test_keys_follow_every_token_before() -> None:
    seen = set()
    for tokens in ([1, 2, 3, 4], [1, 2, 4, 3], [2, 2, 3, 4], [1, 2, 3, 260], [258, 3, 4, 5]):
        keys = PageKeys(0, 2).first(2, tokens)
        assert keys == PageKeys(0, 2).first(2, tokens)
        seen.add(keys[1])
    assert len(seen) == 5
    with pytest.raises(ValueError, match="3 tokens do not fill 2 pages of 2"):
        PageKeys(0, 2).first(2, [1, 2, 3])
