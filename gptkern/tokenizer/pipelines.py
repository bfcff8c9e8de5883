"""The ways from text to tokens of GPT-2 and GPT-1, made of a vocabulary and its merges.

They are what transformers' GPT2Tokenizer and OpenAIGPTTokenizer are, whatever pipeline a ``tokenizer.json``
beside describes: of that file these classes take the vocabulary, the merges and the post-processor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

END_OF_TEXT, END_OF_WORD, UNKNOWN = "<|endoftext|>", "</w>", "<unk>"

Vocabulary = dict[str, int]
Merges = list[tuple[str, str]]


@dataclass(frozen=True)
class Family:
    """One family's tokenizers.

    Attributes:
        class_name: The name of transformers' class for them.
        defaults: Special tokens where no file names any.
        build: Makes one of a vocabulary, its merges, whether texts begin with a space, and the unknown token.
    """

    class_name: str
    defaults: dict[str, str]
    build: Callable[[Vocabulary, Merges, bool, str | None], tokenizers.Tokenizer]


def _gpt2(
    vocab: Vocabulary, merges: Merges, add_prefix_space: bool, unknown: str | None
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt1(
    vocab: Vocabulary, merges: Merges, add_prefix_space: bool, unknown: str | None
) -> tokenizers.Tokenizer:
    """Lower-cased, accents stripped, split at spaces and punctuation as BERT does."""
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=unknown if unknown in vocab else None,
            end_of_word_suffix=END_OF_WORD,
            fuse_unk=False,
        )
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix=END_OF_WORD)
    return backend


GPT2 = Family("GPT2Tokenizer", dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT), _gpt2)
GPT1 = Family("OpenAIGPTTokenizer", {"unk_token": UNKNOWN}, _gpt1)
