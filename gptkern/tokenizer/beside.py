"""The tokenizer of a checkpoint: the one that is named, or the one that lies beside it.

A folder of transformers' holds it, a GGUF file its own. Another checkpoint that is one file (nanoGPT's
``ckpt.pt``, llm.c's ``.bin``) holds none: its folder may, nanoGPT keeps the characters of a character-level
data set in ``meta.pkl``, and a vocabulary of GPT-2's size is GPT-2's.
"""

from __future__ import annotations

from pathlib import Path

from gptkern._warn import warn
from gptkern.checkpoint.contents import Contents
from gptkern.checkpoint.gguf_file import is_gguf, read_header
from gptkern.checkpoint.load import check_vocabulary
from gptkern.checkpoint.nanogpt import read_data_set, read_meta
from gptkern.tokenizer.folder import JSON, MERGES, VOCAB
from gptkern.tokenizer.tokenizer import Tokenizer

_META = "meta.pkl"
# GPT-2's tokens, and how many rows nanoGPT makes of them
_GPT2_SIZES = (50257, 50304)
_GPT2 = ("openai-community/gpt2", "gpt2")


def tokenizer_for(
    contents: Contents, named: Tokenizer | str | Path | None, *, local_files_only: bool
) -> Tokenizer | None:
    """The tokenizer for a checkpoint; None where none is named and none found.

    Args:
        contents: The checkpoint.
        named: A tokenizer, or where it is: what ``Tokenizer.from_pretrained`` takes.
        local_files_only: Take a hub id from the cache only.

    Raises:
        TypeError: No tokenizer and no place of one.
        CheckpointError: It cannot be read, or has ids that the model has no row for.
    """
    given: object = named
    if given is not None and not isinstance(given, str | Path | Tokenizer):
        kind = type(given).__name__
        raise TypeError(f"from_pretrained: tokenizer is {kind}; a Tokenizer or the name of one is needed")
    if isinstance(named, str | Path):
        tokenizer: Tokenizer | None = Tokenizer.from_pretrained(named, local_files_only=local_files_only)
    else:
        tokenizer = named
    if tokenizer is None and is_gguf(contents.source):
        tokenizer = Tokenizer.in_gguf(read_header(contents.source))
    if tokenizer is None and not contents.source.is_dir():
        return _beside_file(contents)
    if tokenizer is None:
        tokenizer = Tokenizer.find(contents.source)
    if tokenizer is not None:
        check_vocabulary(contents.source, contents.config, tokenizer)
    return tokenizer


def _beside_file(contents: Contents) -> Tokenizer | None:
    path, size = contents.source, contents.config.spec.vocab_size
    tokenizer = Tokenizer.find(path.parent)
    if tokenizer is not None and tokenizer.base_vocab_size > size:
        # The folder is shared with other files, and a tokenizer there may be another model's.
        warn(
            f"{path}: the tokenizer in its folder is passed over: it has {tokenizer.base_vocab_size} tokens, "
            f"the model {size}"
        )
        tokenizer = None
    if tokenizer is not None:
        check_vocabulary(path, contents.config, tokenizer)
    return tokenizer or _characters(path, size) or (_cached_gpt2(path) if size in _GPT2_SIZES else None)


def _characters(path: Path, size: int) -> Tokenizer | None:
    """The characters of the data set that nanoGPT trained on."""
    places = [path.parent / _META]
    if path.suffix == ".pt" and (data_set := read_data_set(path)) is not None:
        places.append(path.parent.parent / "data" / data_set / _META)
    for place in places:
        if place.exists() and len(ids := read_meta(place)) <= size:
            return Tokenizer.characters(ids)
    return None


def _cached_gpt2(path: Path) -> Tokenizer | None:
    """GPT-2's tokenizer from the hub's cache; nothing is fetched."""
    # imported here: it takes as long as all the rest of the package
    from huggingface_hub import try_to_load_from_cache

    for repository in _GPT2:
        for names in ((JSON,), (VOCAB, MERGES)):
            found = [try_to_load_from_cache(repository, name) for name in names]
            if all(isinstance(file, str) for file in found):
                warn(
                    f"{path}: no tokenizer beside it; GPT-2's is taken, from the hub's cache, because the "
                    "vocabulary has GPT-2's size. Name another one if that is wrong"
                )
                return Tokenizer.find(Path(str(found[0])).parent)
    return None
