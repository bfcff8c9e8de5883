"""The tokenizer that everything else uses."""

from __future__ import annotations

import builtins
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gptkern.checkpoint.errors import CheckpointError, shown
from gptkern.checkpoint.gguf_file import GGUFFile, is_gguf, read_header
from gptkern.checkpoint.locate import EMBEDDED, locate
from gptkern.checkpoint.nanogpt import read_meta
from gptkern.checkpoint.pending import Files
from gptkern.checkpoint.pending import read as read_whole
from gptkern.config import VOCAB_PADDING
from gptkern.durable import make_folder, named_folder, write_file
from gptkern.tokenizer import gguf
from gptkern.tokenizer.batch import Encoding, Padding, Side, encode_batch
from gptkern.tokenizer.chat import DEFAULT, Message, chosen_template, named_templates, render
from gptkern.tokenizer.folder import (
    ADDED,
    CONFIG,
    GENERIC,
    JSON,
    MERGES,
    NAMED,
    SPECIAL,
    TEMPLATE,
    VOCAB,
    Parts,
    find,
    read,
    text_of_entry,
)
from gptkern.tokenizer.library import library_errors
from gptkern.tokenizer.pieces import Pieces
from gptkern.tokenizer.streams import TokenStream, byte_chars

# transformers writes a number beyond this for a tokenizer that knows no longest text.
_NO_LENGTH = 10**15
# Characters beyond which a text is encoded as a batch.
_LONG_TEXT = 8192


class Tokenizer:
    """Text to ids and back. Nothing of it changes once it is made.

    Args:
        backend: A tokenizer of the ``tokenizers`` library. It never truncates or pads here.
        bos_token, eos_token: Its special tokens, by text; None where it has none.
        unk_token, pad_token: Likewise; what they are for is up to the vocabulary's model and to callers.
        configuration: What ``save`` writes into ``tokenizer_config.json``, these tokens included.
        chat_template: What ``save`` writes into ``chat_template.jinja``: the template of
            ``apply_chat_template``.

    Raises:
        CheckpointError: One of the tokens is not in its vocabulary.
    """

    # what ``save`` writes, and what it takes the place of
    files = (JSON, CONFIG, TEMPLATE, SPECIAL, VOCAB, MERGES, ADDED)

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        unk_token: str | None = None,
        pad_token: str | None = None,
        configuration: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        if configuration is None:
            configuration = {
                "tokenizer_class": GENERIC,
                "bos_token": bos_token,
                "eos_token": eos_token,
                "clean_up_tokenization_spaces": False,
            }
        self._backend, self._configuration, self._chat_template = backend, configuration, chat_template
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = bool(configuration.get("split_special_tokens"))
        self._names = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "unk_token": unk_token,
            "pad_token": pad_token,
        }
        self._ids = {name: self._special_id(name, token) for name, token in self._names.items()}

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_"):
            raise AttributeError(
                f"Tokenizer: {name} cannot be set: a tokenizer does not change once it is made. Special "
                f"tokens are named in {CONFIG}, or as arguments of Tokenizer"
            )
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._backend, self._names, self._configuration, self._chat_template)

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

        Ids are those of transformers' AutoTokenizer: added and special tokens, prefix spaces and a
        beginning token are read from all the files that it reads.

        Args:
            path_or_hub_id: The folder, a ``tokenizer.json``, nanoGPT's ``meta.pkl`` or a ``.gguf`` itself, a
                hub id, or ``"embedded"``.
            revision, local_files_only: As in ``GPT.from_pretrained``.

        Raises:
            CheckpointError: There is none, or it cannot be read.
        """
        path = locate(path_or_hub_id, revision=revision, local_files_only=local_files_only, weights=False)
        if path.suffix == ".pkl":
            return cls.characters(read_meta(path))
        if path.is_dir():
            tokenizer = cls.find(path)
        elif is_gguf(path):
            tokenizer = cls.in_gguf(read_header(path))
        else:
            tokenizer = cls._of(read(Files(path.parent, {}), path))
        if tokenizer is None:
            raise CheckpointError(f"{path}: no tokenizer here; {JSON}, or {VOCAB} and {MERGES}, is needed")
        return tokenizer

    @classmethod
    def find(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer in a folder; None where there is none.

        Raises:
            CheckpointError: There is one and it cannot be read.
        """
        parts = read_whole(folder, find)
        return None if parts is None else cls._of(parts)

    @classmethod
    def in_gguf(cls, file: GGUFFile) -> Tokenizer | None:
        """The tokenizer in a GGUF file whose header was read; None where there is none.

        Raises:
            CheckpointError: It is damaged, or of a kind that is not served.
        """
        parts = gguf.read(file)
        return None if parts is None else cls._of(parts)

    @classmethod
    def _of(cls, parts: Parts) -> Tokenizer:
        return _remake(parts.backend, parts.names, parts.configuration, parts.chat_template)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """256 tokens, one a byte of UTF-8, each id its byte's value: any text works."""
        vocab = {char: byte for byte, char in enumerate(byte_chars())}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return cls(backend)

    @classmethod
    def characters(cls, ids: Mapping[str, int]) -> Tokenizer:
        """One token a character, by their ids; ``encode`` refuses other characters, as nanoGPT's does."""
        backend = tokenizers.Tokenizer(models.BPE(vocab=dict(ids), merges=[]))
        backend.decoder = decoders.Fuse()
        return cls(backend)

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text."""
        return self._names["bos_token"]

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text."""
        return self._names["eos_token"]

    @property
    def unk_token(self) -> str | None:
        """The token in the place of what the vocabulary cannot express."""
        return self._names["unk_token"]

    @property
    def pad_token(self) -> str | None:
        """The token that fills rows up."""
        return self._names["pad_token"]

    @property
    def bos_token_id(self) -> int | None:
        """The id of ``bos_token``."""
        return self._ids["bos_token"]

    @property
    def eos_token_id(self) -> int | None:
        """The id of ``eos_token``."""
        return self._ids["eos_token"]

    @property
    def unk_token_id(self) -> int | None:
        """The id of ``unk_token``."""
        return self._ids["unk_token"]

    @property
    def pad_token_id(self) -> int | None:
        """The id of ``pad_token``."""
        return self._ids["pad_token"]

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """The chat templates by their names: mostly one, ``default``; none where files bring none.

        Raises:
            CheckpointError: ``chat_template`` of ``tokenizer_config.json`` is no template.
        """
        if self._chat_template is not None:
            return {DEFAULT: self._chat_template}
        return named_templates(CONFIG, self._configuration.get("chat_template"))

    @cached_property
    def _template_names(self) -> dict[str, str]:
        """The special tokens that a template sees, by their names in transformers."""
        named = {name: text_of_entry(self._configuration.get(name)) for name in NAMED} | self._names
        return {name: text for name, text in named.items() if text is not None}

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def base_vocab_size(self) -> int:
        """One more than the largest id of the vocabulary itself, without the tokens added to it."""
        return max(self._backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    @property
    def special_tokens(self) -> dict[str, int]:
        """Texts and ids of the tokens that ``skip_special_tokens`` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    @cached_property
    def prefix_ids(self) -> list[int]:
        """The ids that ``encode`` puts before a text, as a beginning-of-text token; mostly none."""
        return self._around[0]

    @cached_property
    def suffix_ids(self) -> list[int]:
        """The ids that ``encode`` puts after a text; mostly none."""
        return self._around[1]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        added: int = self._backend.num_special_tokens_to_add(False)
        if not added:
            return [], []
        ids, inside = self.encode("a"), self.encode("a", add_special_tokens=False)
        before = next(start for start in range(added + 1) if ids[start : start + len(inside)] == inside)
        return ids[:before], ids[before + len(inside) :]

    @property
    def adds_space(self) -> bool:
        """True if ``encode`` takes a text as if a space came before it."""
        split = self._backend.pre_tokenizer
        if isinstance(split, pre_tokenizers.Metaspace):
            return bool(split.prepend_scheme != "never")
        return isinstance(split, pre_tokenizers.ByteLevel) and bool(split.add_prefix_space)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``. Special tokens written out in it become their ids, as in transformers.

        Args:
            text: The text.
            add_special_tokens: Put around it what the tokenizer puts around texts (``prefix_ids``,
                ``suffix_ids``). A text that is encoded in parts gets them once: the parts leave them out.

        Raises:
            TypeError: ``text`` is not a str, or ``add_special_tokens`` no bool.
            ValueError: ``text`` has half of a surrogate pair, which no encoding can express, or characters
                that the vocabulary has no token for and would lose.
        """
        if not isinstance(text, str):
            raise TypeError(f"Tokenizer.encode: text is {type(text).__name__}; a str is needed")
        _check_switch("Tokenizer.encode", add_special_tokens)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Tokenizer.encode: text is not valid Unicode: {error}") from error
        with library_errors("Tokenizer.encode: this tokenizer cannot encode the text"):
            if len(text) > _LONG_TEXT:
                # A batch of one: without offsets, in a fifth of the time, and other threads run meanwhile.
                batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            else:
                batch = [self._backend.encode(text, add_special_tokens=add_special_tokens)]
        ids: list[int] = batch[0].ids
        if lost := self._pieces.lost(text):
            more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
            raise ValueError(
                f"Tokenizer.encode: the text holds {', '.join(map(repr, lost[:8]))}{more}, for which the "
                f"vocabulary of {self.vocab_size} tokens has none: leave them out or replace them"
            )
        return ids

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        padding: Padding = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        padding_side: Side | None = None,
        add_special_tokens: bool = True,
    ) -> Encoding:
        """Texts as a batch: ``input_ids`` and ``attention_mask``, under transformers' names.

        Example::

            batch = tokenizer(["a", "b c"], padding=True, padding_side="left", return_tensors="pt")
            model.generate(**batch, max_new_tokens=20)

        Args:
            texts: One text, or several.
            padding: True or ``"longest"`` fills rows up to the longest, ``"max_length"`` to ``max_length``.
                They are filled with ``pad_token``, else ``eos_token``, else id 0: the mask tells them apart.
            truncation: Cut rows to ``max_length`` tokens, on the side that the tokenizer's files name.
            max_length: Tokens of a row; by default what the tokenizer's files name.
            return_tensors: ``"pt"`` returns tensors, int64 of shape ``(batch, seq)``; None lists.
            padding_side: ``"left"`` (what ``generate`` needs) or ``"right"``; by default as the tokenizer's
                files say, else right.
            add_special_tokens: As in ``encode``.

        Raises:
            TypeError: ``texts`` is no text, or ``add_special_tokens`` no bool.
            ValueError: An option that is not known, rows of several lengths that are to be a tensor, a text
                that ``encode`` refuses.
        """
        _check_switch("Tokenizer", add_special_tokens)
        named = self._configuration.get("model_max_length")
        if max_length is None and isinstance(named, int) and named < _NO_LENGTH:
            max_length = named
        return encode_batch(
            texts,
            lambda text: (
                self.encode(text, add_special_tokens=False),
                self.prefix_ids if add_special_tokens else [],
                self.suffix_ids if add_special_tokens else [],
            ),
            pad_id=next((i for i in (self.pad_token_id, self.eos_token_id) if i is not None), 0),
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            padding_side=padding_side or self._side("padding_side"),
            truncation_side=self._side("truncation_side"),
        )

    def _side(self, name: str) -> Side:
        return "left" if self._configuration.get(name) == "left" else "right"

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: Padding = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **variables: Any,
    ) -> Any:
        """A conversation as the model was trained to see it, with transformers' names and defaults.

        Example::

            messages = [{"role": "user", "content": "Name a colour."}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            model.generate_text([prompt], max_new_tokens=50)

        Args:
            conversation: Messages, dictionaries with ``role`` (``system``, ``user``, ``assistant``) and
                ``content``, the oldest first; or several conversations.
            tools, documents: What the model may call or look into, as JSON schemas and as dictionaries; the
                template must know them.
            chat_template: A template's text, or the name of one of ``chat_templates``.
            add_generation_prompt: End with what begins the model's answer.
            continue_final_message: End inside the last message, which the model is to continue.
            tokenize: Return token ids; else text.
            padding, truncation, max_length, return_tensors: As in a call of the tokenizer.
            return_dict: Return an ``Encoding``; else the ids alone. Text has none.
            **variables: Further names that the template knows (``enable_thinking``).

        Returns:
            An ``Encoding``, ids, or text; of several conversations, a list of each.

        Raises:
            TypeError: The conversation is no list of messages, a tool is no dictionary.
            ValueError: No template, or one that fails or refuses the messages: the error shows its line.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "apply_chat_template: add_generation_prompt begins an answer, continue_final_message goes on "
                "with one: give one of them"
            )
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise TypeError("apply_chat_template: tools are JSON schemas, dictionaries; other objects found")
        template = chosen_template(self.chat_templates, chat_template, tools)
        several = bool(conversation) and all(isinstance(entry, list | tuple) for entry in conversation)
        conversations: Any = conversation if several else [conversation]
        texts = [
            render(
                template,
                messages,
                continue_final_message=continue_final_message,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **{**self._template_names, **variables},
            )
            for messages in conversations
        ]
        if not tokenize:
            return texts if several else texts[0]
        encoding = self(
            texts if several or return_tensors is not None else texts[0],
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            add_special_tokens=False,
        )
        return encoding if return_dict else encoding.input_ids

    def batch_decode(self, batch: Iterable[Iterable[int]], *, skip_special_tokens: bool = False) -> list[str]:
        """The text of each row of ids: lists, or a tensor of shape ``(batch, seq)``; see ``decode``."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in batch]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of one sequence of ids; bytes that are no UTF-8 become U+FFFD.

        Ids just beyond the vocabulary, with which models pad theirs, have no text.

        Raises:
            TypeError: ``ids`` is no sequence of whole numbers.
            ValueError: An id that is negative or far beyond the vocabulary, a tensor of several dimensions.
        """
        checked = _sequence(ids)
        most = -(-self.vocab_size // VOCAB_PADDING) * VOCAB_PADDING
        for token_id in checked:
            if not 0 <= token_id < most:
                raise ValueError(
                    f"Tokenizer.decode: token id {token_id} found; the vocabulary has {self.vocab_size} "
                    f"tokens (ids up to {most - 1} are a model's padding)"
                )
        with library_errors("Tokenizer.decode: this tokenizer cannot decode the ids"):
            text: str = self._backend.decode(checked, skip_special_tokens=skip_special_tokens)
        return text

    def has_token(self, token_id: int) -> bool:
        """True if an id stands for a token; those of a model's padded rows do not."""
        return self._backend.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> builtins.bytes:
        """The bytes of text that a token stands for, which may be part of a character.

        An id without a token has none. A text's first token may lose its leading space when it is decoded.
        """
        return self._pieces.token_bytes(token_id)

    def stream(self, *, skip_special_tokens: bool = False) -> TokenStream:
        """A decoder of one sequence, token by token, at a cost that does not grow with the sequence."""
        skipped = frozenset(self.special_tokens.values()) if skip_special_tokens else frozenset()
        return self._pieces.stream(skipped)

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self._backend)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers' AutoTokenizer opens.

        What the tokenizer's own files held beyond that is written back: special tokens, the chat template,
        keys that have no meaning here. Another tokenizer's files there go.
        """
        folder = named_folder("Tokenizer.save", folder)
        make_folder(folder)
        written = {
            JSON: self._backend.to_str(pretty=True),
            CONFIG: json.dumps(dict(self._configuration), indent=2) + "\n",
        }
        if self._chat_template is not None:
            written[TEMPLATE] = self._chat_template
        for name, content in written.items():
            write_file(folder / name, content, through_links=False)
        for name in set(self.files) - written.keys():
            (folder / name).unlink(missing_ok=True)


def _check_switch(source: str, add_special_tokens: Any) -> None:
    if not isinstance(add_special_tokens, bool):
        raise TypeError(f"{source}: add_special_tokens is {add_special_tokens!r}; True or False is needed")


def _remake(
    backend: tokenizers.Tokenizer,
    names: Mapping[str, str | None],
    configuration: Mapping[str, Any],
    chat_template: str | None,
) -> Tokenizer:
    named = {name: names.get(name) or None for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return Tokenizer(backend, **named, configuration=configuration, chat_template=chat_template)


def _sequence(ids: Any) -> list[int]:
    """Token ids as Python's integers."""
    shape = getattr(ids, "shape", None)
    if shape is not None and len(shape) != 1:
        raise ValueError(
            f"Tokenizer.decode: ids has shape {tuple(shape)}; one sequence of ids is needed: decode each row"
        )
    try:
        return [operator.index(token_id) for token_id in (ids if shape is None else ids.tolist())]
    except TypeError:
        raise TypeError(
            f"Tokenizer.decode: ids is {shown(ids)}; a sequence of whole numbers is needed"
        ) from None
