"""The text of one row as it grows: no half characters, and nothing at or past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer


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
        text: What is settled so far. A suffix that may be the beginning of a stop string is held back.
        stopped: A stop string is complete.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str], prompt_ids: Sequence[int]) -> None:
        self._whole = tokenizer.stream()
        self._shown = tokenizer.stream(skip_special_tokens=True)
        self._has_token = tokenizer.has_token
        self._stop_strings = tuple(stop_strings)
        self.text = ""
        self.stopped = False
        # A match that ends in new text has at most so many characters, of at most 4 tokens each, before it.
        longest = max(map(len, stop_strings), default=1) - 1
        before = "".join(self._read(token)[0] for token in prompt_ids[-4 * longest - _CONTEXT :])
        self._before = before[max(len(before) - longest, 0) :]
        # Text that is not settled, token by token: with special tokens, and as it is shown.
        self._held: list[tuple[str, str]] = []

    def push(self, token: int, *, hidden: bool = False) -> None:
        """Take the row's next token; a hidden one is no part of the text, but may complete a stop string."""
        whole, shown = self._read(token)
        self._grow(whole, "" if hidden else shown)

    def end(self) -> None:
        """No more tokens come: what was held back is text after all."""
        self._grow(self._whole.finish(), self._shown.finish())
        if not self.stopped:
            self.text += "".join(shown for _, shown in self._held)
        self._held = []

    def _read(self, token: int) -> tuple[str, str]:
        whole, shown = self._whole.push(token), self._shown.push(token)
        return whole if self._has_token(token) else whole + _GAP, shown

    def _grow(self, whole: str, shown: str) -> None:
        if self.stopped:
            return
        self._held.append((whole, shown))
        before = self._before
        pending = before + "".join(part for part, _ in self._held)
        # A match that ends inside the prompt was there before: it stops nothing.
        found = [pending.find(s, max(0, len(before) - len(s) + 1)) for s in self._stop_strings]
        starts = [at for at in found if at >= 0]
        if starts:
            self.stopped = True
            self._settle(min(starts) - len(before))
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
            self.text += shown
            end -= len(whole)
        if self._held and end > 0:
            whole, shown = self._held[0]
            # The two agree from their ends on; where they differ, a special token came before.
            begun = max(len(shown) - (len(whole) - end), 0)
            self.text += shown[:begun]
            self._held[0] = whole[end:], shown[begun:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
