"""``accelerate``, ``restore`` and ``explain`` for models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import transformers
from torch import nn

from gptkern._at_import import NAME, PAGED
from gptkern.as_built import untouched
from gptkern.drop_in import Generation, Rng
from gptkern.ops._dispatch import use_kernel
from gptkern.quantization import METHOD
from gptkern.routes import Explanation, Route
from gptkern.transformers.attentions import RotaryAttention
from gptkern.transformers.blocks import OPTBlock
from gptkern.transformers.families import FAMILIES
from gptkern.transformers.loop import loop_reason
from gptkern.transformers.models import LIBRARY_CLASSES, LanguageModel, accelerated_class, loss_reason
from gptkern.transformers.modules import SWAPS, activation_name, activation_of, norm_names
from gptkern.transformers.parts import NORMS, LayerNorm, Products, RMSNorm
from gptkern.transformers.refusals import config_refusal, known_attention, model_refusal
from gptkern.transformers.view import forget, lay_back

_GPTS = (
    "GPT2LMHeadModel",
    "GPT2Model",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
    "GPT2DoubleHeadsModel",
    "OpenAIGPTLMHeadModel",
)
SUPPORTED = (*_GPTS, *(cls.__name__ for family in FAMILIES.values() for cls in family.models))
_SUPPORTED = f"{', '.join(_GPTS)}, and the models of {', '.join(FAMILIES)}"
MAX_HEAD_DIM = 256


def accelerate(model: Any, *, generation: Generation = "auto", rng: Rng = "torch") -> Any:
    """Make a loaded transformers model run on gptkern's ops, in place: see ``gptkern.accelerate``."""
    _check(model, generation, rng)
    if is_accelerated(model):
        if isinstance(model, LanguageModel):
            model._gptkern_generation, model._gptkern_rng = generation, rng
        return model
    undo: list[Callable[[], None]] = []
    try:
        _apply(model, undo)
        if not is_accelerated(model):
            raise RuntimeError(f"accelerate: transformers {transformers.__version__} kept its own attention")
    except BaseException:
        for reversal in reversed(undo):
            reversal()
        raise
    if isinstance(model, LanguageModel):
        model._gptkern_generation, model._gptkern_rng = generation, rng
    return model


def restore(model: Any) -> Any:
    """Undo ``accelerate``: see ``gptkern.restore``."""
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"restore: model is {type(model).__name__}; a transformers model is needed")
    for module in model.modules():
        library, _ = getattr(type(module), "_gptkern_library", (None, None))
        if library is not None:
            module.__class__ = library
        module.__dict__.pop("padding_attends", None)
    if isinstance(model, LanguageModel):
        for name in ("_gptkern_generation", "_gptkern_rng"):
            model.__dict__.pop(name, None)
        forget(model)
        lay_back(model)
        model.__class__ = model._gptkern_library_class
    previous = model.__dict__.pop("_gptkern_attention", None)
    if previous is not None and model.config._attn_implementation == NAME:
        model.set_attn_implementation(previous)
    return model


def is_accelerated(model: Any) -> bool:
    """True if blocks and, for models with a choice, attention are gptkern's."""
    blocks = [m for m in model.modules() if type(m) in SWAPS or type(m) in SWAPS.values()]
    swapped = bool(blocks) and all(type(m) in SWAPS.values() for m in blocks)
    chosen = model.config.model_type == "openai-gpt" or "_gptkern_attention" in model.__dict__
    return swapped and chosen


def explain(model: Any, generation_config: Any = None) -> Explanation:
    """The route of each part of a transformers model and the reason for it: see ``gptkern.explain``.

    Raises:
        TypeError: ``model`` is no transformers model.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"explain: model is {type(model).__name__}; a GPT or a transformers model is needed")
    if not _supported(model):
        reason = f"a {type(model).__name__}: gptkern.accelerate takes {_SUPPORTED}"
    elif not is_accelerated(model):
        reason = "not accelerated: gptkern.accelerate(model)"
    else:
        parts = (_attention_route, _norm_route, _mlp_route, _loss_route)
        return Explanation([*(part(model) for part in parts), _generate_route(model, generation_config)])
    others = (Route(part, "library", reason) for part in ("norm", "mlp", "loss", "generate"))
    return Explanation([_attention_route(model), *others])


def _supported(model: Any) -> bool:
    names = {cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers.")}
    return bool(names & set(SUPPORTED))


def _check(model: Any, generation: str, rng: str) -> None:
    if not _supported(model):
        raise TypeError(f"accelerate: model is {type(model).__name__}; supported are {_SUPPORTED}")
    if generation not in ("auto", "library"):
        raise ValueError(f"accelerate: generation is {generation!r}; 'auto' or 'library' is needed")
    if rng not in ("torch", "philox"):
        raise ValueError(f"accelerate: rng is {rng!r}; 'torch' or 'philox' is needed")
    refuse_quantised(model.config)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"accelerate: the model's head dimension is {head_dim}; at most {MAX_HEAD_DIM} is supported"
        )
    if activation_of(config) is None:
        raise ValueError(
            f"accelerate: the model's activation is {activation_name(config)!r}; "
            "gelu, relu and silu forms are supported"
        )


def refuse_quantised(config: Any) -> None:
    """Refuse checkpoints of ``gptkern quantize``: transformers skips their weights and draws new ones.

    Raises:
        ValueError: ``config`` belongs to such a checkpoint.
    """
    section = getattr(config, "quantization_config", None)
    if isinstance(section, dict):
        method = section.get("quant_method")
    else:
        method = getattr(section, "quant_method", None)
    if method == METHOD:
        raise ValueError(
            "accelerate: the checkpoint was quantised by gptkern, which transformers does not read: open it "
            "by gptkern.GPT.from_pretrained, or open the one that it was made from"
        )


def _apply(model: Any, undo: list[Callable[[], None]]) -> None:
    def become(module: nn.Module, cls: type) -> None:
        old = module.__class__
        undo.append(lambda: setattr(module, "__class__", old))
        module.__class__ = cls

    if model.config.model_type != "openai-gpt":
        previous = model.config._attn_implementation
        undo.append(lambda: model.set_attn_implementation(previous))
        # An attention that is not the library's may compute anything, and stays.
        if known_attention(previous):
            model.set_attn_implementation(NAME)
        if model.config._attn_implementation == NAME or not known_attention(previous):
            model._gptkern_attention = previous
            undo.append(lambda: model.__dict__.pop("_gptkern_attention", None))
    norms = norm_names(model.config)
    for name, module in model.named_modules():
        if type(module) in SWAPS:
            become(module, SWAPS[type(module)])
        elif type(module) is nn.LayerNorm and name.rsplit(".", 1)[-1] in norms:
            become(module, LayerNorm)
        if _answers_questions(model) and hasattr(module, "is_causal"):
            # Its loss is a softmax over all positions, padding after a text included.
            module.padding_attends = True
            undo.append(lambda m=module: m.__dict__.pop("padding_attends", None))  # type: ignore[misc]
    if isinstance(model, LIBRARY_CLASSES) and not isinstance(model, LanguageModel):
        plain: Any = type(model)
        become(model, accelerated_class(plain))


def _answers_questions(model: Any) -> bool:
    return any(cls.__name__.endswith("ForQuestionAnswering") for cls in type(model).__mro__)


def _ops_route(model: Any) -> Literal["kernel", "reference"]:
    return "kernel" if use_kernel(next(model.parameters())) else "reference"


def _attention_route(model: Any) -> Route:
    by_class = model.config.model_type == "openai-gpt" and is_accelerated(model)
    if not by_class and model.config._attn_implementation not in (NAME, PAGED):
        return Route("attention", "library", f"attn_implementation is {model.config._attn_implementation!r}")
    turned = any(isinstance(module, RotaryAttention) for module in model.modules())
    ops = "rotary and flash_attention" if turned else "flash_attention"
    return Route("attention", _ops_route(model), f"{ops}; with output_attentions the library's expression")


def _norm_route(model: Any) -> Route:
    names = norm_names(model.config)
    for name, norm in model.named_modules():
        if name.rsplit(".", 1)[-1] in names and not untouched(norm, *NORMS):
            return Route("norm", "fallback", f"{name} is a {type(norm).__name__} that was put in or hooked")
    rms = any(isinstance(module, RMSNorm) for module in model.modules())
    ops = "rms_norm and add_rms_norm" if rms else "layer_norm and add_layer_norm"
    return Route("norm", _ops_route(model), f"{ops}; under autocast the library's")


def _mlp_route(model: Any) -> Route:
    products: Products | None = None
    for name, module in model.named_modules():
        if not (name.rsplit(".", 1)[-1] == "mlp" or isinstance(module, OPTBlock)):
            continue
        products = getattr(module, "products", None)
        reason = "was put in" if products is None else products.reason(module)
        if reason is not None:
            return Route("mlp", "fallback", f"{name}: {reason}")
    if products is not None and len(products.first) == 2:
        why = "linear_act, linear and linear_residual, as gate and up are two matrices"
        return Route("mlp", _ops_route(model), why)
    gated = products is not None and products.gated
    return Route("mlp", _ops_route(model), "gated_mlp" if gated else "gelu_mlp")


def _loss_route(model: Any) -> Route:
    if LanguageModel not in type(model).__mro__:
        return Route("loss", "library", f"{type(model).__name__} keeps its own")
    if _ops_route(model) == "reference":
        return Route("loss", "library", "on a CPU the logits are at hand and the fused loss saves nothing")
    reason = loss_reason(model.config)
    if reason is not None:
        return Route("loss", "library", reason)
    return Route("loss", "kernel", "linear_cross_entropy")


def _generate_route(model: Any, config: Any) -> Route:
    if LanguageModel not in type(model).__mro__:
        return Route("generate", "library", f"{type(model).__name__} does not generate on the engine")
    reason = model_refusal(model) or config_refusal(model, config or model.generation_config)
    if reason is None:
        own = loop_reason(model, config or model.generation_config)
        how = "its loop and sampler, where it has every logits processor"
        if own is not None:
            how = f"its passes in transformers' loop: {own}"
        return Route("generate", "engine", how)
    return Route("generate", "library" if "asked for it" in reason else "fallback", reason)
