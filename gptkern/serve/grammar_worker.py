"""The process that tries grammars out, so that one that explodes can be stopped.

It reads lines of JSON: first the vocabulary, then one grammar a line; it answers each by a line: null where
the grammar is good, else what is wrong with it. It imports llguidance alone, and so begins at once.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llguidance

# Processor time that a grammar may take in all, beside what each token adds.
_SECONDS, _TOKEN_SECONDS = 0.25, 0.02
# Bytes of a mask that are not 0, and how many tokens are tried.
_ALLOWED = b"\xc8"
_TRIED_TOKENS = 3


class Budget:
    """The processor time that a grammar may take while text is made: everybody else's tokens wait for it."""

    def __init__(self) -> None:
        self._left = _SECONDS

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Count what is done in the block.

        Raises:
            ValueError: Nothing is left.
        """
        began = time.thread_time()
        yield
        self._left -= time.thread_time() - began
        if self._left < 0:
            raise ValueError(f"its tokens take more than {_TOKEN_SECONDS:g} s each; a simpler one is needed")

    def earn(self) -> None:
        """Add the time of one more token."""
        self._left = min(self._left + _TOKEN_SECONDS, _SECONDS)


class Vocabulary:
    """A model's tokens as llguidance takes them.

    Args:
        tokens: The bytes of each.
        special: Tokens that no text writes.
        end: The token that ends a text.
    """

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], end: int) -> None:
        self.tokens, self.special_token_ids = list(tokens), list(special)
        self.eos_token_id, self.bos_token_id = end, None
        barred = frozenset(special)
        self._ids = {text: token for token, text in enumerate(tokens) if text and token not in barred}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text that a grammar forces: the longest that fits, time after time.

        The text ends early where no token fits.
        """
        ids: list[int] = []
        place = 0
        while place < len(text):
            ends = range(min(place + self._longest, len(text)), place, -1)
            end = next((end for end in ends if text[place:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[text[place:end]])
            place = end
        return ids

    def tokenizer(self) -> Any:
        """llguidance's own form of it."""
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(self), n_vocab=len(self.tokens))

    def to_json(self) -> str:
        """A line from which ``from_json`` makes it again."""
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        return json.dumps([tokens, self.special_token_ids, self.eos_token_id])

    @classmethod
    def from_json(cls, line: str) -> Vocabulary:
        """The vocabulary that ``to_json`` wrote."""
        tokens, special, end = json.loads(line)
        return cls([base64.b64decode(token) for token in tokens], special, end)


def source_of(kind: str, text: str) -> str:
    """llguidance's form of a grammar.

    Args:
        kind: ``"json_schema"``, ``"regex"`` or ``"grammar"``.

    Raises:
        ValueError: A schema that is no JSON object.
    """
    if kind == "json_schema":
        # Free white space is what a small model loses itself in.
        compact: Any = {"whitespace_flexible": False}
        return str(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=compact))
    if kind == "regex":
        return str(llguidance.LLMatcher.grammar_from_regex(text))
    return str(llguidance.LLMatcher.grammar_from_lark(text))


def matcher_of(tokenizer: Any, source: str) -> Any:
    """A grammar at its beginning, in which no token may cost more than a fraction of a second."""
    limits = llguidance.LLParserLimits(step_lexer_fuel=20_000)
    return llguidance.LLMatcher(tokenizer, source, log_level=0, limits=limits)


def problem(tokenizer: Any, kind: str, text: str) -> str | None:
    """The reason why a grammar cannot be used; None where it can. Its first tokens are tried too."""
    try:
        source = source_of(kind, text)
    except ValueError as error:
        return str(error)
    matcher = matcher_of(tokenizer, source)
    budget = Budget()
    try:
        for _ in range(_TRIED_TOKENS):
            if matcher.is_error() or matcher.is_stopped():
                break
            with budget.spend():
                first = matcher.compute_logit_bias().find(_ALLOWED)
                if not matcher.is_error():
                    matcher.consume_token(first)
    except ValueError as error:
        return str(error)
    # What follows is llguidance's own state.
    return str(matcher.get_error()).partition("<state>")[0].strip() if matcher.is_error() else None


def main() -> None:
    """Answer until nobody asks any more."""
    tokenizer = Vocabulary.from_json(sys.stdin.readline()).tokenizer()
    for line in sys.stdin:
        print(json.dumps(problem(tokenizer, *json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
