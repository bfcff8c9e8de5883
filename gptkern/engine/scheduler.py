"""Scheduler: which rows go into the next pass, with how many tokens, and who has to wait or give way.

Order is that of priority, then of arrival. Rows that have their prompt behind them run in every pass, a token
each. Beside them, prompts run in chunks. A row is begun when there is room for
its whole prompt and one token, and no later row is begun before it. Where memory runs out, the row that is
last in the order gives its pages back and waits to be computed again.

The beams of a search are rows that run in the same passes, share pages, and end or give way together. A
search that gave way begins anew from its prompt: so its beams share pages again as they did.

Everything here is plain Python on counts of tokens; it takes no tensor in its hands.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from gptkern.engine.pages import CacheFullError
from gptkern.engine.prefix import PageKeys
from gptkern.engine.sequences import Sequences

if TYPE_CHECKING:
    from gptkern.engine.steering import Steering

RowState = Literal["waiting", "running", "finished"]


@dataclass(eq=False)
class Row:
    """One sequence of a request, from its arrival to its end.

    Attributes:
        request, copy: Which of the engine's requests, and which of its copies.
        priority, arrival: Its place in the order: higher priorities first, then earlier arrivals.
        prompt: The request's tokens.
        max_new: Most new tokens.
        deadline: When it ends, on the engine's clock.
        generated: Its new tokens, as far as the host knows them.
        ahead: New tokens beyond those, chosen on the device and not yet read.
        draft: Tokens that the next pass is to verify after the last one.
        computed: Tokens whose keys and values the cache holds.
        sequence: Its id in the cache; None while it waits.
        remembered: How many of its pages are found again by their keys.
        finds_prefix: Whether it may begin with pages that are found: not if its prompt's logits are wanted.
        followers: Rows that begin with what this row holds as soon as that is the whole prompt.
        beams: The rows of its beam search, itself included; empty where it is no beam.
        steering: What is added between the layers for it, or None.
    """

    request: int
    copy: int
    priority: int
    arrival: int
    prompt: Sequence[int]
    max_new: int
    deadline: float | None = None
    generated: list[int] = field(default_factory=list)
    ahead: int = 0
    draft: list[int] = field(default_factory=list)
    computed: int = 0
    sequence: int | None = None
    remembered: int = 0
    finds_prefix: bool = True
    followers: list[Row] = field(default_factory=list)
    beams: Sequence[Row] = ()
    steering: Steering | None = None
    state: RowState = "waiting"
    keys: PageKeys | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """The key by which rows are sorted, first to last."""
        return (-self.priority, self.arrival, self.copy)

    @property
    def total(self) -> int:
        """Tokens that it has, computed or not; drafts are none of them."""
        return len(self.prompt) + len(self.generated) + self.ahead

    def tokens(self, start: int, count: int) -> list[int]:
        """``count`` of its tokens from place ``start`` on, its draft included."""
        place = start - len(self.prompt)
        if place >= 0 and place + count <= len(self.generated):
            return self.generated[place : place + count]
        tokens: list[int] = []
        for source in (self.prompt, self.generated, self.draft):
            tokens += source[start : start + count - len(tokens)]
            start = max(start - len(source), 0)
        return tokens


@dataclass(slots=True)
class Part:
    """One row's share of a pass.

    Attributes:
        start, count: Where its tokens begin, and how many they are.
        prefill: They are a chunk of a prompt.
        samples: The next token is to be chosen after its last one, and for every follower another.
    """

    row: Row
    start: int
    count: int
    prefill: bool
    samples: bool


@dataclass(frozen=True)
class Pass:
    """The work of the next pass.

    Attributes:
        parts: One a row.
        expired: Rows whose deadline has passed. They have ended.
        preempted: Rows that gave way; they wait again.
    """

    parts: list[Part]
    expired: list[Row]
    preempted: list[Row]


class Scheduler:
    """Rows of a running engine.

    Args:
        cache: Where sequences and pages are reserved; nobody else may begin or end sequences in it.
        prefill_chunk: Most tokens of prompts in one pass, as far as whole units allow.
        prefix_cache: Whether full pages are found again.
        weights_version: The version of the model's weights, asked before a row begins. None: none is.

    Attributes:
        unit: Prompts are cut at its multiples alone. 1: a token's keys and values are the same bits in every
            pass. If not, only whole units of prompts are found again, and a row that gave way takes its own
            new tokens again in passes like those that they came from.
        decode_tokens: How many of those one such pass takes.
        preemptions: How often a row gave way, so far.
        prefix_queries, prefix_hits: Tokens looked for among the pages that are found again, and those found.
    """

    def __init__(
        self,
        cache: Sequences,
        *,
        prefill_chunk: int,
        unit: int = 1,
        decode_tokens: int = 1,
        prefix_cache: bool = True,
        weights_version: Callable[[], int] | None = None,
    ) -> None:
        self.unit, self.decode_tokens = unit, decode_tokens
        self.preemptions = 0
        self.prefix_queries = self.prefix_hits = 0
        self._cache = cache
        self._chunk = prefill_chunk
        self._prefix_cache = prefix_cache
        self._weights_version = weights_version
        # Whether the version was asked for this pass.
        self._looked = False
        self._version = 0
        # Both sorted by ``order``.
        self._waiting: list[Row] = []
        self._running: list[Row] = []
        # Those that have a deadline and have not ended.
        self._timed: set[Row] = set()

    @property
    def waiting(self) -> list[Row]:
        """Rows that hold nothing yet, or no more, in order; followers are with the row that they follow."""
        return list(self._waiting)

    @property
    def running(self) -> list[Row]:
        """Rows that hold a sequence of the cache, in order; followers are with the row that they follow."""
        return list(self._running)

    def check_fits(self, prompt_tokens: int, max_new: int, *, copies: int, beams: int) -> None:
        """Refuse a request for which there is no room even if it is alone.

        Args:
            copies, beams: Its sequences: copies that run by themselves, or the beams of a search; 1 if none.

        Raises:
            ValueError: More pages than the pool has, or more sequences than there may be.
        """
        size, pages = self._cache.page_size, self._cache.num_pages
        # Beams may part right after the prompt, whose full pages they share.
        shared = prompt_tokens // size
        needed = shared + beams * (-(-(prompt_tokens + max_new) // size) - shared)
        if needed > pages:
            each = f" for each of {beams} beams" if beams > 1 else ""
            raise ValueError(
                f"Engine.add: a prompt of {prompt_tokens} tokens and {max_new} new ones{each} need {needed} "
                f"pages of {size} tokens, the engine has {pages}: give fewer, or an engine with more memory"
            )
        for name, count in (("num_beams", beams), ("num_return_sequences", copies)):
            if count > self._cache.max_seqs:
                raise ValueError(
                    f"Engine.add: {name} is {count}, the engine's max_seqs is {self._cache.max_seqs}"
                )

    def add(self, rows: Sequence[Row]) -> None:
        """Take the rows of one request, which have the same prompt. The first computes it for all."""
        first, *others = rows
        first.followers = list(others)
        bisect.insort(self._waiting, first, key=_order)
        self._timed.update(row for row in rows if row.deadline is not None)

    def follow_weights(self, version: int) -> None:
        """Find no page again that was computed with other weights."""
        if version != self._version:
            self._version = version
            self._cache.forget_prefixes()

    def plan(self, now: float) -> Pass:
        """Choose the next pass, and reserve the pages that it needs."""
        expired = [ended for row in self._expired(now) for ended in self.finish(row)] if self._timed else []
        self._looked = False
        preempted: list[Row] = []
        parts = self._decodes(preempted)
        full = self._cache.num_sequences >= self._cache.max_seqs
        if len(parts) == len(self._running) and (full or not self._waiting):
            return Pass(parts, expired, preempted)
        budget = max(self._chunk, self.unit)
        for row in self._unfilled(preempted):
            if not self._prefilling(row):
                # Pages that were found hold all but its last token.
                parts.append(self._decode(row))
                continue
            count = self._prefill_end(row) - row.computed
            if count > budget:
                count = (row.computed + budget) // self.unit * self.unit - row.computed
            if count <= 0:
                break
            budget -= count
            parts.append(Part(row, row.computed, count, True, row.computed + count == row.total))
            if not budget:
                break
        return Pass(parts, expired, preempted)

    def computed(self, part: Part, held: int | None = None) -> list[Row]:
        """Count a part's tokens as computed, or the first ``held`` of them where its draft did not hold.

        Returns:
            The rows that the part's last logits belong to: its own, and its followers where they begin to run
            now that their whole prompt is computed.
        """
        row = part.row
        assert row.sequence is not None
        count = part.count if held is None else held
        row.computed += count
        row.draft = []
        if count < part.count:
            self._cache.truncate(row.sequence, row.computed)
        self._remember(row)
        if row.computed < len(row.prompt) or not row.followers or row.beams:
            return [row]
        followers = [follower for follower in row.followers if follower.state == "running"]
        row.followers = []
        if followers:
            self._cache.assign({f.sequence: row.sequence for f in followers if f.sequence is not None})
        for follower in followers:
            follower.computed, follower.remembered = row.computed, row.remembered
            bisect.insort(self._running, follower, key=_order)
        return [row, *followers]

    def repeatable(self, rows: Sequence[Row]) -> int:
        """The number of passes that are of ``rows`` again, a token each, with nothing to decide or reserve.

        The rows have just run, a token each; they are in the order of that pass.
        """
        full = self._cache.num_sequences >= self._cache.max_seqs
        if rows != self._running or (self._waiting and not full):
            return 0
        # The page that a row has begun is its own; the pass that fills it lets it be found.
        size = self._cache.page_size
        filled = [row.computed % size for row in rows]
        return size - 1 - max(filled) if filled and min(filled) else 0

    def repeated(self, rows: Sequence[Row], sequences: Sequence[int]) -> None:
        """Count a pass of ``repeatable`` rows as computed; ``sequences`` are theirs."""
        for row in rows:
            row.computed += 1
        self._cache.advance_by_one(sequences)

    def branch(self, beams: Sequence[Row], parents: Sequence[int], tokens: Sequence[list[int]]) -> None:
        """Let a search's first rows go on as ``parents`` of them; the others hold nothing meanwhile.

        Args:
            parents: For each row that goes on the one whose pages it shares from here on.
            tokens: The new tokens of each, of which the last is to be computed.
        """
        first = beams[0]
        held, remembered = first.computed, first.remembered
        ids = [row.sequence for row in beams if row.sequence is not None]
        self._cache.assign({ids[place]: ids[parent] for place, parent in enumerate(parents)})
        first.followers = []
        for place, row in enumerate(beams):
            ran, runs = row is first or bool(row.generated), place < len(parents)
            if runs:
                row.generated, row.computed, row.remembered = tokens[place], held, remembered
                if not ran:
                    bisect.insort(self._running, row, key=_order)
            elif ran:
                row.generated, row.computed, row.remembered = [], 0, 0
                self._cache.truncate(ids[place], 0)
                self._running.remove(row)

    def finish(self, row: Row) -> list[Row]:
        """End a row, whatever it is doing, and give back all that it holds.

        Returns:
            The rows that ended: it, and those that followed it or are beams of its search; none where it had
            ended before.
        """
        group = [member for member in _together(row) if member.state != "finished"]
        for place in (self._waiting, self._running):
            for member in group:
                if member in place:
                    place.remove(member)
        for member in group:
            self._release(member)
            member.state, member.followers = "finished", []
        self._timed.difference_update(group)
        return group

    def start_over(self, rows: Sequence[Row]) -> None:
        """Let ``rows``, whatever was planned with them, wait to be computed again. They are all there are."""
        for row in rows:
            row.followers = []
            self._release(row)
            row.state, row.ahead = "waiting", 0
        self._waiting = sorted((row for row in rows if row is _together(row)[0]), key=_order)
        self._running = []

    def _expired(self, now: float) -> list[Row]:
        """Rows whose deadline has passed, those that run first, in order."""
        rows = [member for row in (*self._running, *self._waiting) for member in (row, *row.followers)]
        return [row for row in rows if row.deadline is not None and row.deadline <= now]

    def _decodes(self, preempted: list[Row]) -> list[Part]:
        """The parts of rows that have their prompt behind them, with pages for all their tokens."""
        rows = [row for row in self._running if not self._prefilling(row)]
        parts = list(map(self._decode, rows))
        if self._reserved(parts):
            return parts
        for row in rows:
            self._make_room(row, preempted)
        return [self._decode(row) for row in rows if row.sequence is not None]

    def _decode(self, row: Row) -> Part:
        """A row's next part behind its prompt: its last token and its draft, or some tokens taken again."""
        again = row.total - row.computed - 1
        count = min(again, self.decode_tokens) if again else 1 + len(row.draft)
        return Part(row, row.computed, count, False, not again)

    def _make_room(self, row: Row, preempted: list[Row]) -> None:
        """Reserve a row's next pages; the last in the order, at the end itself, gives way while they lack."""
        while row.sequence is not None and not self._reserved([self._decode(row)]):
            if row.draft:
                row.draft = []
            else:
                preempted.append(self._give_way(self._running[-1]))

    def _reserved(self, parts: Sequence[Part]) -> bool:
        sequences = [part.row.sequence for part in parts if part.row.sequence is not None]
        try:
            self._cache.reserve([part.count for part in parts], sequences)
        except CacheFullError:
            return False
        return True

    def _unfilled(self, preempted: Sequence[Row]) -> Iterator[Row]:
        """Rows with a prompt to compute, in order; those that wait are begun when they are asked for.

        Rows that gave way for this very pass are passed over: tokens of theirs may still be unread.
        """
        waiting = list(self._waiting)
        filling = [row for row in self._running if self._prefilling(row)]
        for row in heapq.merge(filling, waiting, key=_order):
            if row.state == "running":
                yield row
            elif row.state == "waiting" and waiting:
                if row in preempted or not self._begin(row):
                    waiting = []
                else:
                    yield row

    @property
    def _row_invariant(self) -> bool:
        return self.unit == 1

    def _prefilling(self, row: Row) -> bool:
        """True if a row's next tokens run in a chunk."""
        again = self._row_invariant and row.total - row.computed > 1
        return row.computed < len(row.prompt) or again

    def _prefill_end(self, row: Row) -> int:
        return row.total if self._row_invariant else len(row.prompt)

    def _begin(self, row: Row) -> bool:
        """Give a waiting row a sequence, and pages for all its tokens and one more; False where they lack."""
        group = [row, *row.followers]
        if self._cache.num_sequences + len(group) > self._cache.max_seqs:
            return False
        if self._weights_version is not None and not self._looked:
            self.follow_weights(self._weights_version())
            self._looked = True
        for member in group:
            steered = b"" if row.steering is None else row.steering.key
            member.keys = PageKeys(self._version, self._cache.page_size, steered)
        sequence, found = self._cache.begin(self._findable(row), group=self._group)
        try:
            self._cache.reserve([row.total + 1 - found], [sequence])
        except CacheFullError:
            self._cache.free(sequence)
            return False
        # Each row that runs, and each beam, may want a page soon: a row that is begun now would give it back
        # at once.
        if self._cache.free_pages < len(self._running) + max(len(row.beams) - 1, 0):
            self._cache.free(sequence)
            return False
        row.sequence, row.computed = sequence, found
        if self._prefix_cache and row.finds_prefix:
            self.prefix_queries += row.total
            self.prefix_hits += found
        for follower in row.followers:
            follower.sequence, _ = self._cache.begin([], group=1)
        for member in group:
            member.state = "running"
        self._waiting.remove(row)
        bisect.insort(self._running, row, key=_order)
        return True

    @property
    def _group(self) -> int:
        """Pages that are found together or not at all."""
        return self.unit // math.gcd(self.unit, self._cache.page_size)

    def _findable(self, row: Row) -> list[bytes]:
        """The keys that a row may begin with: at least its last token is to be computed."""
        if not (self._prefix_cache and row.finds_prefix):
            return []
        known = len(row.prompt) + len(row.generated)
        end = min(row.total - 1, known if self._row_invariant else len(row.prompt))
        assert row.keys is not None
        return row.keys.first(end // self._cache.page_size, row.tokens(0, end))

    def _remember(self, row: Row) -> None:
        """Let the pages that a row has filled be found again, where they hold what any row would compute."""
        size = self._cache.page_size
        if not self._prefix_cache or row.computed < (row.remembered + 1) * size:
            return
        assert row.keys is not None and row.sequence is not None
        if row.keys.version != self._version:
            return
        known = len(row.prompt) + len(row.generated)
        # A beam's own tokens may be another's in the next pass.
        generated = self._row_invariant and not row.beams
        end = min(row.computed, known if generated else len(row.prompt))
        pages = end // size // self._group * self._group
        if pages > row.remembered:
            self._cache.remember(row.sequence, row.keys.first(pages, row.tokens(0, pages * size)))
            row.remembered = pages

    def _give_way(self, row: Row) -> Row:
        """Take back all that a row and those with it hold; the row that waits for them."""
        group = _together(row)
        self._running = [other for other in self._running if other not in group]
        for member in group:
            self._release(member)
            member.state = "waiting"
        bisect.insort(self._waiting, group[0], key=_order)
        self.preemptions += 1
        return group[0]

    def _release(self, row: Row) -> None:
        if row.sequence is not None:
            self._cache.free(row.sequence)
        row.sequence, row.computed, row.remembered, row.draft = None, 0, 0, []
        if row.beams:
            row.generated = []
            row.followers = list(row.beams[1:]) if row is row.beams[0] else []


def _order(row: Row) -> tuple[int, int, int]:
    return row.order


def _together(row: Row) -> Sequence[Row]:
    """A row and those that end or give way with it, the first in the order first."""
    return row.beams or (row, *row.followers)
