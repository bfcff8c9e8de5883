"""Text to token files: tokenisers by name, tokenising in parallel, token shards on disk."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptkern.checkpoint.files import LARGEST_JSON, read_bytes
from gptkern.checkpoint.replace import replacing, settle
from gptkern.durable import NewFile
from gptkern.tokenizer import Tokenizer
from gptkern.train.errors import SettingsError
from gptkern.train.settings import DataSettings

# llm.c's headers, by their first number, and the width of the ids that follow
_LLMC_DTYPES: dict[int, np.dtype[Any]] = {20240520: np.dtype(np.uint16), 20240801: np.dtype(np.uint32)}
_LLMC_HEADER_BYTES = 1024
_CHECKED_AT_ONCE = 1 << 26  # ids
_PIECE_CHARACTERS = 1 << 20
# A single line break between two words: no byte-level BPE joins tokens across it.
_CUT = re.compile(r"(?<=\S)\n(?=\S)")
# Before a single space, for tokenizers that put one before texts that have none: a piece needs no other.
_CUT_AT_SPACE = re.compile(r"(?<=\S)(?= \S)")

_worker_tokenizer: Tokenizer


def char_tokenizer(text: str) -> Tokenizer:
    """One token a character that occurs in ``text``, ids in the order of code points, as in nanoGPT."""
    return Tokenizer.characters({character: i for i, character in enumerate(sorted(set(text)))})


def pieces(text: str, size: int = _PIECE_CHARACTERS, *, at_spaces: bool = False) -> list[str]:
    """``text`` in pieces of about ``size`` characters that tokenise to the same tokens as the whole."""
    found, start = [], 0
    places = _CUT_AT_SPACE if at_spaces else _CUT
    while len(text) - start > size:
        cut = places.search(text, start + size)
        if cut is None:
            break
        found.append(text[start : cut.end()])
        start = cut.end()
    return [*found, text[start:]]


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    # One thread a process: the pool is the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = tokenizer


def _encode(piece: str) -> list[int]:
    return _worker_tokenizer.encode(piece, add_special_tokens=False)


def encode_all(tokenizer: Tokenizer, texts: Sequence[str], workers: int) -> Iterator[list[int]]:
    """Ids of each piece of text, in order, made by ``workers`` processes (0: one a core)."""
    from rich.progress import track

    total = sum(map(len, texts))
    workers = min(workers or len(os.sched_getaffinity(0)), len(texts))
    if workers <= 1 or total < 2 * _PIECE_CHARACTERS:
        yield from (tokenizer.encode(text, add_special_tokens=False) for text in texts)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_worker, (tokenizer,)) as pool:
        encoded: Iterable[list[int]] = pool.imap(
            _encode, texts, chunksize=max(1, len(texts) // (64 * workers))
        )
        yield from track(encoded, description="tokenising", total=len(texts), transient=True)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest of uint16 (nanoGPT's) and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def write_tokens(file: NewFile, encoded: Iterable[list[int]], dtype: np.dtype[Any]) -> int:
    """Append every list of ids; returns how many tokens there are."""
    count = 0
    for ids in encoded:
        file.write(np.asarray(ids, dtype=dtype).data)
        count += len(ids)
    return count


def read_tokens(path: Path, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """A token file, memory-mapped: nanoGPT's (ids alone, of ``dtype``) or llm.c's (a header says the dtype).

    Raises:
        SettingsError: It cannot be read, is not as long as its header says, or holds wider ids.
    """
    try:
        with path.open("rb") as file:
            header = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4")
        found = _LLMC_DTYPES.get(int(header[0]))
        offset = 0 if found is None else _LLMC_HEADER_BYTES
        width = dtype if found is None else found
        tokens: np.ndarray[Any, Any] = np.memmap(path, dtype=width, mode="r", offset=offset)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: not a token file: {error}") from error
    if found is not None and len(tokens) != header[2]:
        raise SettingsError(f"{path}: its header says {header[2]:,} tokens, it holds {len(tokens):,}")
    head = tokens[:4096]
    if found is None and len(head) >= 16 and head.any() and not head[1::2].any():
        raise SettingsError(
            f"{path}: every second number is 0: these look like ids of more than {8 * dtype.itemsize} bits; "
            f"for this vocabulary {dtype} is needed"
        )
    return tokens


def check_ids(shards: Sequence[np.ndarray[Any, Any]], vocab_size: int) -> None:
    """Look through token files for ids that a model of ``vocab_size`` has no embedding of.

    Raises:
        SettingsError: There is one; the message names the file, the id and its place.
    """
    from rich.progress import track

    parts = [
        (shard, start) for shard in shards for start in range(0, len(shard), _CHECKED_AT_ONCE)
    ]  # fmt: skip
    for shard, start in track(
        parts, description="checking token ids", transient=True, disable=len(parts) < 2 * len(shards) + 8
    ):
        part = shard[start : start + _CHECKED_AT_ONCE]
        if int(part.max()) >= vocab_size:
            first = int((part >= vocab_size).argmax())
            raise SettingsError(
                f"{getattr(shard, 'filename', 'tokens')}: token {start + first:,} is {int(part[first])}, "
                f"beyond the model's vocabulary of {vocab_size}: it was written with another tokenizer, "
                "or with ids of another width"
            )


@dataclass(frozen=True)
class TokenSplit:
    """Training and held-out tokens, one array a shard, and the tokenizer where there is one."""

    train: list[np.ndarray[Any, Any]]
    val: list[np.ndarray[Any, Any]]
    tokenizer: Tokenizer | None


def read_text(paths: Sequence[str], what: str) -> str:
    """The files' text, end to end."""
    if not paths:
        raise SettingsError(f"[data] {what} is empty: name a file, in the configuration or by --data")
    # Line breaks of other systems become \n, as in every file that Python opens as text.
    return "".join(
        _decoded(path, what).replace("\r\n", "\n").replace("\r", "\n") for path in paths
    )  # fmt: skip


def _decoded(path: str, what: str) -> str:
    """A file's text, without the byte order mark that some editors put before it."""
    try:
        return Path(path).read_bytes().decode().removeprefix("\ufeff")
    except OSError as error:
        raise SettingsError(f"[data] {what}: {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at offset {error.start:,}"
        raise SettingsError(f"[data] {what}: {path}: not UTF-8: {byte}") from error


def read_jsonl(
    paths: Sequence[str], texts: Sequence[str], what: str, label: str | None = None
) -> list[dict[str, Any]]:
    """The objects of JSONL files, one a line.

    Args:
        paths: The files.
        texts: Keys that every object must have, each with a string.
        what: The setting that names the files, for messages.
        label: A key that every object must have, with a string, a number or a truth value.

    Raises:
        SettingsError: A file cannot be read, or a line is no such object; the message names file and line.
    """
    if not paths:
        read_text(paths, what)
    rows = []
    for path in paths:
        # Other marks that end a line (U+2028, U+0085, ...) may stand inside a JSON string.
        for number, line in enumerate(_decoded(path, what).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SettingsError(f"{path}:{number}: not JSON: {error}") from error
            for key in (*texts, *([label] if label else [])):
                _check_field(f"{path}:{number}", row, key, (str,) if key in texts else (str, int, float))
            rows.append(row)
    return rows


def _check_field(where: str, row: Any, key: str, kinds: tuple[type, ...]) -> None:
    if not isinstance(row, dict) or key not in row:
        raise SettingsError(f"{where}: no {key!r} in it")
    value = row[key]
    if not isinstance(value, kinds):
        needed = "a string" if kinds == (str,) else "a string or a number"
        raise SettingsError(f"{where}: {key!r} is {_json_type(value)}; {needed} is needed")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            lone = ord(value[error.start])
            raise SettingsError(
                f"{where}: {key!r} holds \\u{lone:04x}, half of a surrogate pair: no text"
            ) from error


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "true or false", list: "a list", dict: "an object"}.get(type(value), "a number")


def choose_tokenizer(settings: DataSettings, own: Tokenizer | None, text: str) -> Tokenizer:
    """The tokenizer that ``settings`` names, ``own`` being the loaded model's."""
    if settings.tokenizer == "char":
        return char_tokenizer(text)
    if settings.tokenizer == "bytes":
        return Tokenizer.bytes()
    if settings.tokenizer:
        return Tokenizer.from_pretrained(settings.tokenizer)
    if own is None:
        raise SettingsError('a new model needs [data] tokenizer = "char" (or "bytes", or a folder)')
    return own


def load_split(
    settings: DataSettings,
    own: Tokenizer | None,
    cache: Path,
    *,
    writer: bool,
    vocab_size: int | None = None,
) -> TokenSplit:
    """Tokens of ``text``, ``jsonl`` or ``bin`` data, tokenised into ``cache`` where they are text.

    Args:
        settings: The table [data].
        own: The loaded model's tokenizer.
        cache: The folder for what is tokenised.
        writer: Whether this process tokenises; the others read what it wrote.
        vocab_size: The model's, where it is known: it says how wide the ids of bare shards are that
            come without a tokenizer.
    """
    if settings.kind == "bin":
        if settings.tokenizer == "char":
            raise SettingsError(
                "[data] tokenizer is 'char', which is made of a text; shards have none: name a folder, or ''"
            )
        tokenizer = None if not settings.tokenizer and own is None else choose_tokenizer(settings, own, "")
        return _bin_split(settings, tokenizer, vocab_size)
    if writer:
        _tokenise(settings, own, cache)
    tokenizer = Tokenizer.find(cache)
    if tokenizer is None:
        raise SettingsError(f"{cache}: no tokens were written here")
    dtype = token_dtype(tokenizer.vocab_size)
    return TokenSplit(
        [read_tokens(cache / "train.bin", dtype)], [read_tokens(cache / "val.bin", dtype)], tokenizer
    )


def _bin_split(settings: DataSettings, tokenizer: Tokenizer | None, vocab_size: int | None) -> TokenSplit:
    dtype = token_dtype(tokenizer.vocab_size if tokenizer else vocab_size or 1)
    train, val = [Path(p) for p in settings.path], [Path(p) for p in settings.val_path]
    if len(train) == 1 and train[0].is_dir():
        folder = train[0]
        train, val = sorted(folder.glob("*train*.bin")), val or sorted(folder.glob("*val*.bin"))
    if not train:
        raise SettingsError("[data] path: no token shards (*train*.bin) there")
    if not val:
        raise SettingsError("[data] val_path: no held-out shards (*val*.bin) there")
    return TokenSplit([read_tokens(p, dtype) for p in train], [read_tokens(p, dtype) for p in val], tokenizer)


def _tokenise(settings: DataSettings, own: Tokenizer | None, cache: Path) -> None:
    """Write ``train.bin``, ``val.bin`` and the tokenizer, unless the same sources were written before."""
    stamp = {
        "settings": repr(settings),
        "sources": [[p, os.stat(p).st_size, os.stat(p).st_mtime_ns] for p in settings.path + settings.val_path
                    if Path(p).is_file()],
    }  # fmt: skip
    noted = cache / "sources.json"
    settle(cache)
    if _read_stamp(noted) == stamp:
        return
    train, val, everything = _documents(settings)
    tokenizer = choose_tokenizer(settings, own, everything)
    dtype = token_dtype(tokenizer.vocab_size)
    replaced = {"train.bin", "val.bin", noted.name, *Tokenizer.files}
    with replacing(cache, replaced.__contains__) as staging:
        counts: list[int] = []
        for name, documents in (("train", train), ("val", val)):
            with staging.new_file(f"{name}.bin") as file:
                counts.append(write_tokens(file, _document_ids(tokenizer, documents, settings), dtype))
        _check_counts(settings, *counts)
        tokenizer.save(staging.folder)
        with staging.new_file(noted.name) as file:
            file.write(json.dumps(stamp).encode())


def _check_counts(settings: DataSettings, train: int, val: int) -> None:
    """Refuse data of which nothing can be predicted: a token needs one before it."""
    paths = ", ".join(settings.path)
    if settings.val_path:
        short = [(paths, train), (", ".join(settings.val_path), val)]
        for where, count in short:
            if count < 2:
                raise SettingsError(f"{where} has {count} tokens; 2 or more are needed")
    elif min(train, val) < 2:
        raise SettingsError(
            f"{paths} has {train + val} tokens; the last {settings.val_fraction:.3g} of it, {val}, is held "
            "out, and 2 or more are needed on either side: give a longer text, or --val-data"
        )


def _read_stamp(path: Path) -> Any:
    """The stamp that says what the tokens were made of; None if it cannot be read: they are made anew."""
    try:
        return json.loads(read_bytes(path, LARGEST_JSON))
    except (OSError, ValueError, RecursionError):
        return None


def _documents(settings: DataSettings) -> tuple[list[str], list[str], str]:
    """Training documents, held-out documents, and all of the text."""
    train_share = 1.0 - settings.val_fraction
    if settings.kind == "text":
        text = read_text(settings.path, "path")
        if settings.val_path:
            held_out = read_text(settings.val_path, "val_path")
            return [text], [held_out], text + held_out
        cut = int(len(text) * train_share)
        return [text[:cut]], [text[cut:]], text
    key = settings.text_key
    documents = [row[key] for row in read_jsonl(settings.path, [key], "path")]
    if settings.val_path:
        held = [row[key] for row in read_jsonl(settings.val_path, [key], "val_path")]
    else:
        cut = int(len(documents) * train_share)
        documents, held = documents[:cut], documents[cut:]
    return documents, held, "".join(documents + held)


def _document_ids(tokenizer: Tokenizer, documents: list[str], settings: DataSettings) -> Iterator[list[int]]:
    """Ids of the documents, in pieces; an end-of-text token follows each document of several.

    What the tokenizer puts around texts, as a beginning token, comes once a document.
    """
    parts = [pieces(document, at_spaces=tokenizer.adds_space) for document in documents]
    ends = [0, *itertools.accumulate(map(len, parts))]
    flat = [piece for part in parts for piece in part]
    closing = tokenizer.suffix_ids
    if not closing and len(documents) > 1 and tokenizer.eos_token_id is not None:
        closing = [tokenizer.eos_token_id]
    places = set(ends)
    for place, ids in enumerate(encode_all(tokenizer, flat, settings.workers)):
        opened = tokenizer.prefix_ids + ids if place in places else ids
        yield opened + closing if place + 1 in places else opened
