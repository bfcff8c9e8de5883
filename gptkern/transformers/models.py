"""The accelerated language models: ``generate`` on the engine, and the fused loss."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    CausalLMOutput,
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
)

from gptkern.as_built import untouched
from gptkern.environment import fallback
from gptkern.ops import linear_cross_entropy
from gptkern.ops._dispatch import use_kernel
from gptkern.routes import LIBRARY
from gptkern.transformers.engine import EngineCache
from gptkern.transformers.families import FAMILIES
from gptkern.transformers.loop import generate
from gptkern.transformers.parts import CACHE, HEAD
from gptkern.transformers.refusals import ASSISTED, library_takes_over


class LanguageModel:
    """The base of an accelerated language model that stands before the library's class."""

    _gptkern_generation = "auto"
    _gptkern_rng = "torch"
    _gptkern_library_class: Any

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # The library finds out by reading the source of the class's module, which is the wrong one here.
        return bool(cls._gptkern_library_class._can_set_attn_implementation())

    @classmethod
    def is_custom_code(cls) -> bool:
        """Custom code, by the place of its class, is saved without the library's renaming of tensors."""
        return bool(cls._gptkern_library_class.is_custom_code())

    @library_takes_over
    def _sample(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return generate(self, super()._sample, input_ids, kwargs)  # type: ignore[misc]

    @library_takes_over
    def _beam_search(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return generate(self, super()._beam_search, input_ids, kwargs)  # type: ignore[misc]

    @library_takes_over
    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        if self._gptkern_generation != "library":
            fallback("generate", LIBRARY, ASSISTED)
        return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]


def _fused_loss(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True if the loss can be fused with the head's product, which stores no fp32 logits."""
    head = model.lm_head
    if (
        kwargs.get("labels") is None
        or len(args) > 1
        or kwargs.get("logits_to_keep")
        or "loss_function" in vars(model)
    ):
        return False
    usual = not {"shift_labels", "ignore_index", "weight", "label_smoothing"} & kwargs.keys()
    plain = (
        model.loss_function is ForCausalLMLoss
        and kwargs.get("return_dict", model.config.return_dict) is not False
    )
    bare = loss_reason(model.config) is None
    return usual and plain and bare and untouched(head, HEAD) and use_kernel(head.weight)


def loss_reason(config: Any) -> str | None:
    """The reason why the loss is not that of the head's product alone; None if it is."""
    if getattr(config, "logits_scaling", 1.0) != 1.0:
        return "the logits have a factor"
    if getattr(config, "final_logit_softcapping", None) is not None:
        return "the logits have a cap"
    return None


def _output_kind(model_type: str) -> Any:
    """The library's output of a language model."""
    if model_type == "openai-gpt":
        return CausalLMOutput
    crossed = model_type in ("gpt2", "gpt_bigcode")
    return CausalLMOutputWithCrossAttentions if crossed else CausalLMOutputWithPast


def _forward_with_loss(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    inputs = dict(kwargs)
    labels, count = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
    inputs.pop("logits_to_keep", None)
    family = FAMILIES.get(model.config.model_type)
    path = "transformer" if family is None else family.body
    body = model.get_submodule(path)(*args, **inputs)
    hidden, weight, bias = body.last_hidden_state, model.lm_head.weight, model.lm_head.bias
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].to(hidden.device)
    # The Trainer's count of targets is that of all its micro-batches.
    reduction = "mean" if count is None else "sum"
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, bias=bias)
    if count is not None:
        loss = loss / torch.as_tensor(count, device=loss.device)
    rest = {name: value for name, value in body.items() if name != "last_hidden_state"}
    kind = _output_kind(model.config.model_type)
    return kind(loss=loss, logits=model.lm_head(hidden), **rest)


def _forward_of(cls: Any) -> Any:
    @library_takes_over
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if isinstance(cache, EngineCache):
            logits = cache.run(kwargs["input_ids"])
            return CausalLMOutputWithCrossAttentions(logits=logits, **{CACHE: cache})
        if _fused_loss(self, args, kwargs):
            return _forward_with_loss(self, args, kwargs)
        return cls.forward(self, *args, **kwargs)

    return forward


@functools.cache
def accelerated_class(cls: Any) -> Any:
    """The accelerated subclass of a language model's class, under the same name."""
    module = __name__ if cls in LIBRARY_CLASSES else cls.__module__
    namespace = {
        "__module__": module,
        "__qualname__": cls.__qualname__,
        "__doc__": f"``{cls.__module__}.{cls.__qualname__}``, accelerated.",
        "forward": _forward_of(cls),
        "_gptkern_library_class": cls,
    }
    return type(cls.__name__, (LanguageModel, cls), namespace)


LIBRARY_CLASSES: tuple[Any, ...] = (
    transformers.GPT2LMHeadModel,
    transformers.OpenAIGPTLMHeadModel,
    *(family.language_model for family in FAMILIES.values()),
)
GPT2LMHeadModel, OpenAIGPTLMHeadModel = map(accelerated_class, LIBRARY_CLASSES[:2])
# Pickled models look their classes up here.
globals().update({cls.__name__: accelerated_class(cls) for cls in LIBRARY_CLASSES[2:]})
