"""Decoding token by token, at a cost that does not grow with the sequence."""

from __future__ import annotations

import codecs
from functools import lru_cache
from typing import Protocol

import tokenizers

from gptkern.tokenizer.library import library_errors

_REPLACEMENT = "\ufffd"


class TokenStream(Protocol):
    """Text as tokens arrive: everything pushed and finished, put together, is ``decode`` of all the ids."""

    def push(self, token_id: int) -> str:
        """The text that is certain now: never half a character, so it may be empty."""
        ...

    def finish(self) -> str:
        """The rest, after the last token."""
        ...

    def fork(self) -> TokenStream:
        """A copy that goes on by itself."""
        ...


def checked_id(token_id: int) -> int:
    """A token id.

    Raises:
        ValueError: It is negative, or beyond 32 bits.
    """
    if not 0 <= token_id < 1 << 32:
        raise ValueError(f"Tokenizer: token id {token_id} found; 0 or more is needed")
    return int(token_id)


class ByteStream:
    """Byte-level BPE: tokens are bytes, and an incremental UTF-8 decoder holds back what is incomplete."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        self._backend, self._skipped = backend, skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        token = self._backend.id_to_token(checked_id(token_id))
        if token is None or token_id in self._skipped:
            return ""
        return self._utf8.decode(bytes_of_token(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def fork(self) -> ByteStream:
        twin = ByteStream(self._backend, self._skipped)
        twin._utf8.setstate(self._utf8.getstate())
        return twin


class WordStream:
    """BPE with an end-of-word mark: a space where another token follows, nothing at the end."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int], suffix: str) -> None:
        self._backend, self._skipped, self._suffix = backend, skipped, suffix
        self._marked: list[str] = []

    def push(self, token_id: int) -> str:
        token = self._backend.id_to_token(checked_id(token_id))
        if token is None or token_id in self._skipped:
            return ""
        before = "".join(" " + part for part in self._marked)
        certain, *self._marked = token.split(self._suffix)
        return before + certain

    def finish(self) -> str:
        rest, self._marked = "".join(self._marked), []
        return rest

    def fork(self) -> WordStream:
        twin = WordStream(self._backend, self._skipped, self._suffix)
        twin._marked = self._marked.copy()
        return twin


class WindowStream:
    """Any other decoder: decode the last few tokens with and without the new one, and take the difference.

    The window begins where the text last ended in a whole character, so it stays a few tokens long.
    Exact for decoders that look at neighbours only. ByteFallback looks further where bytes are no
    UTF-8: one bad byte spoils the whole run of byte tokens, and what was good of it has been shown.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        self._backend, self._skipped = backend, skipped
        self._window: list[int] = []
        self._known = 0

    def push(self, token_id: int) -> str:
        if checked_id(token_id) in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._take(text)

    def finish(self) -> str:
        return self._take(self._decode(self._window))

    def fork(self) -> WindowStream:
        twin = WindowStream(self._backend, self._skipped)
        twin._window, twin._known = self._window.copy(), self._known
        return twin

    def _take(self, text: str) -> str:
        before = self._decode(self._window[: self._known])
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        with library_errors("Tokenizer.stream: this tokenizer cannot decode the ids"):
            text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text


@lru_cache(maxsize=1)
def byte_chars() -> str:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019, encoder.py).

    Printable Latin-1 stands for itself; the rest, in order, for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


@lru_cache(maxsize=1)
def _char_bytes() -> dict[str, int]:
    return {char: byte for byte, char in enumerate(byte_chars())}


def bytes_of_token(token: str) -> bytes:
    """The bytes a byte-level token stands for; an added token with other characters stands for itself."""
    table = _char_bytes()
    if all(char in table for char in token):
        return bytes(table[char] for char in token)
    return token.encode()
