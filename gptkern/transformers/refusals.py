"""The reasons why the engine cannot take a transformers model, a generation config or a call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.openai import modeling_openai as gpt1

from gptkern._at_import import NAME
from gptkern.as_built import Blueprint, Watch, own_method, skeleton
from gptkern.transformers.families import FAMILIES
from gptkern.transformers.modules import FORWARDS, INSTEAD, activation_of
from gptkern.transformers.parts import CACHE
from gptkern.transformers.view import gpt_config, shape_key, sizes

ASSISTED = "assisted decoding checks several tokens at once"
# The inputs of ``_sample`` that the engine knows; any other is a reason to refuse the call.
_KNOWN_INPUTS = {"attention_mask", "use_cache", CACHE, "logits_to_keep", "position_ids"}
_blueprints: WeakKeyDictionary[nn.Module, tuple[str, Blueprint]] = WeakKeyDictionary()
_LIBRARY_CLASSES: tuple[type[Any], ...] = (
    gpt2.GPT2LMHeadModel,
    gpt1.OpenAIGPTLMHeadModel,
    *(family.language_model for family in FAMILIES.values()),
)
# The methods of the library that the engine or its loop replaces.
_LOOP_METHODS = (
    "__call__",
    "forward",
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_has_unfinished_sequences",
    "_prefill",
    "_sample",
    "_beam_search",
)
_LIBRARY_METHODS = {
    name: [next(vars(base)[name] for base in cls.__mro__ if name in vars(base)) for cls in _LIBRARY_CLASSES]
    for name in _LOOP_METHODS
}
F = TypeVar("F", bound=Callable[..., Any])


def library_takes_over(method: F) -> F:
    """Mark a method that replaces the library's, and calls it if the engine does not serve."""
    method._gptkern = True  # type: ignore[attr-defined]
    return method


def model_refusal(model: Any) -> str | None:
    """The reason why the engine cannot run the model; None if it can."""
    parameters = list(model.parameters())
    if len({(p.dtype, p.device) for p in parameters}) > 1:
        return "the weights are of several dtypes or on several devices"
    if parameters[0].device.type not in ("cpu", "cuda"):
        return f"the weights are on {parameters[0].device}"
    if getattr(model.config, "add_cross_attention", False):
        return "the model has cross-attention"
    if activation_of(model.config) is None:
        return "gptkern has no such activation"
    if model.config.model_type != "openai-gpt" and not known_attention(model.config._attn_implementation):
        return f"attn_implementation={model.config._attn_implementation!r} is not the library's"
    return spec_refusal(model) or changed(model)


def spec_refusal(model: Any) -> str | None:
    """The reason why no decoder of ours computes what the model's config describes; None if one does."""
    try:
        config = gpt_config(model)
    except (ValueError, TypeError) as error:
        return str(error)
    for rotary in config.spec.rotaries:
        scaling = rotary.scaling
        if scaling is None or scaling.kind != "longrope":
            continue
        if config.spec.context > dict(scaling.values)["original_max_position_embeddings"]:  # type: ignore[operator]
            return "longrope: the library's frequencies change within a text"
    return None


def changed(model: Any) -> str | None:
    """The first difference between ``model`` and what its library class builds; None if there is none."""
    name = own_method(model, _LOOP_METHODS) or _overridden(model)
    return f"{type(model).__name__} has a {name} of its own" if name else _blueprint(model).difference(model)


def refuse_changes(model: Any, watch: Watch) -> None:
    """Refuse to go on with a model whose layers must be called since ``watch`` was made.

    Raises:
        RuntimeError: The model was hooked or changed.
    """
    reason = changed(model) if watch.stirred() else None
    if reason is not None:
        raise RuntimeError(f"generate: {reason}, since this generation began; begin it anew")


def known_attention(name: str) -> bool:
    """True for an attention that computes what the engine does: gptkern's and each of the library's."""
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    return name in (NAME, "eager") or getattr(function, "__module__", "").startswith("transformers.")


def _overridden(model: Any) -> str | None:
    """A method of the library's loops that a subclass overrides."""
    for name in _LOOP_METHODS:
        for cls in type(model).__mro__:
            method = vars(cls).get(name)
            if method is not None and not hasattr(method, "_gptkern"):
                if method not in _LIBRARY_METHODS[name]:
                    return name
                break
    return None


def _blueprint(model: Any) -> Blueprint:
    """The blueprint of the model's config, with as many tokens and blocks as the model has."""
    found = _blueprints.get(model)
    if found is None or found[0] != shape_key(model):
        config = copy.deepcopy(model.config)
        for name, size in sizes(model).items():
            setattr(config, name, size)
        library = next(cls for cls in type(model).__mro__ if cls in _LIBRARY_CLASSES)
        built = skeleton(lambda: library(config))
        blueprint = Blueprint(built, forwards=FORWARDS, instead=INSTEAD, harmless=_is_library_recorder)
        found = _blueprints[model] = shape_key(model), blueprint
    return found[1]


def _is_library_recorder(hook: Any) -> bool:
    """True for a hook of the library that only records; nothing listens to it while the engine runs."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def config_refusal(model: Any, config: Any) -> str | None:
    """The reason why the engine cannot follow a GenerationConfig; None if it can."""
    if model._gptkern_generation == "library":
        return "accelerate(generation='library') asked for it"
    if config.use_cache is False:
        return "use_cache=False"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states are to be returned"
    if config.cache_implementation in ("quantized", "offloaded", "offloaded_static"):
        return f"cache_implementation={config.cache_implementation!r}"
    if getattr(config, "is_assistant", False):
        return "the model assists another one"
    if getattr(config, "prompt_lookup_num_tokens", None) is not None:
        return ASSISTED
    return None


def call_refusal(model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> str | None:
    """The reason why the engine cannot take the inputs of a call; None if it can."""
    for name, value in kwargs.items():
        if name not in _KNOWN_INPUTS and value is not None and value is not False:
            return f"{name} was given"
    if torch.is_autocast_enabled(input_ids.device.type):
        return "autocast is on"
    modules = list(model.modules())
    if any(m.training for m in modules) and any(map(_drops, modules)):
        return "the model or a part of it is in training mode, with dropout"
    past = kwargs.get(CACHE)
    if past is not None and not _readable(past):
        return f"{CACHE} is a {type(past).__name__} that is offloaded, windowed or filled already"
    limit = model.config.max_position_embeddings
    if config.max_length is None or config.max_length > limit:
        return f"max_length passes the model's context of {limit}"
    if input_ids.shape[1] < 1:
        return "the prompt is empty"
    return _mask_refusal(model, kwargs.get("attention_mask"), kwargs.get("position_ids"))


def _drops(module: nn.Module) -> bool:
    """True if ``module`` has a dropout: it is one, or has a probability of one (OPT, attention's in most)."""
    rates = (value for name, value in vars(module).items() if "drop" in name and isinstance(value, float))
    return (isinstance(module, nn.Dropout) and module.p > 0) or any(rate > 0 for rate in rates)


def _readable(past: Any) -> bool:
    layers = getattr(past, "layers", None)
    if layers is None or getattr(past, "offloading", False):
        return False
    # A window's layers have forgotten the tokens before it, but for those that are empty.
    if any(getattr(past, "is_sliding", [])) and int(past.get_seq_length()):
        return False
    if type(past) is DynamicCache:
        return True
    return type(past) is StaticCache and int(past.get_seq_length()) == 0


def _mask_refusal(model: Any, mask: torch.Tensor | None, positions: torch.Tensor | None) -> str | None:
    if mask is not None:
        if mask.dim() != 2:
            return "attention_mask is a matrix"
        if not bool(mask[:, -1].all()):
            return "a prompt ends in padding"
        if model.config.model_type == "openai-gpt" and not bool(mask.all()):
            return "this model counts padding as positions"
    if positions is not None:
        if mask is None:
            expected = torch.arange(positions.shape[-1], device=positions.device).expand_as(positions)
        else:
            expected = mask.long().cumsum(-1)[:, -positions.shape[-1] :] - 1
        real = slice(None) if mask is None else mask[:, -positions.shape[-1] :].bool()
        if not torch.equal(positions.expand_as(expected)[real], expected[real]):
            return "position_ids was given"
    return None
