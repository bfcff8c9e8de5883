"""``generate`` on gptkern's engine: transformers' loop around gptkern's prefill, paged cache and executors.

The library's loop stays, so that every processor, stopping criterion, streamer and field of the result is
its own; the engine computes the logits that the loop calls the model for. An ``EngineCache`` takes the
cache's place in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.openai import modeling_openai as gpt1

from gptkern._at_import import NAME
from gptkern.as_built import Blueprint, Watch, own_method, skeleton
from gptkern.config import GPTConfig
from gptkern.engine.cache import PAGE_SIZE, KVCache
from gptkern.engine.executors.choose import Executors
from gptkern.model.decoder import Decoder, GPTOutput
from gptkern.ops._dispatch import use_kernel
from gptkern.transformers.modules import CACHE, FORWARDS, INSTEAD, activation_of

# The inputs of ``_sample`` that the engine knows; any other is a reason to refuse the call.
_KNOWN_INPUTS = {"attention_mask", "use_cache", CACHE, "logits_to_keep", "position_ids"}
_GPT1_NAMES = {"wte": "tokens_embed", "wpe": "positions_embed"}
_views: WeakKeyDictionary[nn.Module, tuple[str, Decoder]] = WeakKeyDictionary()
_blueprints: WeakKeyDictionary[nn.Module, tuple[str, Blueprint]] = WeakKeyDictionary()
_LIBRARY_CLASSES = (gpt2.GPT2LMHeadModel, gpt1.OpenAIGPTLMHeadModel)
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


def view(model: Any) -> Decoder:
    """A ``Decoder`` over the model's own weights: an update of one changes the other."""
    if use_kernel(model.lm_head.weight):
        _lay_rows(model)
    key, previous = _views.get(model, ("", None))
    sources = _sources(model)
    if previous is not None and key == _shape_key(model):
        parameters = dict(previous.named_parameters(remove_duplicate=False))
        if all(p.data_ptr() == sources[name].data_ptr() for name, p in parameters.items()):
            return previous
    decoder = skeleton(lambda: Decoder(gpt_config(model)))
    for name, source in sources.items():
        owner, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(owner), leaf, nn.Parameter(source.detach(), requires_grad=False))
    _views[model] = _shape_key(model), decoder.eval()
    return decoder


def _lay_rows(model: Any) -> None:
    """Store the library's ``(in, out)`` matrices transposed, so that kernels read rows of ``(out, in)``.

    Shapes, values and the parameters themselves stay, and an update in place keeps the layout.
    """
    for block in model.transformer.h:
        for parameter in block.parameters():
            if parameter.dim() == 2 and not parameter.t().is_contiguous():
                parameter.data = parameter.data.t().contiguous().t()


def _sizes(model: Any) -> dict[str, int]:
    """The numbers of layers and of tokens by the model's modules, which may differ from its config."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    tokens = model.config.vocab_size if weight is None else weight.shape[0]
    return {"n_layer": len(getattr(model.transformer, "h", ())), "vocab_size": tokens}


def _shape_key(model: Any) -> str:
    """All numbers that a model's modules are built from, as text."""
    return repr((_sizes(model), sorted(vars(model.config).items(), key=lambda item: item[0])))


def gpt_config(model: Any) -> GPTConfig:
    """The model's shape as gptkern names it."""
    return GPTConfig.from_dict(model.config.to_dict()).replace(**_sizes(model))


def _sources(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensor for every parameter name of ``view(model)``, matrices as ``(out, in)`` views."""
    body = model.transformer
    gpt1_names = model.config.model_type == "openai-gpt"
    found = {"lm_head.weight": model.lm_head.weight}
    for ours in ("wte", "wpe"):
        theirs = _GPT1_NAMES[ours] if gpt1_names else ours
        found[f"transformer.{ours}.weight"] = getattr(body, theirs).weight
    for index, block in enumerate(body.h):
        for name, parameter in block.named_parameters():
            matrix = parameter.dim() == 2
            found[f"transformer.h.{index}.{name}"] = parameter.t() if matrix else parameter
    if not gpt1_names:
        found["transformer.ln_f.weight"], found["transformer.ln_f.bias"] = body.ln_f.weight, body.ln_f.bias
    return found


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
    return changed(model)


def changed(model: Any) -> str | None:
    """The first difference between ``model`` and what its library class builds; None if there is none."""
    name = own_method(model, _LOOP_METHODS) or _overridden(model)
    return f"{type(model).__name__} has a {name} of its own" if name else _blueprint(model).difference(model)


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
    if found is None or found[0] != _shape_key(model):
        config = copy.deepcopy(model.config)
        for name, size in _sizes(model).items():
            setattr(config, name, size)
        library = next(cls for cls in type(model).__mro__ if cls in _LIBRARY_CLASSES)
        built = skeleton(lambda: library(config))
        blueprint = Blueprint(built, forwards=FORWARDS, instead=INSTEAD, harmless=_is_library_recorder)
        found = _blueprints[model] = _shape_key(model), blueprint
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
        return "assisted decoding checks several tokens at once"
    return None


def call_refusal(model: Any, input_ids: torch.Tensor, config: Any, kwargs: dict[str, Any]) -> str | None:
    """The reason why the engine cannot take the inputs of a call; None if it can."""
    for name, value in kwargs.items():
        if name not in _KNOWN_INPUTS and value is not None and value is not False:
            return f"{name} was given"
    if torch.is_autocast_enabled(input_ids.device.type):
        return "autocast is on"
    modules = list(model.modules())
    if any(m.training for m in modules) and any(m.p > 0 for m in modules if isinstance(m, nn.Dropout)):
        return "the model or a part of it is in training mode, with dropout"
    past = kwargs.get(CACHE)
    if past is not None and not _readable(past):
        return f"{CACHE} is a {type(past).__name__} that is offloaded, windowed or filled already"
    limit = model.config.n_positions
    if config.max_length is None or config.max_length > limit:
        return f"max_length passes the model's context of {limit}"
    if input_ids.shape[1] < 1:
        return "the prompt is empty"
    return _mask_refusal(model, kwargs.get("attention_mask"), kwargs.get("position_ids"))


def _readable(past: Any) -> bool:
    layers = getattr(past, "layers", None)
    if layers is None or any(getattr(past, "is_sliding", [])) or getattr(past, "offloading", False):
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


class EngineCache(Cache):
    """The cache of one ``generate`` call, and the executors that run the model on it.

    Attributes:
        whole_ids: True if ``run`` gets whole sequences instead of new tokens, as in a model without a cache.

    Args:
        model: An accelerated language model for which ``model_refusal`` is None.
        rows: Sequences in the batch.
        max_len: The length of the longest sequence, padding included.
        past: The cache that the library prepared or the caller passed; its contents are copied.
        mask: ``(rows, past + new)``, or None.
    """

    def __init__(
        self, model: Any, rows: int, max_len: int, past: Cache | None, mask: torch.Tensor | None
    ) -> None:
        super().__init__(layers=[])
        self._gpt = view(model)
        self._model, self._watch = model, Watch(model)
        self.whole_ids = model.config.model_type == "openai-gpt"
        self._max_len = max_len
        self._seen = 0
        self._mask = None if mask is None or bool(mask.all()) else mask.bool()
        self._executors: Executors | None = None
        self._kv = KVCache.for_config(
            self._gpt.config,
            max_seqs=rows,
            max_len=self._gpt.config.n_positions,
            cache_tokens=rows * -(-max_len // PAGE_SIZE) * PAGE_SIZE,
            dtype=self._gpt.dtype,
            device=self._gpt.device,
        )
        self._kv.allocate(rows)
        self._past = past
        self._past_length = 0 if past is None or self.whole_ids else int(past.get_seq_length())
        if self._past_length:
            self._copy_past(past)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens in a row, padding included."""
        return self._seen

    @property
    def vocab_size(self) -> int:
        """The number of logits in a row."""
        return self._gpt.config.vocab_size

    @property
    def is_linear(self) -> list[bool]:
        """True for each layer with a state instead of keys and values (from transformers 5.24 on): none."""
        return [False] * self._gpt.config.n_layer

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Give row i the tokens of row ``beam_idx[i]``, a beam of the same prompt."""
        ids, order = self._kv.sequences, beam_idx.tolist()
        self._kv.reorder([ids[i] for i in order])

    def run(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits after the last of ``input_ids``, ``(rows, 1, vocab_size)``.

        Raises:
            RuntimeError: The model was hooked or changed since, so that its layers must be called.
        """
        reason = changed(self._model) if self._watch.stirred() else None
        if reason is not None:
            raise RuntimeError(f"generate: {reason}, since this generation began; begin it anew")
        if self.whole_ids:
            input_ids = input_ids[:, self._seen :]
        input_ids = input_ids.to(self._gpt.device)
        with torch.inference_mode():
            if self._seen and input_ids.shape[1] == 1:
                if self._executors is None:
                    self._executors = Executors(self._gpt, self._kv, input_ids.shape[0])
                logits = self._executors.decode(input_ids[:, 0])[:, None]
            else:
                logits = self._prefill(input_ids)
        self._seen += input_ids.shape[1]
        # A tensor of inference mode cannot be written to outside it.
        return logits.clone()

    def hand_back(self) -> Cache | None:
        """The library's cache with the keys and values of this call; padding is zeros."""
        past, rows = self._past, len(self._kv.sequences)
        if past is None or self.whole_ids:
            return past
        token_mask = torch.ones(rows, self._seen, dtype=torch.bool, device=self._kv.device)
        if self._mask is not None:
            width = min(self._mask.shape[1], self._seen)
            token_mask[:, :width] = self._mask[:, :width]
        places = (token_mask.long().cumsum(1) - 1).clamp_min(0)
        pages = self._kv.page_table[:rows].long().gather(1, places // PAGE_SIZE)
        for layer in range(self._gpt.config.n_layer):
            tensors = []
            for pool in (self._kv.k[layer], self._kv.v[layer]):
                tokens = pool[pages, places % PAGE_SIZE].masked_fill(~token_mask[..., None, None], 0)
                tensors.append(tokens[:, self._past_length :].transpose(1, 2).contiguous())
            past.update(*tensors, layer)
        return past

    def _prefill(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = None
        if self._mask is not None:
            mask = self._mask[:, self._seen : self._seen + input_ids.shape[1]]
            if mask.shape[1] < input_ids.shape[1]:
                extra = mask.new_ones(mask.shape[0], input_ids.shape[1] - mask.shape[1])
                mask = torch.cat([mask, extra], 1)
            if not bool(mask.any()):
                # A chunk of the prompts that is padding throughout: nobody reads these logits.
                vocab_size = self._gpt.config.vocab_size
                return torch.zeros(len(mask), 1, vocab_size, dtype=self._gpt.dtype, device=mask.device)
            # Padding may hold ids that are no tokens of the model.
            input_ids = input_ids.masked_fill(~mask, 0)
        output: GPTOutput = self._gpt(input_ids, attention_mask=mask, cache=self._kv, logits_to_keep=1)
        return output.logits[:, -1:]

    def _copy_past(self, past: Any) -> None:
        """Copy the keys and values of a library's cache, without its padding."""
        seen, rows = self._past_length, len(self._kv.sequences)
        token_mask = torch.ones(rows, seen, dtype=torch.bool, device=self._kv.device)
        if self._mask is not None:
            token_mask = self._mask[:, :seen]
        forward_pass = self._kv.extend(token_mask.sum(1).tolist())
        for layer, source in enumerate(past.layers):
            for pool, tensor in ((self._kv.k[layer], source.keys), (self._kv.v[layer], source.values)):
                new = tensor.transpose(1, 2)[token_mask]
                pool.flatten(0, 1)[forward_pass.slots] = new.to(pool.dtype)
        forward_pass.commit()
        self._seen = seen
