"""A checkpoint's contents, whatever its format: the config, and the tensors by the model's names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptkern._warn import warn
from gptkern.checkpoint.errors import CheckpointError, some
from gptkern.checkpoint.storage import StoredTensor
from gptkern.config import GPTConfig
from gptkern.quantization import Quantization

# matrices that OpenAI's GPTs and transformers' Conv1D keep as (in, out)
BLOCK_MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GPT1_NAMES = {"wte": "tokens_embed", "wpe": "positions_embed"}

# causal masks and position numbers: constants that older versions saved with the weights
_CONSTANTS = re.compile(r"(^|\.)(h\.\d+\.attn\.(bias|masked_bias)|position_ids)$")
# modules that torch.compile, parallel training, activation checkpointing, PEFT and TRL put around others,
# at any depth; no module of a GPT is called so
_WRAPPERS = {
    *("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("model", "base_model", "pretrained_model"),
}
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
        extras: What else its ``config.json`` says, for which ``GPTConfig`` has no field.
    """

    source: Path
    config: GPTConfig
    tensors: dict[str, StoredTensor]
    transposed: bool
    quantization: Quantization | None = None
    kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None
    generation_config: dict[str, Any] | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    def is_transposed(self, name: str) -> bool:
        """True if the tensor of that name is stored transposed."""
        return self.transposed and name.endswith(BLOCK_MATRICES)


def by_parameter_name(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors under the model's names; constants are left out, and other heads, with a warning.

    Accepts names with and without ``transformer.``, with wrappers' names in them, and GPT-1's names of the
    embeddings.
    """
    result: dict[str, StoredTensor] = {}
    left_out: list[str] = []
    for stored_name, tensor in tensors.items():
        parts = [part for part in stored_name.split(".") if part not in _WRAPPERS]
        name = ".".join(parts)
        if _CONSTANTS.search(name):
            continue
        if parts and parts[0] in _OTHER_HEADS:
            left_out.append(stored_name)
            continue
        if not name.startswith("lm_head."):
            name = "transformer." + name.removeprefix("transformer.")
        for ours, theirs in GPT1_NAMES.items():
            name = name.replace(f"transformer.{theirs}.", f"transformer.{ours}.")
        if name in result:
            raise CheckpointError(
                f"{tensor.file}: {stored_name} and {result[name].name} (in {result[name].file}) "
                "are one tensor of the model; one of them is needed"
            )
        result[name] = tensor
    if left_out:
        file = tensors[left_out[0]].file
        warn(f"{file}: of another head, and left out: {some(left_out)}: this is a language model")
    return result
