"""The text that tokens stand for: each by itself, a sequence as it comes, and what no token can express."""

from __future__ import annotations

import re
from functools import cached_property

import tokenizers
from tokenizers import decoders, models

from gptkern.tokenizer.streams import (
    ByteStream,
    TokenStream,
    WindowStream,
    WordStream,
    bytes_of_token,
    checked_id,
)

# sentencepiece's mark of a space, and its tokens of one byte
_SPACE = "\u2581"
_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Pieces:
    """The tokens of a backend as pieces of text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def token_bytes(self, token_id: int) -> bytes:
        """See ``Tokenizer.token_bytes``."""
        token = self._backend.id_to_token(checked_id(token_id))
        if token is None:
            return b""
        decoder = self._backend.decoder
        if isinstance(decoder, decoders.ByteLevel):
            return bytes_of_token(token)
        if isinstance(decoder, decoders.BPEDecoder):
            return token.replace(decoder.suffix, " ").encode()
        if (byte := _FALLBACK_BYTE.fullmatch(token)) is not None and self._decodes_by("ByteFallback"):
            return bytes([int(byte[1], 16)])
        return (token.replace(_SPACE, " ") if self._decodes_by(_SPACE) else token).encode()

    def stream(self, skipped: frozenset[int]) -> TokenStream:
        """See ``Tokenizer.stream``; ``skipped`` are ids that have no text."""
        decoder = self._backend.decoder
        if isinstance(decoder, decoders.ByteLevel):
            return ByteStream(self._backend, skipped)
        if isinstance(decoder, decoders.BPEDecoder):
            return WordStream(self._backend, skipped, decoder.suffix)
        return WindowStream(self._backend, skipped)

    def lost(self, text: str) -> list[str]:
        """The characters of a text that would vanish when it is encoded, sorted."""
        if self._known is None or self._known.issuperset(text):
            return []
        # Added tokens may hold characters that are no tokens themselves.
        for added in self._backend.get_added_tokens_decoder().values():
            text = text.replace(added.content, "")
        return sorted(set(text) - self._known)

    @cached_property
    def _known(self) -> frozenset[str] | None:
        """The characters that have a token, where others would vanish; None where all become tokens."""
        model = self._backend.model
        loses = isinstance(model, models.BPE) and model.unk_token is None and not model.byte_fallback
        if not loses or self._backend.pre_tokenizer is not None or self._backend.normalizer is not None:
            return None
        return frozenset(
            token for token in self._backend.get_vocab(with_added_tokens=False) if len(token) == 1
        )

    def _decodes_by(self, part: str) -> bool:
        """True if the decoder has a part of that name, or with that character."""
        return part in self._decoder_state

    @cached_property
    def _decoder_state(self) -> str:
        decoder = self._backend.decoder
        return "" if decoder is None else decoder.__getstate__().decode()
