"""The ways from text to tokens that transformers' tokenizer classes have, of a vocabulary and its merges.

Whatever pipeline a ``tokenizer.json`` beside describes: of that file these classes take the vocabulary, the
merges and the post-processor. All other classes take the file as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

END_OF_TEXT, END_OF_WORD, UNKNOWN = "<|endoftext|>", "</w>", "<unk>"
# sentencepiece's mark of a space
SPACE = "\u2581"
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

Vocabulary = dict[str, int]
Merges = list[tuple[str, str]]


@dataclass(frozen=True)
class Family:
    """One family's tokenizers.

    Attributes:
        class_name: The name of transformers' class for them.
        defaults: Special tokens where no file names any.
        build: Makes one of a vocabulary, its merges, ``tokenizer_config.json`` and the unknown token.
        of_lists: ``vocab.json`` and ``merges.txt`` alone make one.
        puts_around: Texts have around them what ``tokenizer.json`` says; else nothing.
        pads_left: Rows are filled up on the left where no file names a side.
    """

    class_name: str
    defaults: dict[str, str]
    build: Callable[[Vocabulary, Merges, Mapping[str, Any], str | None], tokenizers.Tokenizer]
    of_lists: bool = True
    puts_around: bool = True
    pads_left: bool = False


def _gpt2(
    vocab: Vocabulary, merges: Merges, configuration: Mapping[str, Any], unknown: str | None
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(configuration.get("add_prefix_space"))
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt1(
    vocab: Vocabulary, merges: Merges, configuration: Mapping[str, Any], unknown: str | None
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


def _gpt_neox(
    vocab: Vocabulary, merges: Merges, configuration: Mapping[str, Any], unknown: str | None
) -> tokenizers.Tokenizer:
    """GPT-2's, of text in Unicode's composed form."""
    backend = _gpt2(vocab, merges, configuration, unknown)
    backend.normalizer = normalizers.NFC()
    return backend


def _qwen2(
    vocab: Vocabulary, merges: Merges, configuration: Mapping[str, Any], unknown: str | None
) -> tokenizers.Tokenizer:
    """GPT-NeoX's, with single digits and other rules of where words end."""
    backend = _gpt_neox(vocab, merges, configuration, unknown)
    before = bool(configuration.get("add_prefix_space"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=before, use_regex=False),
        ]
    )
    return backend


def _llama(
    vocab: Vocabulary, merges: Merges, configuration: Mapping[str, Any], unknown: str | None
) -> tokenizers.Tokenizer:
    """sentencepiece's: a space before the text, unknown characters byte by byte."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    before = configuration.get("add_prefix_space") is not False
    # Before each part between special tokens in the old way, before the first alone in the new one.
    scheme = "never" if not before else "always" if configuration.get("legacy") else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", left=1)] if before else []
    backend.decoder = decoders.Sequence([*_sentencepiece_decoders(), *strip])
    return backend


def _gemma(
    vocab: Vocabulary, merges: Merges, configuration: Mapping[str, Any], unknown: str | None
) -> tokenizers.Tokenizer:
    """Llama's without the space before the text; words keep the space after them."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unknown)
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(_sentencepiece_decoders())
    return backend


def _sentencepiece_decoders() -> list[Any]:
    return [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]


_GPT_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
GPT2 = Family("GPT2Tokenizer", _GPT_NAMES, _gpt2)
GPT1 = Family("OpenAIGPTTokenizer", {"unk_token": UNKNOWN}, _gpt1)
GPT_NEOX = Family("GPTNeoXTokenizer", _GPT_NAMES | {"pad_token": "<|padding|>"}, _gpt_neox, puts_around=False)
QWEN2 = Family("Qwen2Tokenizer", dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_OF_TEXT), _qwen2)
LLAMA = Family(
    "LlamaTokenizer",
    {"bos_token": "<s>", "eos_token": "</s>", "unk_token": UNKNOWN},
    _llama,
    of_lists=False,
    pads_left=True,
)
GEMMA = Family(
    "GemmaTokenizer",
    {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": UNKNOWN,
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    _gemma,
    of_lists=False,
    pads_left=True,
)
CLASSES = {family.class_name: family for family in (GPT2, GPT1, GPT_NEOX, QWEN2, LLAMA, GEMMA)}
# The class of a model type; None: the file as it is, whatever class it names.
OF_MODEL: dict[str, Family | None] = {
    "gpt2": GPT2,
    "openai-gpt": GPT1,
    "gptj": GPT2,
    "opt": GPT2,
    "starcoder2": GPT2,
    "gpt_neox": GPT_NEOX,
    "qwen2": QWEN2,
    "qwen3": QWEN2,
    "gemma3_text": GEMMA,
    **dict.fromkeys(("mistral", "phi3", "granite", "olmo2", "gpt_bigcode")),
}
# Model types whose own class goes before the one that files name.
CLASS_OF_ITS_OWN = ("qwen2",)
