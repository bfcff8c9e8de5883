"""Reading a checkpoint into a model: every tensor is checked first, then read straight into its place."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gptkern._warn import warn
from gptkern.checkpoint import gguf, hf, llmc, nanogpt
from gptkern.checkpoint.contents import Contents
from gptkern.checkpoint.earlier import renewed
from gptkern.checkpoint.errors import CheckpointError, some
from gptkern.checkpoint.files import open_regular
from gptkern.checkpoint.gguf_file import MAGIC
from gptkern.checkpoint.pending import Files, read
from gptkern.checkpoint.placing import FLOATS, checked_device, checked_dtype
from gptkern.checkpoint.storage import StoredTensor
from gptkern.config import VOCAB_PADDING, Config, FamilyConfig, GPTConfig
from gptkern.quantization import Quantization
from gptkern.quantize import QuantizedLinear, empty_layers

if TYPE_CHECKING:
    from gptkern.tokenizer import Tokenizer

_LAYER = re.compile(r"transformer\.h\.([0-9]+)\.")
_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_CHECKED_AT_ONCE = 1 << 22

Model = TypeVar("Model", bound=nn.Module)


class _NoInitialValues(TorchFunctionMode):
    """Leaves out torch.nn.init: on the meta device it has no effect and costs seconds of imports."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def open_checkpoint(path: Path, *, int4: bool = False) -> Contents:
    """Open a checkpoint of any known format; none of its weights is read yet.

    Args:
        int4: Of a GGUF file also matrices in Q4_1 stay packed.

    Raises:
        CheckpointError: It is not one, or is damaged.
    """
    contents = read(path, _open_folder) if path.is_dir() else _open_file(path, int4)
    _check_sizes(contents)
    return contents


def _open_file(path: Path, int4: bool) -> Contents:
    if path.suffix == ".safetensors" or path.name.startswith(("pytorch_model", "config.json")):
        raise CheckpointError(f"{path}: a part of a checkpoint: give its folder, {path.parent}")
    with open_regular(path) as file:
        start = file.read(4)
    if start == MAGIC:
        return gguf.open_file(path, int4=int4)
    if int.from_bytes(start, "little") == llmc.MAGIC:
        return llmc.open_file(path)
    if path.suffix == ".bin":
        raise CheckpointError(
            f"{path}: not an llm.c GPT-2 file: magic {llmc.MAGIC} expected, "
            f"{int.from_bytes(start, 'little')} found"
        )
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, a pickle
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint, or truncated: a transformers folder, nanoGPT's ckpt.pt or "
            "llm.c's .bin is needed"
            + ("; a text to continue is given by --file" if path.suffix == ".txt" else "")
        )
    return nanogpt.open_file(path)


def _open_folder(files: Files) -> Contents:
    if hf.CONFIG not in files and "ckpt.pt" in files:
        return nanogpt.open_file(files / "ckpt.pt")
    if hf.CONFIG not in files:
        raise CheckpointError(f"{files.folder} holds no model: no {hf.CONFIG}, no ckpt.pt")
    return hf.open_folder(files)


def load(
    model_class: type[Model],
    contents: Contents,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    check_finite: bool,
) -> Model:
    """A ``model_class(config)`` with the checkpoint's weights, in evaluation mode.

    Raises:
        CheckpointError: Tensors missing, too many, of another shape or dtype, or (on request) not finite.
        ValueError: A dtype that weights cannot have, a device that is not there.
    """
    dtype, device = checked_dtype(dtype), checked_device(device)
    with torch.device("meta"), _NoInitialValues():
        model = model_class(contents.config)
        if contents.quantization is not None:
            empty_layers(model, contents.quantization)
    packed = {name: buffer for name, buffer in model.named_buffers() if not name.endswith("._like")}
    expected = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *packed.items()]}
    tensors = _without_redundant(contents, expected)
    _check_names(contents, expected, tensors)
    for name, shape in expected.items():
        _check_shape(contents, name, tensors[name], shape)
        _check_dtype(tensors[name], packed.get(name))
    dtype = dtype or _common_dtype({name: tensors[name] for name in expected if name not in packed})
    for name in expected:
        stored = tensors[name]
        source = stored.data.t() if contents.is_transposed(name) else stored.data
        stored_dtype = packed[name].dtype if name in packed else dtype
        tensor = torch.empty(source.shape, dtype=stored_dtype, device=device)
        tensor.copy_(source)
        stored.release()
        if check_finite and stored_dtype.is_floating_point:
            _check_finite(stored, tensor)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, tensor if name in packed else nn.Parameter(tensor))
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.compute_in(dtype, device)
    head = model.get_submodule("lm_head")
    if contents.config.tie_word_embeddings and not isinstance(head, QuantizedLinear):
        head.weight = model.get_parameter(_EMBEDDING)
    return model.eval()


def check_quantization(
    contents: Contents, target: Quantization | None, device: torch.device | str | None
) -> None:
    """Refuse a quantisation that the checkpoint or the device cannot have, before any weight is read.

    Raises:
        ValueError: It is in fewer bits already; fp8 on a GPU that has none; a device that is not there.
    """
    found = contents.quantization
    if target is not None and found is not None:
        raise ValueError(
            f"{contents.source}: weights is {target.format!r}, the checkpoint is {found.format} already: "
            "leave weights out, or quantise the original"
        )
    quantization, where = target or found, checked_device(device)
    if quantization is not None and quantization.format == "fp8" and where.type == "cuda":
        capability = torch.cuda.get_device_capability(where)
        if capability < (8, 9):
            raise ValueError(
                f"{contents.source}: weights is 'fp8'; this GPU has compute capability "
                f"{capability[0]}.{capability[1]}, 8.9 or newer is needed: take 'int8'"
            )


def check_vocabulary(source: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that makes ids without a row in the model; warn where it seems another model's.

    Rows without a token are padding, unless there are many more of them than any model is padded by. Added
    tokens without a row give a warning alone: texts seldom hold them, and transformers lets people add some
    (for padding, above all) without giving the model rows for them.
    """
    last = tokenizer.vocab_size - 1
    ids = f"the tokenizer has ids up to {last}, the model's vocab_size is {config.spec.vocab_size}"
    if tokenizer.base_vocab_size > config.spec.vocab_size:
        raise CheckpointError(f"{source}: vocabularies do not match: {ids}")
    if tokenizer.vocab_size > config.spec.vocab_size:
        warn(f"{source}: {ids}: texts with the added tokens beyond it are refused")
    if -(-tokenizer.vocab_size // VOCAB_PADDING) * VOCAB_PADDING < config.spec.vocab_size:
        warn(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is "
            f"{config.spec.vocab_size}: is it another model's? What the model writes beyond them has no text"
        )


def _check_sizes(contents: Contents) -> None:
    """Refuse a configuration whose sizes are not the tensors', before anything of these sizes is made."""
    config = contents.config
    # Before the spec, which has an entry for each layer.
    expected = config.n_layer if isinstance(config, GPTConfig) else len(config.spec.layers)
    layers = {match[1] for name in contents.tensors if (match := _LAYER.match(name))}
    if len(layers) != expected:
        raise CheckpointError(f"{contents.source}: {expected} layers expected, {len(layers)} found")
    spec = config.spec
    for name, shape in (
        (_EMBEDDING, (spec.vocab_size, spec.width)),
        ("transformer.wpe.weight", (spec.context + spec.position_offset, spec.width)),
        ("transformer.h.0.attn.c_attn.weight", (spec.qkv_width, spec.width)),
        ("transformer.h.0.mlp.c_fc.weight", (spec.fc_width, spec.width)),
    ):
        if name in contents.tensors:
            _check_shape(contents, name, contents.tensors[name], shape)


def _without_redundant(contents: Contents, expected: dict[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """The tensors with a tied head once, as the embedding, and less zero biases of a model without any."""
    tensors = dict(contents.tensors) if contents.quantization is None else renewed(contents.tensors)
    config = contents.config
    if config.tie_word_embeddings and _HEAD in tensors:
        head = tensors.pop(_HEAD)
        tensors[_EMBEDDING] = _more_exact(head, tensors.get(_EMBEDDING, head))
    if isinstance(config, GPTConfig) and not config.bias:
        for name in [name for name in tensors if name.endswith(".bias") and name not in expected]:
            stored = tensors.pop(name)
            if stored.data.any():
                raise CheckpointError(
                    f"{stored.file}: {stored.name}: zeros expected, as bias is false, others found"
                )
    return tensors


def _more_exact(head: StoredTensor, embedding: StoredTensor) -> StoredTensor:
    """The more exact of a tied head and the embedding: the one that the other was rounded from."""
    if head.same_place(embedding):
        return embedding
    if head.shape == embedding.shape and head.dtype in FLOATS and embedding.dtype in FLOATS:
        for exact, copy in ((embedding, head), (head, embedding)):
            equal = torch.equal(exact.data.to(copy.dtype), copy.data)
            copy.release()
            if equal:
                return exact
    raise CheckpointError(
        f"{head.file}: {head.name} differs from {embedding.name}, though the model's head is tied to "
        "the embedding: tie_word_embeddings must be false, or the two equal"
    )


def _check_names(
    contents: Contents, expected: dict[str, tuple[int, ...]], tensors: dict[str, StoredTensor]
) -> None:
    missing = [_stored_name(contents, name) for name in expected if name not in tensors]
    extra = [
        f"{stored.name} (in {stored.file.name})" for name, stored in tensors.items() if name not in expected
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {some(missing)}")
    if extra:
        problems.append(f"{len(extra)} not of a {contents.config.model_type} model: {some(extra)}")
    if problems:
        raise CheckpointError(f"{contents.source}: {len(expected)} tensors expected; {'; '.join(problems)}")


def _stored_name(contents: Contents, name: str) -> str:
    """The name that a parameter has in checkpoints, for people."""
    config = contents.config
    if not isinstance(config, FamilyConfig):
        return name
    rows = config.family.named(len(config.spec.layers))
    return next((", ".join(row.theirs) for row in rows if row.ours == name), name)


def _check_shape(contents: Contents, name: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    expected = tuple(reversed(shape)) if contents.is_transposed(name) else shape
    if stored.shape != expected:
        raise CheckpointError(
            f"{stored.file}: {stored.name}: shape {expected} expected, {stored.shape} found"
        )


def _check_dtype(stored: StoredTensor, packed: torch.Tensor | None) -> None:
    dtypes = FLOATS if packed is None else (packed.dtype,)
    if stored.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found_dtype = str(stored.dtype).removeprefix("torch.")
        raise CheckpointError(f"{stored.file}: {stored.name}: dtype {accepted} expected, {found_dtype} found")


def _common_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype that holds every tensor exactly."""
    dtype = next(iter(tensors.values())).dtype
    for stored in tensors.values():
        dtype = torch.promote_types(dtype, stored.dtype)
    return dtype


def _check_finite(stored: StoredTensor, parameter: torch.Tensor) -> None:
    values = parameter.detach().flatten()
    bad = sum(int((~part.isfinite()).sum()) for part in values.split(_CHECKED_AT_ONCE))
    if bad:
        raise CheckpointError(
            f"{stored.file}: {stored.name}: finite values expected, {bad} of {math.prod(parameter.shape)} "
            f"are NaN or infinite in {str(parameter.dtype).removeprefix('torch.')}"
        )
