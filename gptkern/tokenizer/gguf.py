"""The tokenizer of a GGUF file: byte-level BPE under llama.cpp's names of splits, or SentencePiece's BPE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from gptkern.checkpoint.errors import CheckpointError, shown
from gptkern.checkpoint.gguf_file import GGUFFile
from gptkern.tokenizer.folder import GENERIC, Parts, add_begin_and_end
from gptkern.tokenizer.library import library_errors

_PREFIX = "tokenizer.ggml"
# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER = 2, 3, 4
_SPACE = "▁"

# The splits of texts into words, as the models' own tokenizer.json have them.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"


def _gpt2_split() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _digits_split() -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Digits(individual_digits=True), *_gpt2_split()]


def _regex_split(digits: str) -> Callable[[], list[pre_tokenizers.PreTokenizer]]:
    pattern = Regex(_CONTRACTIONS + _WORDS % digits)
    return lambda: [
        pre_tokenizers.Split(pattern, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


_LLAMA3 = ("llama3", "llama-v3", "llama-bpe")
_SPLITS = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2", "mpt"), _gpt2_split),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _digits_split),
    **dict.fromkeys(_LLAMA3, _regex_split("{1,3}")),
    "qwen2": _regex_split(""),
}


def read(file: GGUFFile) -> Parts | None:
    """The tokenizer of a GGUF file; None where it holds none.

    Raises:
        CheckpointError: It is damaged, of a kind or with a split into words that is not served.
    """
    kind = file.fields.get(f"{_PREFIX}.model")
    if kind is None or kind == "none":
        return None
    if kind not in ("gpt2", "llama"):
        raise _refused(file, "model", "gpt2 (byte-level BPE) and llama (SentencePiece BPE) are served")
    tokens = _texts(file, "tokens")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise CheckpointError(f"{file.path}: {_PREFIX}.tokens: a text is in it twice")
    names = _special(file, tokens)
    with library_errors(f"{file.path}: {_PREFIX}"):
        backend = _byte_level(file, vocab) if kind == "gpt2" else _sentence_piece(file, vocab, names)
        backend.add_tokens(_added(file, tokens))
        # Without a word of the file, Llama's texts have a beginning.
        llama = kind == "llama" or file.fields.get(f"{_PREFIX}.pre") in _LLAMA3
        add_begin_and_end(
            backend,
            names["bos_token"] if _switch(file, "add_bos_token", llama) else None,
            names["eos_token"] if _switch(file, "add_eos_token", False) else None,
        )
    configuration = {"tokenizer_class": GENERIC, "clean_up_tokenization_spaces": False, **names}
    template = file.fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise CheckpointError(f"{file.path}: tokenizer.chat_template is {shown(template)}; text is needed")
    return Parts(backend, configuration, names, template)


def _refused(file: GGUFFile, name: str, needed: str) -> CheckpointError:
    value = file.fields.get(f"{_PREFIX}.{name}")
    return CheckpointError(f"{file.path}: {_PREFIX}.{name} is {shown(value)}; {needed}")


def _texts(file: GGUFFile, name: str) -> list[str]:
    values = file.fields.get(f"{_PREFIX}.{name}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _refused(file, name, "a list of texts is needed")
    return values


def _numbers(file: GGUFFile, name: str, count: int) -> list[float]:
    values = file.fields.get(f"{_PREFIX}.{name}")
    if not isinstance(values, list) or len(values) != count or isinstance((values or [0])[0], str):
        raise _refused(file, name, f"{count} numbers, one for each token, are needed")
    return values


def _switch(file: GGUFFile, name: str, default: bool) -> bool:
    value = file.fields.get(f"{_PREFIX}.{name}", default)
    if not isinstance(value, bool):
        raise _refused(file, name, "true or false is needed")
    return value


def _special(file: GGUFFile, tokens: list[str]) -> dict[str, str | None]:
    """The texts of special tokens by transformers' names."""
    names: dict[str, str | None] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id: Any = file.fields.get(f"{_PREFIX}.{theirs}_token_id")
        if token_id is None:
            names[f"{ours}_token"] = None
            continue
        if type(token_id) is not int or not 0 <= token_id < len(tokens):
            raise _refused(file, f"{theirs}_token_id", f"an id of one of {len(tokens)} tokens is needed")
        names[f"{ours}_token"] = tokens[token_id]
    return names


def _added(file: GGUFFile, tokens: list[str]) -> list[AddedToken]:
    """Tokens that are found in texts as they stand; control tokens are special."""
    if f"{_PREFIX}.token_type" not in file.fields:
        return []
    kinds = _numbers(file, "token_type", len(tokens))
    return [
        AddedToken(token, special=kind != _USER, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER)
    ]


def _byte_level(file: GGUFFile, vocab: dict[str, int]) -> tokenizers.Tokenizer:
    split = file.fields.get(f"{_PREFIX}.pre", "gpt-2")
    if split not in tuple(_SPLITS):
        raise _refused(file, "pre", f"served are {', '.join(_SPLITS)}: name a tokenizer")
    merges = []
    for line in _texts(file, "merges"):
        left, space, right = line.partition(" ")
        if not (left and space and right) or " " in right:
            raise CheckpointError(
                f"{file.path}: {_PREFIX}.merges: two tokens with a space between them are needed, "
                f"{shown(line)} found"
            )
        merges.append((left, right))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split in _LLAMA3))
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    parts = _SPLITS[split]()
    backend.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(
    file: GGUFFile, vocab: dict[str, int], names: dict[str, str | None]
) -> tokenizers.Tokenizer:
    """Llama's: pairs merge in the order of their results' scores, and what has no token becomes bytes."""
    scores = _numbers(file, "scores", len(vocab))
    ranked = []
    for token, token_id in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[token_id], vocab[left], vocab[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = names["unk_token"]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", _SPACE)
    begins = _switch(file, "add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if begins else spaces
    ends = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*ends, decoders.Strip(" ", 1, 0)] if begins else ends)
    return backend
