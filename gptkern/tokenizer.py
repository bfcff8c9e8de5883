"""Text to token ids and back: GPT-2's byte-level BPE, GPT-1's BPE, plain bytes, any ``tokenizer.json``."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gptkern.checkpoint.errors import CheckpointError
from gptkern.checkpoint.locate import EMBEDDED, locate
from gptkern.checkpoint.pending import Files, read
from gptkern.durable import make_folder, named_folder, write_file

_JSON, _VOCAB, _MERGES = "tokenizer.json", "vocab.json", "merges.txt"
_CONFIG, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_END_OF_TEXT, _END_OF_WORD, _UNKNOWN = "<|endoftext|>", "</w>", "<unk>"
_REPLACEMENT = "\ufffd"


class TokenStream(Protocol):
    """Text as tokens arrive: everything pushed and finished, put together, is ``decode`` of all the ids."""

    def push(self, token_id: int) -> str:
        """The text that is certain now: never half a character, so it may be empty."""
        ...

    def finish(self) -> str:
        """The rest, after the last token."""
        ...


class Tokenizer:
    """Text to ids and back.

    Args:
        backend: A tokenizer of the ``tokenizers`` library. It never truncates or pads here.
        bos_token, eos_token: Its special tokens, by text; None where it has none.

    Raises:
        CheckpointError: ``bos_token`` or ``eos_token`` is not in its vocabulary.
    """

    # what ``save`` writes, and what it takes the place of
    files = (_JSON, _CONFIG, _SPECIAL, _VOCAB, _MERGES, "added_tokens.json")

    def __init__(
        self, backend: tokenizers.Tokenizer, *, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_token, self.eos_token = bos_token, eos_token
        self.bos_token_id = self._special_id("bos_token", bos_token)
        self.eos_token_id = self._special_id("eos_token", eos_token)

    def _special_id(self, name: str, token: str | None) -> int | None:
        token_id = None if token is None else self._backend.token_to_id(token)
        if token is not None and token_id is None:
            raise CheckpointError(f"Tokenizer: {name} is {token!r}, which is not in its vocabulary")
        return token_id

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path = EMBEDDED,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Tokenizer:
        """Read ``tokenizer.json``, or ``vocab.json`` and ``merges.txt`` of GPT-2 or GPT-1.

        Args:
            path_or_hub_id: The folder, a ``tokenizer.json`` itself, a hub id, or ``"embedded"``.
            revision, local_files_only: As in ``GPT.from_pretrained``.

        Raises:
            CheckpointError: There is none, or it cannot be read.
        """
        path = locate(path_or_hub_id, revision=revision, local_files_only=local_files_only, weights=False)
        tokenizer = cls.find(path) if path.is_dir() else _read_json_file(path, Files(path.parent, {}))
        if tokenizer is None:
            raise CheckpointError(f"{path}: no tokenizer here; {_JSON}, or {_VOCAB} and {_MERGES}, is needed")
        return tokenizer

    @classmethod
    def find(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer in a folder; None where there is none.

        Raises:
            CheckpointError: There is one and it cannot be read.
        """
        return read(folder, _find)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """256 tokens, one a byte of UTF-8, each id its byte's value: any text works."""
        vocab = {char: byte for byte, char in enumerate(_byte_chars())}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return cls(backend)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def special_tokens(self) -> dict[str, int]:
        """Texts and ids of the tokens that ``skip_special_tokens`` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``. Special tokens written out in it become their ids, as in transformers.

        Raises:
            TypeError: ``text`` is not a str.
            ValueError: ``text`` has half of a surrogate pair, which no encoding can express.
        """
        if not isinstance(text, str):
            raise TypeError(f"Tokenizer.encode: text is {type(text).__name__}; a str is needed")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Tokenizer.encode: text is not valid Unicode: {error}") from error
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD, ids without a token (padding) nothing.

        Raises:
            ValueError: A negative id.
        """
        ids = [_checked(token_id) for token_id in ids]
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def has_token(self, token_id: int) -> bool:
        """Whether an id stands for a token; those of a model's padded rows do not."""
        return self._backend.id_to_token(token_id) is not None

    def stream(self, *, skip_special_tokens: bool = False) -> TokenStream:
        """A decoder of one sequence, token by token, at a cost that does not grow with the sequence."""
        skipped = frozenset(self.special_tokens.values()) if skip_special_tokens else frozenset()
        decoder = self._backend.decoder
        if isinstance(decoder, decoders.ByteLevel):
            return _ByteStream(self._backend, skipped)
        if isinstance(decoder, decoders.BPEDecoder):
            return _WordStream(self._backend, skipped, decoder.suffix)
        return _WindowStream(self._backend, skipped)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers' AutoTokenizer opens."""
        folder = named_folder("Tokenizer.save", folder)
        make_folder(folder)
        write_file(folder / _JSON, self._backend.to_str(pretty=True))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
        write_file(folder / _CONFIG, json.dumps(config, indent=2) + "\n")


def _find(files: Files) -> Tokenizer | None:
    if (files / _JSON).is_file():
        return _read_json_file(files / _JSON, files)
    if (files / _VOCAB).is_file() and (files / _MERGES).is_file():
        return _with_special_tokens(_read_bpe(files / _VOCAB, files / _MERGES), files)
    return None


def _checked(token_id: int) -> int:
    if token_id < 0:
        raise ValueError(f"Tokenizer: token id {token_id} found; 0 or more is needed")
    return int(token_id)


class _ByteStream:
    """Byte-level BPE: tokens are bytes, and an incremental UTF-8 decoder holds back what is incomplete."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int]) -> None:
        self._backend, self._skipped = backend, skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        token = self._backend.id_to_token(_checked(token_id))
        if token is None or token_id in self._skipped:
            return ""
        return self._utf8.decode(_token_bytes(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WordStream:
    """BPE with an end-of-word mark: a space where another token follows, nothing at the end."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped: frozenset[int], suffix: str) -> None:
        self._backend, self._skipped, self._suffix = backend, skipped, suffix
        self._marked: list[str] = []

    def push(self, token_id: int) -> str:
        token = self._backend.id_to_token(_checked(token_id))
        if token is None or token_id in self._skipped:
            return ""
        before = "".join(" " + part for part in self._marked)
        certain, *self._marked = token.split(self._suffix)
        return before + certain

    def finish(self) -> str:
        rest, self._marked = "".join(self._marked), []
        return rest


class _WindowStream:
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
        if _checked(token_id) in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._backend.decode(self._window, skip_special_tokens=False)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._take(text)

    def finish(self) -> str:
        return self._take(self._backend.decode(self._window, skip_special_tokens=False))

    def _take(self, text: str) -> str:
        before = self._backend.decode(self._window[: self._known], skip_special_tokens=False)
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return text[len(before) :]


@lru_cache(maxsize=1)
def _byte_chars() -> str:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019, encoder.py).

    Printable Latin-1 stands for itself; the rest, in order, for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


@lru_cache(maxsize=1)
def _char_bytes() -> dict[str, int]:
    return {char: byte for byte, char in enumerate(_byte_chars())}


def _token_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; an added token with other characters stands for itself."""
    table = _char_bytes()
    if all(char in table for char in token):
        return bytes(table[char] for char in token)
    return token.encode()


def _read_json_file(path: Path, files: Files) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # the library raises bare Exception
    except Exception as error:
        raise CheckpointError(f"{path}: not a tokenizer, or truncated: {error}") from error
    return _with_special_tokens(backend, files)


def _with_special_tokens(backend: tokenizers.Tokenizer, files: Files) -> Tokenizer:
    """The begin and end tokens that the folder's configuration names, else GPT-2's where it is there."""
    named: dict[str, str | None] = {}
    for path in (files / _SPECIAL, files / _CONFIG):
        if path.is_file():
            named |= _named_tokens(path)
    if not named and backend.token_to_id(_END_OF_TEXT) is not None:
        named = {"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT}
    try:
        return Tokenizer(backend, **named)
    except CheckpointError as error:
        raise CheckpointError(f"{files.folder}: {error}") from error


def _named_tokens(path: Path) -> dict[str, str | None]:
    """``bos_token`` and ``eos_token``, each a string or an object with its content."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        named = {name: config[name] for name in ("bos_token", "eos_token") if name in config}
        return {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a tokenizer's configuration, or truncated: {error!r}") from error


def _read_bpe(vocab_path: Path, merges_path: Path) -> tokenizers.Tokenizer:
    """GPT-1's tokenizer where the vocabulary marks ends of words, else GPT-2's."""
    try:
        vocab, merges = models.BPE.read_file(str(vocab_path), str(merges_path))
        if any(token.endswith(_END_OF_WORD) for token in vocab):
            return _gpt1_bpe(vocab, merges)
        return _gpt2_bpe(vocab, merges)
    # the library raises bare Exception
    except Exception as error:
        raise CheckpointError(
            f"{vocab_path}, {merges_path.name}: not a BPE vocabulary and its merges: {error}"
        ) from error


def _gpt2_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if _END_OF_TEXT in vocab:
        backend.add_special_tokens([_END_OF_TEXT])
    return backend


def _gpt1_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Lower-cased, accents stripped, split at spaces and punctuation as BERT does (as in transformers)."""
    unknown = _UNKNOWN if _UNKNOWN in vocab else None
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab, merges=merges, unk_token=unknown, end_of_word_suffix=_END_OF_WORD, fuse_unk=False
        )
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix=_END_OF_WORD)
    if unknown is not None:
        backend.add_special_tokens([unknown])
    return backend
