"""What a row's own tokens bar from coming next, or make likelier: n-grams, words, biased sequences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptkern.generate.options import Settings

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


def suppressed(given: Mapping[str, Any], vocab_size: int) -> Tokens:
    """The option ``suppress_tokens``, checked."""
    value = _sequence("suppress_tokens", given.get("suppress_tokens", ()))
    return _ids("suppress_tokens", value, vocab_size) if value else ()


def bad_words(given: Mapping[str, Any], eos: Sequence[int], vocab_size: int) -> tuple[Tokens, ...]:
    """The option ``bad_words_ids``, checked; as in transformers, an end-of-text token is no word."""
    name = "bad_words_ids"
    words = [_ids(name, word, vocab_size, eos) for word in _sequence(name, given.get(name, ()))]
    return tuple(word for word in words if len(word) > 1 or word[0] not in eos)


def biased(given: Mapping[str, Any], vocab_size: int) -> tuple[tuple[Tokens, float], ...]:
    """The options ``sequence_bias`` and ``logit_bias``, checked and joined."""
    found: dict[Tokens, float] = {}
    value = given.get("sequence_bias", {})
    pairs = value.items() if isinstance(value, Mapping) else _sequence("sequence_bias", value)
    for pair in pairs:
        if len(_sequence("sequence_bias", pair)) != 2:
            raise ValueError(f"generate: sequence_bias holds {pair!r}; token ids and a bias are needed")
        ids = _ids("sequence_bias", pair[0], vocab_size)
        found[ids] = _bias("sequence_bias", ids, pair[1])
    by_token = given.get("logit_bias", {})
    if not isinstance(by_token, Mapping):
        raise TypeError(
            f"generate: logit_bias is {type(by_token).__name__}; a mapping of token ids to biases is needed"
        )
    for token, bias in by_token.items():
        ids = _ids("logit_bias", (token,), vocab_size)
        found[ids] = found.get(ids, 0.0) + _bias("logit_bias", token, bias)
    return tuple(found.items())


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"generate: {name} is or holds {value!r}; a list is needed")
    return value


def _ids(name: str, value: Any, vocab_size: int, beyond: Sequence[int] = ()) -> Tokens:
    ids = tuple(_sequence(name, value))
    if not ids:
        raise ValueError(f"generate: {name} holds an empty list; one token id or more is needed")
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise TypeError(f"generate: {name} holds {token!r}; token ids are needed")
        if not 0 <= token < vocab_size and token not in beyond:
            raise ValueError(
                f"generate: {name} holds {token}; token ids from 0 to {vocab_size - 1} are accepted"
            )
    return ids


def _bias(name: str, ids: Any, bias: Any) -> float:
    if not isinstance(bias, int | float) or isinstance(bias, bool):
        raise TypeError(f"generate: {name} gives {ids!r} {bias!r}; a number is needed")
    # Logits are fp32 when it is added.
    if bias != -float("inf") and not abs(bias) < 3e38:
        raise ValueError(f"generate: {name} gives {ids!r} {bias}; a finite number or -inf is needed")
    return float(bias)
