"""transformers' classes of each family, and the fronts that an accelerated model has in their place.

A front is a subclass of the library's class, under its name: an existing module changes its ``__class__`` to
it, so that parameters, their names, hooks and the place in the model stay, and the old class undoes all.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gpt_bigcode import modeling_gpt_bigcode
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gptj import modeling_gptj
from transformers.models.granite import modeling_granite
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.opt import modeling_opt
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.smollm3 import modeling_smollm3
from transformers.models.starcoder2 import modeling_starcoder2

from gptkern.transformers.attentions import Heads, RotaryAttention
from gptkern.transformers.blocks import BigCodeBlock, Block, OPTBlock, Places
from gptkern.transformers.parts import Perceptron, Products, RMSNorm

_MODELS = (
    "ForCausalLM",
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


@dataclass(frozen=True)
class LibraryFamily:
    """One family of transformers.

    Attributes:
        model_type: As in ``config.json``.
        language_model: Its causal language model.
        models: All of its classes that can be accelerated.
        norms: The names of its norms outside attention, in a layer and at the end.
        perceptron: The name under which a layer has its perceptron; None: the layer is one itself.
        body: The path of the module that has embeddings and layers, in the language model.
        activation: The activation's name in its config.
    """

    model_type: str
    language_model: type[Any]
    models: tuple[type[Any], ...]
    norms: frozenset[str]
    perceptron: str | None
    body: str
    activation: str


FAMILIES: dict[str, LibraryFamily] = {}
# The library's class of a module -> its front.
FRONTS: dict[type[nn.Module], type[nn.Module]] = {}
# All modules of the library's that a model of these families may have.
LIBRARY_MODULES: list[type[nn.Module]] = []


def _front(library: type[nn.Module], base: type[nn.Module], **attributes: Any) -> None:
    namespace = {
        "__module__": __name__,
        "__qualname__": library.__qualname__,
        "__doc__": f"``{library.__module__}.{library.__qualname__}``, accelerated.",
        "_gptkern_library": (library, library.forward),
        **attributes,
    }
    front = type(library.__name__, (base, library), namespace)
    FRONTS[library] = front
    # Pickled models look their classes up here.
    globals()[front.__name__] = front


def _family(
    module: ModuleType,
    prefix: str,
    places: Places | None,
    products: Products,
    heads: Heads | None,
    *,
    base: type[nn.Module] = Block,
    block: str = "DecoderLayer",
    mlp: str | None = "MLP",
    rms: str | None = "variance_epsilon",
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm", "norm"),
    body: str = "model",
    activation: str = "hidden_act",
    models: tuple[str, ...] = _MODELS,
) -> None:
    if rms is not None:
        _front(getattr(module, f"{prefix}RMSNorm"), RMSNorm, eps_name=rms, unit_offset=rms == "eps")
    if mlp is not None:
        _front(getattr(module, prefix + mlp), Perceptron, products=products)
    if heads is not None:
        _front(getattr(module, f"{prefix}Attention"), RotaryAttention, heads=heads)
    if places is not None:
        own = {} if mlp is not None else {"products": products}
        _front(getattr(module, prefix + block), base, places=places, **own)
    LIBRARY_MODULES.extend(
        c for c in vars(module).values() if isinstance(c, type) and issubclass(c, nn.Module)
    )
    classes = tuple(getattr(module, prefix + name) for name in models if hasattr(module, prefix + name))
    model_type = classes[0].config_class.model_type
    perceptron = None if mlp is None else "mlp"
    FAMILIES[model_type] = LibraryFamily(
        model_type, classes[0], classes, frozenset(norms), perceptron, body, activation
    )


_GATED = Products(("gate_proj", "up_proj"), "down_proj", "act_fn", gated=True)
_HEADS = Heads()
_SERIAL = Places("input_layernorm", "post_attention_layernorm")

_family(modeling_llama, "Llama", _SERIAL, _GATED, _HEADS)
_family(modeling_smollm3, "SmolLM3", _SERIAL, _GATED, Heads(window="module"))
_family(modeling_mistral, "Mistral", _SERIAL, _GATED, Heads(window="config"))
_family(modeling_qwen2, "Qwen2", _SERIAL, _GATED, Heads(window="module"))
_family(modeling_qwen3, "Qwen3", _SERIAL, _GATED, Heads(norm="head", window="module"))
_family(
    modeling_phi3,
    "Phi3",
    Places(
        "input_layernorm",
        "post_attention_layernorm",
        dropout_1="resid_attn_dropout",
        dropout_2="resid_mlp_dropout",
    ),
    Products(("gate_up_proj",), "down_proj", "activation_fn", gated=True),
    Heads(("qkv_proj",), window="config"),
)
_family(
    modeling_granite,
    "Granite",
    Places("input_layernorm", "post_attention_layernorm", factor="residual_multiplier"),
    _GATED,
    _HEADS,
)
# The norms of OLMo 2 follow the branches: there is no addition before one.
_family(
    modeling_olmo2,
    "Olmo2",
    None,
    _GATED,
    Heads(norm="whole"),
    norms=("post_attention_layernorm", "post_feedforward_layernorm", "norm"),
)
_family(
    modeling_gemma3,
    "Gemma3",
    Places(
        "input_layernorm",
        "pre_feedforward_layernorm",
        after_1="post_attention_layernorm",
        after_2="post_feedforward_layernorm",
    ),
    _GATED,
    Heads(norm="head", window="module"),
    rms="eps",
    norms=(
        *("input_layernorm", "post_attention_layernorm", "norm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    activation="hidden_activation",
    models=("ForCausalLM", "TextModel", "TextForSequenceClassification"),
)
_family(
    modeling_gpt_neox,
    "GPTNeoX",
    Places(
        "input_layernorm",
        "post_attention_layernorm",
        "attention",
        dropout_1="post_attention_dropout",
        dropout_2="post_mlp_dropout",
    ),
    Products(("dense_h_to_4h",), "dense_4h_to_h"),
    Heads(("query_key_value",), "dense", per_head=True),
    block="Layer",
    rms=None,
    norms=("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
    body="gpt_neox",
)
_family(
    modeling_gptj,
    "GPTJ",
    Places("ln_1", None, "attn", parallel=True),
    Products(("fc_in",), "fc_out"),
    Heads(last="out_proj", dropout="resid_dropout", interleaved=True),
    block="Block",
    rms=None,
    norms=("ln_1", "ln_f"),
    body="transformer",
    activation="activation_function",
)
_family(
    modeling_opt,
    "OPT",
    Places("self_attn_layer_norm", "final_layer_norm"),
    Products(("fc1",), "fc2", "activation_fn"),
    None,
    base=OPTBlock,
    mlp=None,
    rms=None,
    norms=("self_attn_layer_norm", "final_layer_norm"),
    body="model.decoder",
    activation="activation_function",
)
_family(
    modeling_gpt_bigcode,
    "GPTBigCode",
    Places("ln_1", "ln_2", "attn"),
    Products(("c_fc",), "c_proj"),
    None,
    base=BigCodeBlock,
    block="Block",
    rms=None,
    norms=("ln_1", "ln_2", "ln_f"),
    body="transformer",
    activation="activation_function",
)
_family(
    modeling_starcoder2,
    "Starcoder2",
    _SERIAL,
    Products(("c_fc",), "c_proj", dropout="residual_dropout"),
    Heads(window="config", dropout="residual_dropout"),
    rms=None,
)
