"""The text of one row as it grows: no half characters, and nothing at or past a stop string.

``RowText`` keeps the text that is shown, ``PlainText`` where nothing stops it. ``StopWatch`` keeps none and
can be forked: beam search asks of each candidate whether it completes a stop string.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer
    from gptkern.tokenizer.streams import TokenStream


# Tokens of the prompt that decide how the first new one reads: half a character, a space between words.
_CONTEXT = 4
# Stands for an id without a token, whose text nobody knows: half of a surrogate pair, which no text holds.
_GAP = "\ud800"


class RowText:
    """Decodes one row's new tokens, watching for stop strings.

    Stop strings are looked for in the text with its special tokens, as in transformers; what is shown is
    the text without.

    Args:
        tokenizer: Of the model.
        stop_strings: Any of them ends the text just before it.
        prompt_ids: What came before: a stop string may begin there, and spacing may depend on it.

    Attributes:
        stopped: A stop string is complete.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str], prompt_ids: Sequence[int]) -> None:
        self._whole = tokenizer.stream()
        self._shown = tokenizer.stream(skip_special_tokens=True)
        self._has_token = tokenizer.has_token
        self._stop_strings = tuple(stop_strings)
        self.stopped = False
        self._settled: list[str] = []
        # How many of the settled pieces ``fresh`` has given.
        self._given = 0
        self._before = _opening(prompt_ids, self._stop_strings, lambda token: self._read(token)[0])
        # Text that is not settled, token by token: with special tokens, and as it is shown.
        self._held: list[tuple[str, str]] = []

    @property
    def text(self) -> str:
        """The text that is final so far, without a suffix that may be the beginning of a stop string."""
        return "".join(self._settled)

    def fresh(self) -> str:
        """The text that has become final since the last call."""
        fresh = "".join(self._settled[self._given :])
        self._given = len(self._settled)
        return fresh

    def push(self, token: int, *, hidden: bool = False) -> None:
        """Take the row's next token; a hidden one is no part of the text, but may complete a stop string."""
        whole, shown = self._read(token)
        self._grow(whole, "" if hidden else shown)

    def end(self) -> None:
        """No more tokens come: what was held back is text after all."""
        self._grow(self._whole.finish(), self._shown.finish())
        if not self.stopped:
            self._settled += [shown for _, shown in self._held]
        self._held = []

    def _read(self, token: int) -> tuple[str, str]:
        return _piece(self._whole, token, self._has_token), self._shown.push(token)

    def _grow(self, whole: str, shown: str) -> None:
        if self.stopped:
            return
        self._held.append((whole, shown))
        before = self._before
        pending = before + "".join(part for part, _ in self._held)
        start = _first_stop(pending, len(before), self._stop_strings)
        if start is not None:
            self.stopped = True
            self._settle(start - len(before))
            self._held = []
            return
        keep = max((_overlap(pending, s) for s in self._stop_strings), default=0)
        settled = len(pending) - keep - len(before)
        if settled >= 0:
            self._before = ""
            self._settle(settled)

    def _settle(self, end: int) -> None:
        """Move what is shown of the first ``end`` characters that are held into the text."""
        while self._held and len(self._held[0][0]) <= end:
            whole, shown = self._held.pop(0)
            self._settled.append(shown)
            end -= len(whole)
        if self._held and end > 0:
            whole, shown = self._held[0]
            # The two agree from their ends on; where they differ, a special token came before.
            begun = max(len(shown) - (len(whole) - end), 0)
            self._settled.append(shown[:begun])
            self._held[0] = whole[end:], shown[begun:]


class PlainText:
    """``RowText`` where there are no stop strings, at a third of the cost: only half characters wait.

    Args:
        tokenizer: Of the model.
        prompt_ids: What came before: spacing may depend on it.
    """

    stopped = False

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._shown = tokenizer.stream(skip_special_tokens=True)
        for token in prompt_ids[-_CONTEXT:]:
            self._shown.push(token)
        self._fresh = ""

    def push(self, token: int, *, hidden: bool = False) -> None:
        """Take the row's next token; a hidden one is no part of the text."""
        text = self._shown.push(token)
        if not hidden:
            self._fresh += text

    def end(self) -> None:
        """No more tokens come: half a character is text after all."""
        self._fresh += self._shown.finish()

    def fresh(self) -> str:
        """The text that has become final since the last call."""
        fresh, self._fresh = self._fresh, ""
        return fresh


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class StopWatch:
    """A check whether one row's new text completes a stop string, as ``RowText.stopped``, and no more."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str], prompt_ids: Sequence[int]) -> None:
        self._stream = tokenizer.stream()
        self._has_token = tokenizer.has_token
        self._stop_strings = tuple(stop_strings)
        self._longest = max(map(len, self._stop_strings))
        # The latest characters, in which a stop string may have begun.
        self._tail = _opening(prompt_ids, self._stop_strings, self._read)
        self.stopped = False

    def push(self, token: int) -> None:
        """Take the row's next token."""
        text = self._tail + self._read(token)
        self.stopped |= _first_stop(text, len(self._tail), self._stop_strings) is not None
        self._tail = text[max(len(text) - self._longest + 1, 0) :]

    def fork(self) -> StopWatch:
        """A copy that goes on by itself."""
        twin = copy.copy(self)
        twin._stream = self._stream.fork()
        return twin

    def _read(self, token: int) -> str:
        return _piece(self._stream, token, self._has_token)


def _piece(stream: TokenStream, token: int, has_token: Callable[[int], bool]) -> str:
    text = stream.push(token)
    return text if has_token(token) else text + _GAP


def _opening(prompt_ids: Sequence[int], stop_strings: Sequence[str], read: Callable[[int], str]) -> str:
    """The prompt's last characters, in which a stop string may begin; ``read`` is told of their tokens."""
    # A match that ends in new text has at most so many characters, of at most 4 tokens each, before it.
    longest = max(map(len, stop_strings), default=1) - 1
    before = "".join(map(read, prompt_ids[-4 * longest - _CONTEXT :]))
    return before[max(len(before) - longest, 0) :]


def _first_stop(text: str, old: int, stop_strings: Sequence[str]) -> int | None:
    """The beginning of the first stop string that ends behind the first ``old`` characters of ``text``."""
    places = [text.find(s, max(0, old - len(s) + 1)) for s in stop_strings]
    return min((place for place in places if place >= 0), default=None)
