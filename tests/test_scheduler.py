"""The scheduler by its promises: nobody starves, no page is lost, order holds, a token is computed once."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptkern.config import GPTConfig
from gptkern.engine.cache import KVCache
from gptkern.engine.scheduler import Part, Row, Scheduler

CONFIG = GPTConfig(vocab_size=11, n_positions=64, n_layer=1, n_head=1, n_embd=1)
PAGE, CHUNK = 2, 4


class Harness:
    """An engine without a model: new tokens are numbers, and passes are counted."""

    def __init__(
        self,
        *,
        pages: int,
        max_seqs: int,
        unit: int = CHUNK,
        decode_tokens: int = 1,
        prefix_cache: bool = True,
        seed: int = 0,
    ) -> None:
        self.cache = KVCache.for_config(
            CONFIG, max_seqs=max_seqs, max_len=64, page_size=PAGE, cache_tokens=pages * PAGE
        )
        self.unit = unit
        self.scheduler = Scheduler(
            self.cache,
            prefill_chunk=CHUNK,
            unit=unit,
            decode_tokens=decode_tokens,
            prefix_cache=prefix_cache,
        )
        self.rng = random.Random(seed)
        self.arrivals = self.passes = 0
        self.rows: list[Row] = []
        self.begun: list[Row] = []
        self.ended: list[Row] = []

    def add(
        self,
        prompt: Sequence[int],
        max_new: int,
        *,
        priority: int = 0,
        copies: int = 1,
        deadline: float | None = None,
    ) -> list[Row]:
        self.scheduler.check_fits(len(prompt), max_new, copies=copies, beams=1)
        rows = [
            Row(self.arrivals, copy, priority, self.arrivals, list(prompt), max_new, deadline)
            for copy in range(copies)
        ]
        self.arrivals += 1
        self.scheduler.add(rows)
        self.rows += rows
        return rows

    def step(self, drafts: bool = False) -> list[Part]:
        waiting = {id(row) for row in self.scheduler.waiting}
        for row in self.scheduler.running:
            room = row.max_new - len(row.generated) - 1
            if drafts and row.computed + 1 == row.total and row.computed >= len(row.prompt) and room > 0:
                row.draft = [100 + row.total + i for i in range(self.rng.randint(0, min(room, 3)))]
        planned = self.scheduler.plan(float(self.passes))
        self.ended += planned.expired
        self.begun += [row for row in self.scheduler.running if id(row) in waiting]
        for row in planned.preempted:
            assert row.sequence is None and row.state == "waiting"
        self._check(planned.parts)
        for part in planned.parts:
            assert part.row.sequence is not None
            self.cache.advance([part.count], [part.row.sequence])
            self._finish_part(part)
        self.passes += 1
        self._check_lengths()
        return planned.parts

    def _finish_part(self, part: Part) -> None:
        draft = list(part.row.draft)
        held = self.rng.randint(1, part.count) if draft else part.count
        rows = self.scheduler.computed(part, held if draft else None)
        if not part.samples:
            return
        for row in rows:
            # A token of its own at each place, the same whenever it is made.
            for _ in range(held if draft else 1):
                row.generated.append(100 + row.total)
            if len(row.generated) >= row.max_new:
                self.ended += self.scheduler.finish(row)

    def _check(self, parts: list[Part]) -> None:
        assert len({id(part.row) for part in parts}) == len(parts)
        assert sum(p.count for p in parts if p.prefill) <= max(CHUNK, self.unit)
        for part in parts:
            row = part.row
            assert part.start == row.computed and part.count > 0
            assert row.sequence is not None
            assert len(self.cache.pages(row.sequence)) * PAGE >= part.start + part.count
            if row.computed < len(row.prompt):
                end = part.start + part.count
                assert part.start % self.unit == 0
                assert end % self.unit == 0 or end == len(row.prompt)
            assert part.samples == (part.start + part.count - len(row.draft) == row.total)

    def _check_lengths(self) -> None:
        holders = [row for row in self.rows if row.sequence is not None]
        assert sorted(self.cache.sequences) == sorted(r.sequence for r in holders if r.sequence is not None)
        for row in holders:
            assert row.sequence is not None
            assert row.state == "running"
            assert self.cache.length(row.sequence) == row.computed

    def run(self, *, drafts: bool = False, most: int = 5000) -> None:
        while any(row.state != "finished" for row in self.rows):
            parts = self.step(drafts)
            assert parts or all(row.state == "finished" for row in self.rows), "nobody runs"
            assert self.passes < most

    def check_all_is_back(self) -> None:
        assert self.cache.free_pages == self.cache.num_pages
        assert self.cache.sequences == []
        assert self.scheduler.running == self.scheduler.waiting == []
        self.cache.forget_prefixes()
        assert self.cache._pool.idle == 0


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=11)
requests = st.lists(
    st.tuples(prompts, st.integers(1, 9), st.integers(-1, 1), st.integers(1, 3), st.integers(0, 6)),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(
    requests,
    st.integers(10, 24),
    st.integers(3, 5),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_every_request_ends_and_everything_comes_back(
    asked: list[tuple[list[int], int, int, int, int]],
    pages: int,
    max_seqs: int,
    unit: int,
    decode_tokens: int,
    drafts: bool,
    prefix_cache: bool,
    rng: random.Random,
) -> None:
    harness = Harness(
        pages=pages,
        max_seqs=max_seqs,
        unit=unit,
        decode_tokens=decode_tokens,
        prefix_cache=prefix_cache,
        seed=rng.randrange(1000),
    )
    cancelled: set[int] = set()
    for prompt, max_new, priority, copies, gap in asked:
        deadline = harness.passes + 2.0 if rng.random() < 0.1 else None
        rows = harness.add(prompt, max_new, priority=priority, copies=copies, deadline=deadline)
        for _ in range(gap):
            harness.step(drafts)
        if rng.random() < 0.2:
            harness.ended += harness.scheduler.finish(rows[0])
            cancelled.add(id(rows[0]))
        if rng.random() < 0.2:
            harness.scheduler.follow_weights(harness.passes)
    harness.run(drafts=drafts)
    harness.check_all_is_back()
    assert sorted(map(id, harness.ended)) == sorted(map(id, harness.rows))
    for row in harness.rows:
        whole = [100 + len(row.prompt) + i for i in range(row.max_new)]
        assert row.generated == whole[: len(row.generated)]
        if row.deadline is None and id(row) not in cancelled:
            leader = next(r for r in harness.rows if r.request == row.request)
            assert id(leader) in cancelled or row.generated == whole


def test_requests_are_begun_by_priority_then_arrival() -> None:
    harness = Harness(pages=30, max_seqs=2)
    rows = [harness.add([1] * 3, 4, priority=p)[0] for p in (0, 1, 0, 1, 2)]
    harness.run()
    assert [harness.rows.index(row) for row in harness.begun] == [4, 1, 3, 0, 2]
    assert all(len(row.generated) == 4 for row in rows)


def test_no_later_request_is_begun_before_a_longer_one() -> None:
    harness = Harness(pages=10, max_seqs=4)
    (first,) = harness.add([1] * 3, 12)
    harness.step()
    (long,) = harness.add([0] * 14, 2)
    (short,) = harness.add([1], 1)
    while long.state == "waiting":
        assert short.state == "waiting"
        harness.step()
    assert first.state == "finished"
    harness.run()
    harness.check_all_is_back()


def test_a_long_prompt_runs_in_chunks_beside_running_rows() -> None:
    harness = Harness(pages=30, max_seqs=4)
    (short,) = harness.add([1, 2], 9)
    harness.step()
    (long,) = harness.add(list(range(11)), 1)
    shapes = []
    for _ in range(3):
        before = len(short.generated)
        shapes.append([(part.row is long, part.start, part.count, part.samples) for part in harness.step()])
        assert len(short.generated) == before + 1
    tokens = [2, 3, 4]
    assert shapes == [
        [(False, tokens[0], 1, True), (True, 0, 4, False)],
        [(False, tokens[1], 1, True), (True, 4, 4, False)],
        [(False, tokens[2], 1, True), (True, 8, 3, True)],
    ]
    assert long.state == "finished"


def test_the_youngest_gives_way_and_is_computed_again() -> None:
    harness = Harness(pages=8, max_seqs=3, prefix_cache=False)
    (old,) = harness.add([1] * 3, 11)
    (young,) = harness.add([2] * 3, 9)
    high: list[Row] = []
    while not harness.scheduler.preemptions:
        harness.step()
        if harness.passes == 3:
            high = harness.add([3], 1, priority=5)
    assert young.state == "waiting" and old.state == "running"
    assert young.generated
    harness.run()
    assert len(old.generated) == 11 and len(young.generated) == 9 and len(high[0].generated) == 1
    harness.check_all_is_back()


@pytest.mark.parametrize("decode_tokens", [1, 3])
def test_own_tokens_are_taken_again_behind_the_prompt(decode_tokens: int) -> None:
    harness = Harness(pages=8, max_seqs=2, decode_tokens=decode_tokens, prefix_cache=False)
    harness.add([1] * 3, 9)
    (young,) = harness.add([2] * 3, 9)
    while not harness.scheduler.preemptions:
        harness.step()
    made = len(young.generated)
    assert made >= 3
    parts = []
    while len(young.generated) == made:
        parts += [part for part in harness.step() if part.row is young]
    assert (parts[0].start, parts[0].count, parts[0].samples) == (0, 3, False)
    assert {part.count for part in parts[1:-1]} <= {decode_tokens, (made - 1) % decode_tokens}
    assert sum(part.count for part in parts) == 3 + made
    assert [part.samples for part in parts] == [False] * (len(parts) - 1) + [True]


def test_where_rows_are_invariant_own_tokens_run_in_chunks() -> None:
    harness = Harness(pages=8, max_seqs=2, unit=1, prefix_cache=False)
    harness.add([1] * 3, 9)
    (young,) = harness.add([2] * 3, 9)
    while not harness.scheduler.preemptions:
        harness.step()
    made = len(young.generated)
    parts = []
    while len(young.generated) == made:
        parts += [part for part in harness.step() if part.row is young]
    assert [part.count for part in parts][:-1] == [4] * (len(parts) - 1)


@pytest.mark.parametrize(("unit", "found"), [(1, [10, 12]), (4, [8, 8]), (3, [6, 6])])
def test_a_prompt_that_ran_before_is_found_again(unit: int, found: list[int]) -> None:
    harness = Harness(pages=30, max_seqs=3, unit=unit)
    prompt = list(range(11))
    harness.add(prompt, 3)
    harness.run()
    (again,) = harness.add(prompt, 1)
    first = harness.step()[0]
    assert (first.row, first.start) == (again, found[0])
    harness.run()
    # What was generated runs as a prompt now: its bits are those of a unit only where rows are invariant.
    harness.add([*prompt, 111, 112, 113], 1)
    assert harness.step()[0].start == found[1]


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    harness = Harness(pages=30, max_seqs=3)
    for prompt in ([1] * 8, [1] * 8):
        harness.add(prompt, 1)
        start = harness.step()[0].start
        harness.run()
    assert start == 4


def test_new_weights_make_prefixes_unknown() -> None:
    harness = Harness(pages=30, max_seqs=3)
    (running,) = harness.add([1] * 9, 5)
    harness.step()
    harness.scheduler.follow_weights(7)
    harness.run()
    assert len(running.generated) == 5
    # Nobody can ask for what was computed under the old version.
    assert harness.cache._pool.idle == 0
    # Not even what was computed since by a row that was begun before.
    harness.add([1] * 9, 1)
    assert harness.step()[0].start == 0
    harness.scheduler.follow_weights(7)
    harness.run()
    harness.add([1] * 9, 1)
    assert harness.step()[0].start == 8


def test_a_row_that_needs_its_prompts_logits_finds_no_prefix() -> None:
    harness = Harness(pages=30, max_seqs=3)
    harness.add([1] * 9, 1)
    harness.run()
    (row,) = harness.add([1] * 9, 1)
    row.finds_prefix = False
    assert harness.step()[0].start == 0


def test_copies_share_one_prefill() -> None:
    harness = Harness(pages=30, max_seqs=4)
    rows = harness.add([1] * 7, 3, copies=3)
    counts = [sum(part.count for part in harness.step()) for _ in range(3)]
    assert counts == [4, 3, 3]
    assert [len(row.generated) for row in rows] == [2, 2, 2]
    assert harness.cache.copied_pages == 2
    harness.run()
    harness.check_all_is_back()


def test_rows_are_reserved_for_all_copies_at_once() -> None:
    harness = Harness(pages=30, max_seqs=3)
    (first,) = harness.add([1] * 3, 6)
    harness.step()
    rows = harness.add([2] * 7, 2, copies=3)
    while first.state == "running":
        assert len(harness.cache.sequences) == 1
        harness.step()
    harness.step()
    assert len(harness.cache.sequences) == 3
    assert {row.state for row in rows} == {"running"}


def test_a_deadline_ends_waiting_and_running_rows() -> None:
    harness = Harness(pages=30, max_seqs=1)
    (running,) = harness.add([1] * 3, 20, deadline=4.0)
    (waiting,) = harness.add([1] * 3, 20, deadline=2.0)
    for _ in range(3):
        harness.step()
    assert (waiting.state, running.state) == ("finished", "running")
    harness.step()
    planned = harness.scheduler.plan(4.0)
    assert planned.expired == [running]
    harness.check_all_is_back()


def test_what_can_never_fit_is_refused_by_name() -> None:
    harness = Harness(pages=8, max_seqs=2)
    harness.add([1] * 10, 6)
    with pytest.raises(ValueError, match=r"10 tokens and 7 new ones need 9 pages of 2 tokens, .* has 8"):
        harness.add([1] * 10, 7)
    with pytest.raises(ValueError, match="num_return_sequences is 3, the engine's max_seqs is 2"):
        harness.add([1], 1, copies=3)
