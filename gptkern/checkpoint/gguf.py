"""GGUF files, llama.cpp's: one file with weights in blocks of few bits, configuration and tokenizer.

``gguf_file`` reads the header, ``gguf_config`` makes of its metadata what transformers' files would say,
``gguf_tensors`` reads the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gptkern._warn import warn
from gptkern.checkpoint.contents import Contents
from gptkern.checkpoint.errors import CheckpointError, some
from gptkern.checkpoint.gguf_config import config_fields, special_ids
from gptkern.checkpoint.gguf_file import Entry, GGUFFile, read_header
from gptkern.checkpoint.gguf_names import architecture
from gptkern.checkpoint.gguf_tensors import GROUP, PACKED, GGUFTensor, Part, has_minimums, packed, parameter
from gptkern.checkpoint.storage import StoredTensor
from gptkern.config import Config, FamilyConfig, GPTConfig, read
from gptkern.quantization import Quantization, linear_names

_HEAD, _EMBEDDING = "lm_head", "transformer.wte.weight"
_FLOATS = ("F32", "F16", "BF16")


def open_file(path: Path, *, int4: bool = False) -> Contents:
    """Open a ``.gguf``. Matrices in Q4_0 stay packed, other blocks are dequantised, with a warning.

    Args:
        int4: Matrices in Q4_1 stay packed, too; whoever asks quantises the others.

    Raises:
        CheckpointError: Damaged, truncated, of an architecture or in a block format that is not served.
    """
    file = read_header(path)
    try:
        config = read(config_fields(file))
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    tensors: dict[str, GGUFTensor] = _parameters(file, config)
    stored: dict[str, StoredTensor] = dict(tensors)
    names = list(linear_names(len(config.spec.layers)))
    kinds = PACKED if int4 else PACKED[:1]
    matrices = {name: _matrix(tensors, name) for name in names}
    packable = {
        name: matrix
        for name, matrix in matrices.items()
        if matrix is not None and all(part.entry.format in kinds for part in matrix.parts)
    }
    minimums = any(part.entry.format == PACKED[1] for matrix in packable.values() for part in matrix.parts)
    if minimums:
        packable = {name: matrix for name, matrix in packable.items() if has_minimums(matrix)}
    for name, matrix in packable.items():
        stored.pop(f"{name}.weight", None)
        stored |= {f"{name}.{view}": tensor for view, tensor in packed(matrix, minimums).items()}
    floats = tuple(name for name in names if name not in packable)
    if _HEAD in packable and config.tie_word_embeddings:
        del tensors[_EMBEDDING]  # the head holds its blocks: nothing of them is lost, and nothing is told
    unpacked = [tensor for name, tensor in tensors.items() if name in stored]
    if not (int4 and packable):
        _warn_of_blocks(path, unpacked, len(packable), len(names))
    return Contents(
        path,
        config,
        stored,
        transposed=False,
        quantization=Quantization("int4", GROUP, minimums, floats) if packable else None,
        generation_config=special_ids(file),
    )


def formats(contents: Contents) -> dict[str, int]:
    """The block formats of an opened GGUF file, and how many tensors have each; empty for other files."""
    entries = {
        part.entry.name: part.entry.format
        for tensor in contents.tensors.values()
        if isinstance(tensor, GGUFTensor)
        for part in tensor.parts
    }
    return dict(Counter(entries.values()).most_common())


def _matrix(tensors: dict[str, GGUFTensor], name: str) -> GGUFTensor | None:
    """The matrix of a linear layer; that of a tied head is the embedding."""
    own = tensors.get(f"{name}.weight")
    return own if own is not None or name != _HEAD else tensors.get(_EMBEDDING)


def _warn_of_blocks(path: Path, unpacked: list[GGUFTensor], packed: int, matrices: int) -> None:
    """Say which blocks became floats, and how many matrices stayed packed beside them."""
    formats = (part.entry.format for tensor in unpacked for part in tensor.parts)
    counts = Counter(format for format in formats if format not in _FLOATS)
    if not counts:
        return
    blocks = ", ".join(f"{format} ({count} tensors)" for format, count in counts.most_common())
    hint = "weights='int8' or 'int4' quantises them anew"
    if packed:
        hint = f"{packed} of {matrices} matrices stay packed as int4"
    if PACKED[1] in counts:
        hint += f"; weights='int4' leaves those in {PACKED[1]} as they are"
    warn(f"{path}: blocks in {blocks} become floats: {hint}")


def _parameters(file: GGUFFile, config: Config) -> dict[str, GGUFTensor]:
    """The parameters by our names.

    Raises:
        CheckpointError: A tensor that the model has no parameter for, or parts that do not fit together.
    """
    theirs = _by_their_name(file)
    unused = dict(theirs)
    found = {}
    for ours, names in _rows(config, theirs):
        parts = [_part(file, config, name, unused.pop(name)) for name in names if name in theirs]
        if not parts:
            continue
        if len(parts) < len(names):
            missing = [name for name in names if name not in theirs]
            raise CheckpointError(f"{file.path}: {ours} needs {some(missing)} too (transformers' names)")
        if len({part.entry.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(f"{part.entry.name} {part.entry.shape}" for part in parts)
            raise CheckpointError(f"{file.path}: matrices whose rows have one length expected: {shapes}")
        found[ours] = parameter(file, parts)
    if unused:
        raise CheckpointError(f"{file.path}: not of a {config.model_type} model: {some(list(unused))}")
    return found


def _by_their_name(file: GGUFFile) -> dict[str, Entry]:
    names = architecture(file)
    entries = {name: entry for name, entry in file.tensors.items() if name not in names.factors}
    unknown = [name for name in entries if names.their_name(name) is None]
    if unknown:
        raise CheckpointError(f"{file.path}: not of a {names.model_type} model: {some(unknown)}")
    return {str(names.their_name(name)): entry for name, entry in entries.items()}


def _rows(config: Config, theirs: dict[str, Entry]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our names, each with transformers' names of its parts."""
    if isinstance(config, GPTConfig):
        yield from ((name, (name,)) for name in theirs)
    else:
        for row in config.family.named(len(config.spec.layers)):
            yield row.ours, row.theirs


def _part(file: GGUFFile, config: Config, name: str, entry: Entry) -> Part:
    """One tensor, with what has to be undone."""
    names = architecture(file)
    if names.unit_offset and name.endswith("norm.weight"):
        return Part(entry, shift=-1.0)
    if not names.paired or not isinstance(config, FamilyConfig):
        return Part(entry)
    spec = config.spec
    heads = {"q_proj": spec.heads, "k_proj": spec.kv_heads}.get(name.split(".")[-2], 0)
    if heads and entry.shape[0] % (2 * heads):
        raise CheckpointError(f"{file.path}: {entry.name} has {entry.shape[0]} rows for {heads} heads")
    return Part(entry, heads)
