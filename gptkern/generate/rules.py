"""What a row's own tokens bar from coming next, or make likelier: n-grams, words, biased sequences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptkern.engine.settings import Settings

Tokens = tuple[int, ...]


class Rules:
    """The rules of one call, for all rows.

    Attributes:
        ngram_size: No n-gram of so many tokens comes twice; 0 for no such rule.
        banned: Tokens that never come.
        biases: What is added to tokens' logits, always.
        changing: Whether what is barred or biased depends on a row's tokens.
    """

    def __init__(self, settings: Settings) -> None:
        self.ngram_size = settings.no_repeat_ngram_size
        words = settings.bad_words_ids
        self.banned = {*settings.suppress_tokens, *(word[0] for word in words if len(word) == 1)}
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


class RowRules:
    """The rules as one row's tokens, prompt included and padding not, make them."""

    def __init__(self, rules: Rules, tokens: Sequence[int]) -> None:
        self._rules = rules
        self._tokens = list(tokens)
        self._followers: dict[Tokens, set[int]] = defaultdict(set)
        if rules.ngram_size:
            for end in range(rules.ngram_size, len(tokens) + 1):
                self._note(end)

    def push(self, token: int) -> None:
        """Take the row's next token."""
        self._tokens.append(token)
        if self._rules.ngram_size:
            self._note(len(self._tokens))

    def _note(self, end: int) -> None:
        """Remember the n-gram that ends before ``end``, where there is one."""
        start = end - self._rules.ngram_size
        if start >= 0:
            self._followers[tuple(self._tokens[start : end - 1])].add(self._tokens[end - 1])

    def banned(self) -> set[int]:
        """Tokens that cannot come next."""
        rules = self._rules
        found = set(rules.banned)
        if rules.ngram_size:
            start = len(self._tokens) - rules.ngram_size + 1
            found |= self._followers.get(tuple(self._tokens[max(start, 0) :]), set())
        found.update(w[-1] for w in rules.words.get(self._tokens[-1], ()) if self._ends_with(w[:-1]))
        return found

    def biases(self) -> dict[int, float]:
        """What is added to tokens' logits."""
        found = dict(self._rules.biases)
        for ids, bias in self._rules.sequences.get(self._tokens[-1], ()):
            if self._ends_with(ids[:-1]):
                found[ids[-1]] = found.get(ids[-1], 0.0) + bias
        return found

    def _ends_with(self, ids: Tokens) -> bool:
        return tuple(self._tokens[-len(ids) :]) == ids
