"""Tokens that a row's own tokens bar from coming next, or make likelier: n-grams, words, biased sequences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gptkern.engine.settings import Settings

Tokens = tuple[int, ...]
# The tokens that followed an n-gram's beginning, the latest first, as a chain: a copy of all chains is flat.
Followers = tuple[int, "Followers"] | None


class Rules:
    """The rules of one request, for all its rows.

    Attributes:
        ngram_size: No n-gram of so many tokens comes twice; 0 for no such rule.
        banned: Tokens that never come.
        biases: Amounts that are always added to tokens' logits.
        changing: Whether bans or biases depend on a row's tokens.
        active: Whether there are any.
    """

    def __init__(self, settings: Settings) -> None:
        self.ngram_size = settings.no_repeat_ngram_size
        words = settings.bad_words_ids
        self.banned = frozenset({*settings.suppress_tokens, *(word[0] for word in words if len(word) == 1)})
        self.biases = {ids[0]: bias for ids, bias in settings.sequence_bias if len(ids) == 1}
        # By the token that a sequence's last one would follow.
        self.words: dict[int, list[Tokens]] = defaultdict(list)
        self.sequences: dict[int, list[tuple[Tokens, float]]] = defaultdict(list)
        for word in words:
            if len(word) > 1:
                self.words[word[-2]].append(word)
        for ids, bias in settings.sequence_bias:
            if len(ids) > 1:
                self.sequences[ids[-2]].append((ids, bias))
        self.changing = bool(self.ngram_size or self.words or self.sequences)
        self.active = bool(self.changing or self.banned or self.biases)


class Verdict(NamedTuple):
    """The tokens that are barred from coming next, and the amounts added to tokens' logits."""

    banned: frozenset[int]
    biases: dict[int, float]


class RowRules:
    """The rules as one row's tokens, prompt included and padding not, make them.

    A token is taken, or taken back, at a cost that does not grow with the row.
    """

    def __init__(self, rules: Rules, tokens: Sequence[int]) -> None:
        self._rules = rules
        self._tokens: list[int] = []
        self._followers: dict[Tokens, Followers] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Take the row's next token."""
        if (beginning := self._beginning()) is not None:
            self._followers[beginning] = (token, self._followers.get(beginning))
        self._tokens.append(token)

    def pop(self) -> None:
        """Take the row's last token back."""
        self._tokens.pop()
        if (beginning := self._beginning()) is not None:
            followers = self._followers.pop(beginning)
            if followers is not None and followers[1] is not None:
                self._followers[beginning] = followers[1]

    def fork(self) -> RowRules:
        """A copy that goes on by itself."""
        twin = RowRules(self._rules, ())
        twin._tokens, twin._followers = self._tokens.copy(), self._followers.copy()
        return twin

    def verdict(self) -> Verdict:
        """The rules for the token that comes next."""
        return Verdict(self._rules.banned.union(self._barred()), self._biases())

    def ahead(self, draft: Sequence[int]) -> list[Verdict]:
        """The rules for the token that comes next, and for those after each of ``draft``."""
        verdicts = [self.verdict()]
        for token in draft:
            self.push(token)
            verdicts.append(self.verdict())
        for _ in draft:
            self.pop()
        return verdicts

    def _beginning(self) -> Tokens | None:
        """The tokens that the next one would complete an n-gram with; None where there are too few."""
        size = self._rules.ngram_size
        if not size or len(self._tokens) < size - 1:
            return None
        return tuple(self._tokens[len(self._tokens) - size + 1 :])

    def _barred(self) -> Iterator[int]:
        if (beginning := self._beginning()) is not None:
            followers = self._followers.get(beginning)
            while followers is not None:
                token, followers = followers
                yield token
        for word in self._rules.words.get(self._tokens[-1], ()):
            if self._ends_with(word[:-1]):
                yield word[-1]

    def _biases(self) -> dict[int, float]:
        biases = dict(self._rules.biases)
        for ids, bias in self._rules.sequences.get(self._tokens[-1], ()):
            if self._ends_with(ids[:-1]):
                biases[ids[-1]] = biases.get(ids[-1], 0.0) + bias
        return biases

    def _ends_with(self, ids: Tokens) -> bool:
        return tuple(self._tokens[-len(ids) :]) == ids
