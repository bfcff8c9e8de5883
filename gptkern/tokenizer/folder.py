"""A folder's tokenizer files, read as transformers' AutoTokenizer reads them.

Two of its rules decide most: the class that ``tokenizer_config.json`` or ``config.json`` names says whether
``tokenizer.json`` is taken as it is or only its vocabulary, and ``added_tokens_decoder``, where the
configuration has it, stands in for ``special_tokens_map.json`` and ``added_tokens.json``.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, processors

from gptkern.checkpoint.errors import CheckpointError, shown
from gptkern.checkpoint.files import LARGEST_VOCABULARY, read_json, read_text
from gptkern.checkpoint.pending import Files
from gptkern.tokenizer.library import library_errors
from gptkern.tokenizer.pipelines import (
    CLASS_OF_ITS_OWN,
    CLASSES,
    END_OF_TEXT,
    END_OF_WORD,
    GPT1,
    GPT2,
    LLAMA,
    OF_MODEL,
    Family,
    Merges,
    Vocabulary,
)

JSON, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE = "chat_template.jinja"

GENERIC = "PreTrainedTokenizerFast"
_GENERIC = ("", "PreTrainedTokenizer", "TokenizersBackend")

# in the order in which they get ids
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _ADDITIONAL, _DECODER = "extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"
_SWITCHES = ("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken


@dataclass
class Parts:
    """A tokenizer's parts, as a folder's files describe them.

    Attributes:
        backend: The tokenizer, every added token in it.
        configuration: ``tokenizer_config.json``, with what ``special_tokens_map.json`` adds to it.
        names: The text of each special token that has a name.
        chat_template: What ``chat_template.jinja`` holds, or None.
    """

    backend: tokenizers.Tokenizer
    configuration: dict[str, Any]
    names: dict[str, str | None]
    chat_template: str | None


@dataclass
class _Special:
    """The special tokens that files name; a value of None says that there is none of that name."""

    named: dict[str, Token | None]
    extra: list[Token]
    added: dict[int, AddedToken] = field(default_factory=dict)


def find(files: Files) -> Parts | None:
    """The tokenizer in a folder, or None.

    Raises:
        CheckpointError: There is one and it cannot be read.
    """
    if JSON in files:
        return read(files, files / JSON)
    if VOCAB in files and MERGES in files:
        return read(files, None)
    return None


def read(files: Files, tokenizer_json: Path | None) -> Parts:
    """The tokenizer of a ``tokenizer.json``, or else of the folder's vocabulary and merges.

    Raises:
        CheckpointError: It cannot be read.
    """
    configuration = read_json(files / CONFIG) if CONFIG in files else {}
    _check_types(files / CONFIG, configuration)
    special = _read_special(files, configuration)
    declared = _declared_class(files, configuration)
    family = _family(files, declared, tokenizer_json)
    if tokenizer_json is not None:
        backend, family = _from_json(tokenizer_json, family, configuration, special)
        source = str(tokenizer_json)
    else:
        backend, family = _from_vocabulary(files, family, declared, configuration, special)
        source = f"{files / VOCAB}, {MERGES}"
    names = _named_texts(backend, family, declared, special)
    with library_errors(source):
        _add_tokens(backend, special, names)
        if tokenizer_json is None:
            add_begin_and_end(
                backend,
                names.get("bos_token") if configuration.get("add_bos_token") else None,
                names.get("eos_token") if configuration.get("add_eos_token") else None,
            )
        backend.no_truncation()
        backend.no_padding()
    _try(backend, source)
    # A class with a pipeline of its own would take the file's place where it is read without the model.
    as_it_is = GENERIC if declared in CLASSES else declared or GENERIC
    if family is not None and family.pads_left:
        configuration.setdefault("padding_side", "left")
    configuration["tokenizer_class"] = family.class_name if family else as_it_is
    template = read_text(files / TEMPLATE, LARGEST_VOCABULARY) if TEMPLATE in files else None
    return Parts(backend, configuration, names, template)


def _check_types(path: Path, configuration: dict[str, Any]) -> None:
    for name in _SWITCHES:
        if not isinstance(configuration.get(name), bool | None):
            raise CheckpointError(f"{path}: {name} is {shown(configuration[name])}; true or false is needed")
    if not isinstance(configuration.get("tokenizer_class"), str | None):
        raise CheckpointError(
            f"{path}: tokenizer_class is {shown(configuration['tokenizer_class'])}; a name is needed"
        )
    try:
        json.dumps(configuration)
    except RecursionError:
        raise CheckpointError(
            f"{path}: lists or objects within each other, too deep to be written back"
        ) from None


def _declared_class(files: Files, configuration: dict[str, Any]) -> str:
    """The class that the files name, without the ending Fast, or ``""``."""
    declared = configuration.get("tokenizer_class")
    if declared is None and "config.json" in files:
        declared = read_json(files / "config.json").get("tokenizer_class")
    if not isinstance(declared, str):
        return ""
    return GENERIC if declared == GENERIC else declared.removesuffix("Fast")


def _family(files: Files, declared: str, tokenizer_json: Path | None) -> Family | None:
    """The pipeline that takes the place of the file's own; None for the file's.

    The class that files name decides, unless the model type has a class of its own and the named one is not
    it; a LlamaTokenizer whose file is byte-level (Llama 3) is no such tokenizer.
    """
    found = read_json(files / "config.json").get("model_type") if "config.json" in files else None
    model_type = found if isinstance(found, str) else ""
    own = OF_MODEL.get(model_type)
    if not declared or model_type in CLASS_OF_ITS_OWN or (model_type in OF_MODEL and own is None):
        return own
    if declared == LLAMA.class_name and tokenizer_json is not None:
        byte_level = '"ByteLevel"' in read_text(tokenizer_json, LARGEST_VOCABULARY)
        return None if byte_level else LLAMA
    return CLASSES.get(declared)


def _from_json(
    path: Path, family: Family | None, configuration: dict[str, Any], special: _Special
) -> tuple[tokenizers.Tokenizer, Family | None]:
    """The file's tokenizer; of a BPE that is one of the families' the vocabulary and post-processor alone."""
    text = read_text(path, LARGEST_VOCABULARY)
    with library_errors(f"{path}: not a tokenizer, or truncated"):
        described = tokenizers.Tokenizer.from_str(text)
    if family is None or not isinstance(described.model, models.BPE):
        return described, None
    model = json.loads(text)["model"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges: Merges = [(left, right) for left, right in pairs]
    with library_errors(f"{path}: model"):
        backend = family.build(
            _distinct(path, model["vocab"]), merges, configuration, _unknown(family, special)
        )
    if family.puts_around:
        backend.post_processor = described.post_processor
    if _DECODER not in configuration:
        special.added |= described.get_added_tokens_decoder()
    return backend, family


def _from_vocabulary(
    files: Files, family: Family | None, declared: str, configuration: dict[str, Any], special: _Special
) -> tuple[tokenizers.Tokenizer, Family]:
    vocab = _read_vocabulary(files / VOCAB)
    merges = _read_merges(files / MERGES)
    if family is None or not family.of_lists:
        if declared not in (GENERIC, *_GENERIC):
            able = [name for name, known in CLASSES.items() if known.of_lists]
            raise CheckpointError(
                f"{files / CONFIG}: tokenizer_class is {shown(declared)}; with {VOCAB} and {MERGES} alone "
                f"{', '.join(able)} are read: save it with {JSON}"
            )
        family = GPT1 if any(token.endswith(END_OF_WORD) for token in vocab) else GPT2
    with library_errors(f"{files / VOCAB}, {MERGES}: not a BPE vocabulary and its merges"):
        return family.build(vocab, merges, configuration, _unknown(family, special)), family


def _unknown(family: Family, special: _Special) -> str | None:
    """The text of the token in the place of what the vocabulary cannot express."""
    token = special.named.get("unk_token", family.defaults["unk_token"])
    return None if token is None else text_of(token)


def _read_vocabulary(path: Path) -> Vocabulary:
    vocab = read_json(path, LARGEST_VOCABULARY)
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < 1 << 32:
            raise CheckpointError(
                f"{path}: not a vocabulary: the id of {shown(token)} is {shown(token_id)}; "
                "a whole number, 0 or more, is needed"
            )
    return _distinct(path, vocab)


def _distinct(path: Path, vocab: Vocabulary) -> Vocabulary:
    tokens = {token_id: token for token, token_id in vocab.items()}
    if len(tokens) < len(vocab):
        first = next(token for token, token_id in vocab.items() if tokens[token_id] != token)
        raise CheckpointError(
            f"{path}: not a vocabulary: {shown(first)} and {shown(tokens[vocab[first]])} have one id, "
            f"{vocab[first]}"
        )
    return vocab


def _read_merges(path: Path) -> Merges:
    merges: Merges = []
    # Only \n ends a line: tokens may hold other characters that Python takes for line breaks.
    lines = read_text(path, LARGEST_VOCABULARY).split("\n")
    for number, line in enumerate(lines, 1):
        parts = line.removesuffix("\r").split(" ")
        if line.startswith("#version") or (number == len(lines) and not line):
            continue
        if len(parts) != 2:
            raise CheckpointError(
                f"{path}, line {number}: two tokens with a space between them are needed, {shown(line)} found"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _read_special(files: Files, configuration: dict[str, Any]) -> _Special:
    """The special and added tokens of all files; those of the map join ``configuration``, and win over it."""
    path = files / CONFIG
    special = _Special(*_read_names(path, configuration))
    if _DECODER in configuration:
        special.added = _read_decoder(path, configuration[_DECODER])
        return special
    if SPECIAL in files:
        in_map = read_json(files / SPECIAL)
        _read_names(files / SPECIAL, in_map)
        _join_map(configuration, in_map)
        special = _Special(*_read_names(path, configuration))
    if ADDED in files:
        special_texts = {text_of(token) for token in (*special.named.values(), *special.extra) if token}
        for text, token_id in read_json(files / ADDED).items():
            where = f"{files / ADDED}: the id of {shown(text)}"
            _check_text(where, text)
            is_special = text in special_texts
            special.added[_read_id(where, token_id)] = AddedToken(
                text, normalized=not is_special, special=is_special
            )
    return special


def _join_map(configuration: dict[str, Any], in_map: dict[str, Any]) -> None:
    for name, value in in_map.items():
        is_token = name in (_EXTRA, _ADDITIONAL) or (name.endswith("_token") and name not in _SWITCHES)
        if not is_token or (name == _ADDITIONAL and _extra_tokens(configuration)):
            continue
        if isinstance(value, list):
            tokens = [_special_object(token) for token in value]
            existing = _extra_tokens(configuration) if name == _EXTRA else None
            configuration[name] = [*(existing or []), *(t for t in tokens if t not in (existing or []))]
        else:
            configuration[name] = value if name == _EXTRA else _special_object(value)


def _special_object(token: Any) -> Any:
    """A token of the map as ``tokenizer_config.json`` has it."""
    return {"__type": "AddedToken", **token, "special": True} if isinstance(token, dict) else token


def _extra_tokens(configuration: dict[str, Any]) -> Any:
    """``extra_special_tokens``, by its new name or the old one."""
    return configuration.get(_EXTRA) or configuration.get(_ADDITIONAL)


def _read_names(path: Path, configuration: dict[str, Any]) -> tuple[dict[str, Token | None], list[Token]]:
    """Special tokens with a name, and those without."""
    named: dict[str, Token | None] = {}
    for name in NAMED:
        if name in configuration:
            value = configuration[name]
            named[name] = None if value is None else _read_token(f"{path}: {name}", value)
    for name, value in configuration.items():
        is_token = isinstance(value, str) or (isinstance(value, dict) and "content" in value)
        if name.endswith("_token") and name not in named and is_token:
            named[name] = _read_token(f"{path}: {name}", value)
    extra = _extra_tokens(configuration)
    if isinstance(extra, dict):
        return named | {name: _read_token(f"{path}: {_EXTRA}", token) for name, token in extra.items()}, []
    if not isinstance(extra, list | None):
        raise CheckpointError(f"{path}: {_EXTRA} is {shown(extra)}; a list of tokens is needed")
    return named, [_read_token(f"{path}: {_EXTRA}", token) for token in extra or []]


def _read_decoder(path: Path, value: Any) -> dict[int, AddedToken]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {_DECODER} is {shown(value)}; an object from ids to tokens is needed")
    found = {}
    for token_id, token in value.items():
        where = f"{path}: {_DECODER}: {shown(token_id)}"
        if not isinstance(token, dict):
            raise CheckpointError(f"{where} is {shown(token)}; an object with content is needed")
        added = _read_token(where, token)
        assert isinstance(added, AddedToken)
        found[_read_id(where, token_id)] = added
    return found


def _read_id(where: str, value: Any) -> int:
    try:
        token_id = int(value) if isinstance(value, str | int) else -1
    except ValueError:
        token_id = -1
    if not 0 <= token_id < 1 << 32 or isinstance(value, bool):
        raise CheckpointError(f"{where} is {shown(value)}; a whole number, 0 or more, is needed")
    return token_id


def _read_token(where: str, value: Any) -> Token:
    """A token as text, or as an object with its content and how it is matched."""
    if isinstance(value, str):
        _check_text(where, value)
        return value
    flags = {name: value[name] for name in _FLAGS if name in value} if isinstance(value, dict) else {}
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("content"), str)
        or not all(isinstance(flag, bool) for flag in flags.values())
    ):
        raise CheckpointError(
            f"{where} is {shown(value)}; text, or an object with content and {', '.join(_FLAGS)}, is needed"
        )
    _check_text(where, value["content"])
    return AddedToken(value["content"], **flags)


def _check_text(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{where}: half of a surrogate pair found, in {shown(text)}") from None


def text_of(token: Token) -> str:
    """A token's text."""
    return token if isinstance(token, str) else token.content


def text_of_entry(entry: Any) -> str | None:
    """The text of a special token as ``tokenizer_config.json`` has it: text, or an object; None for none."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _named_texts(
    backend: tokenizers.Tokenizer, family: Family | None, declared: str, special: _Special
) -> dict[str, str | None]:
    """The texts of the named special tokens, with the defaults.

    A default that the vocabulary lacks is left out: transformers would give it an id of its own, which a
    model of that vocabulary has no row for.
    """
    defaults: dict[str, str] = family.defaults if family else {}
    if not family and not declared and not {"bos_token", "eos_token"} & special.named.keys():
        # a tokenizer.json alone
        defaults = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
    names = {name: text for name, text in defaults.items() if backend.token_to_id(text) is not None}
    return {**names, **{name: text_of(token) if token else None for name, token in special.named.items()}}


def _add_tokens(backend: tokenizers.Tokenizer, special: _Special, names: dict[str, str | None]) -> None:
    """Give every token that files name its id: first added ones, then those with a name, then the rest."""
    tokens: list[Token] = [token for _, token in sorted(special.added.items(), key=lambda item: item[0])]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known |= {text_of(token) for token in tokens}
    named = {**dict.fromkeys(NAMED), **names}
    for token in (*(special.named.get(name) or text for name, text in named.items() if text), *special.extra):
        # One text may come again with other flags: the library takes the last ones.
        if text_of(token) not in known and token not in tokens:
            tokens.append(token)
    texts = {text for text in names.values() if text}
    added = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for token in added:
        token.special = token.special or token.content in texts
    backend.add_tokens(added)


def add_begin_and_end(backend: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Put special tokens around texts; None puts none."""
    if before or after:
        single = [*([f"{before}:0"] if before else []), "$A:0", *([f"{after}:0"] if after else [])]
        around = {token: backend.token_to_id(token) for token in (before, after) if token}
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=list(around.items())
        )


def _try(backend: tokenizers.Tokenizer, source: str) -> None:
    """Encode and decode a little: some damage shows only then, as a panic in the library's Rust code."""
    ids = [0]
    part = f"{source}: normalizer, pre_tokenizer or post_processor"
    # An Exception, unlike a panic, is that text's own: the vocabulary may have no token for it.
    with library_errors(part), contextlib.suppress(Exception):
        ids = backend.encode("a b").ids
    with library_errors(f"{source}: decoder"):
        backend.decode(ids)
