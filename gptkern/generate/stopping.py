"""The text of one row as it grows: no half characters, and nothing at or past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer


# Tokens of the prompt that decide how the first new one reads: half a character, a space between words.
_CONTEXT = 4


class RowText:
    """Decodes one row's new tokens, watching for stop strings.

    Args:
        tokenizer: Of the model.
        stop_strings: Any of them ends the text just before it.
        prompt_ids: What came before: a stop string may begin there, and spacing may depend on it.

    Attributes:
        text: What is settled so far. A suffix that may be the beginning of a stop string is held back.
        stopped: A stop string is complete.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str], prompt_ids: Sequence[int]) -> None:
        self._stream = tokenizer.stream(skip_special_tokens=True)
        self._stop_strings = tuple(stop_strings)
        # A match that ends in new text has at most so many characters, of at most 4 tokens each, before it.
        longest = max(map(len, stop_strings), default=1) - 1
        before = "".join(self._stream.push(token) for token in prompt_ids[-4 * longest - _CONTEXT :])
        self._before = before[max(len(before) - longest, 0) :]
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> None:
        """Take the row's next token."""
        self._grow(self._stream.push(token))

    def end(self) -> None:
        """No more tokens come: what was held back is text after all."""
        self._grow(self._stream.finish())
        if not self.stopped:
            self.text += self._held
        self._held = ""

    def _grow(self, piece: str) -> None:
        if self.stopped or not piece:
            return
        # Only text that is not settled yet, and the prompt's end while nothing is, can begin a match.
        before = "" if self.text else self._before
        pending = before + self._held + piece
        # A match that ends inside the prompt was there before: it stops nothing.
        found = [pending.find(s, max(0, len(before) - len(s) + 1)) for s in self._stop_strings]
        if any(at >= 0 for at in found):
            self.stopped = True
            self.text += pending[len(before) : max(min(at for at in found if at >= 0), len(before))]
            self._held = ""
            return
        keep = max((_overlap(pending, s) for s in self._stop_strings), default=0)
        settled = max(len(pending) - keep, len(before))
        self.text += pending[len(before) : settled]
        self._held = pending[settled:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
