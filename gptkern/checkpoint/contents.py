"""A checkpoint's contents, whatever its format: the config, and the tensors by the model's names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptkern._warn import warn
from gptkern.checkpoint.errors import CheckpointError, some
from gptkern.checkpoint.storage import StackedTensor, StoredTensor
from gptkern.config import Config, FamilyConfig
from gptkern.quantization import Quantization

# matrices that OpenAI's GPTs and transformers' Conv1D keep as (in, out)
BLOCK_MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GPT1_NAMES = {"wte": "tokens_embed", "wpe": "positions_embed"}

# causal masks and position numbers: constants that older versions saved with the weights
_CONSTANTS = re.compile(
    r"(^|\.)(h\.\d+\.attn\.(bias|masked_bias)|position_ids"
    r"|layers\.\d+\.attention\.(bias|masked_bias)|rotary_emb\.\w*inv_freq|attn\.embed_positions)$"
)
# modules that torch.compile, parallel training, activation checkpointing, PEFT and TRL put around others,
# at any depth; no module of a GPT is called so
_WRAPPERS = {
    *("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("model", "base_model", "pretrained_model"),
}
# what the decoder is called in the model around it, beside "model"
_BASES = {"transformer", "gpt_neox"}
# what classifiers, reward models and the like have beside the decoder
_OTHER_HEADS = {"score", "classifier", "qa_outputs", "v_head", "multiple_choice_head"}


@dataclass(frozen=True)
class Contents:
    """A checkpoint, opened: nothing of the tensors has been read yet.

    Attributes:
        source: The folder or file.
        config: The model's shape.
        tensors: By the model's parameter names.
        transposed: Block matrices are stored ``(in, out)``, the other way round than in the model.
        quantization: The format of the linear layers' weights; None where they are not quantised.
        kv_scales: Of an fp8 cache, of keys and of values ``(n_layer, n_head)`` fp32, or None.
        generation_config: Its defaults of ``generate``; None where its format has no place for them.
        extras: What else its ``config.json`` says, for which the config has no field.
    """

    source: Path
    config: Config
    tensors: dict[str, StoredTensor]
    transposed: bool
    quantization: Quantization | None = None
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None
    generation_config: dict[str, Any] | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def stored_bytes(self) -> int:
        """The bytes of the tensors in their files; what serves twice is counted once."""
        return sum(end - begin for _, begin, end in {s for t in self.tensors.values() for s in t.spans})

    def is_transposed(self, name: str) -> bool:
        """True if the tensor of that name is stored transposed."""
        return self.transposed and name.endswith(BLOCK_MATRICES)


def by_parameter_name(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors under the model's names; constants are left out, and other heads, with a warning.

    Accepts names with and without ``transformer.``, with wrappers' names in them, and GPT-1's names of the
    embeddings.
    """
    result: dict[str, StoredTensor] = {}
    for bare, stored_name, tensor in _of_the_decoder(tensors):
        name = bare if bare.startswith("lm_head.") else f"transformer.{bare}"
        for ours, theirs in GPT1_NAMES.items():
            name = name.replace(f"transformer.{theirs}.", f"transformer.{ours}.")
        if name in result:
            raise CheckpointError(
                f"{tensor.file}: {stored_name} and {result[name].name} (in {result[name].file}) "
                "are one tensor of the model; one of them is needed"
            )
        result[name] = tensor
    return result


def by_family(config: FamilyConfig, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors under the model's names, by the family's table; several may be one parameter.

    Names that the table does not have stay as they are: quantised matrices have ours.

    Raises:
        CheckpointError: Part of a parameter, or two of one tensor; no tensor of the family at all.
    """
    found: dict[str, StoredTensor] = {}
    for bare, stored_name, tensor in _of_the_decoder(tensors):
        if bare in found:
            raise CheckpointError(
                f"{tensor.file}: {stored_name} and {found[bare].name} (in {found[bare].file}) "
                "are one tensor of the model; one of them is needed"
            )
        found[bare] = tensor
    spec = config.spec
    result: dict[str, StoredTensor] = {}
    for row in config.family.named(len(spec.layers)):
        missing = [theirs for theirs in row.theirs if bare_name(theirs) not in found]
        parts = [found.pop(bare_name(theirs)) for theirs in row.theirs if theirs not in missing]
        if parts and missing:
            raise CheckpointError(f"{parts[0].file}: {parts[0].name} is there, {some(missing)} is missing")
        if parts:
            plain = len(parts) == 1 and not row.transposed and not row.per_head
            heads = spec.heads if row.per_head else 0
            result[row.ours] = parts[0] if plain else StackedTensor.of(parts, row.transposed, heads)
    if tensors and not result:
        raise CheckpointError(
            f"{next(iter(tensors.values())).file}: no tensor of a {config.model_type} model: "
            f"{some(list(tensors))} found"
        )
    rest = {name if name.startswith("lm_head.") else f"transformer.{name}": t for name, t in found.items()}
    return result | rest


def bare_name(stored_name: str) -> str:
    """A tensor's name less those of the modules around the decoder's parts."""
    around = _WRAPPERS | _BASES
    return ".".join(part for part in stored_name.split(".") if part not in around)


def _of_the_decoder(tensors: dict[str, StoredTensor]) -> Iterator[tuple[str, str, StoredTensor]]:
    """(bare name, name, tensor) of each but constants and other heads, of which a warning tells."""
    left_out: list[str] = []
    for stored_name, tensor in tensors.items():
        name = bare_name(stored_name)
        if _CONSTANTS.search(name):
            continue
        if name.split(".")[0] in _OTHER_HEADS:
            left_out.append(stored_name)
            continue
        yield name, stored_name, tensor
    if left_out:
        file = tensors[left_out[0]].file
        warn(f"{file}: of another head, and left out: {some(left_out)}: this is a language model")
