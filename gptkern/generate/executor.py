"""What takes a cache's sequences one token on: each executor says what it serves, or why not.

Every executor computes what the model's own layers compute. One that reads weights where they lie serves a
model as long as that is as it was built; any other model runs layer by layer, as PyTorch calls modules.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from gptkern import _native
from gptkern.as_built import Blueprint, Watch, forwards_of, own_method, skeleton, untouched
from gptkern.decode import DecodeStep
from gptkern.environment import fallback
from gptkern.generate.cpu_step import MOST_ROWS, CpuStep, unserved
from gptkern.model.decoder import LINEAR, MLP, NORM, Attention, Block, Decoder, Norm, Transformer
from gptkern.ops._dispatch import use_kernel
from gptkern.quantize import QuantizedLinear
from gptkern.routes import Route

if TYPE_CHECKING:
    from gptkern.config import GPTConfig
    from gptkern.engine.cache import KVCache
    from gptkern.model.decoder import GPTOutput

# Capturing a graph takes as long as it saves in about ten steps.
LEAST_STEPS = 16
_LAYERS = "the model's layers one by one"
_GPT_FORWARD = Decoder.forward
_PASS = ("__call__", "forward")
_TORCHS: tuple[type, ...] = (nn.Embedding, nn.ModuleList, nn.Linear)
_OURS: tuple[type, ...] = (QuantizedLinear, Transformer, Block, Norm, Attention, MLP)
_FORWARDS = {kind: forwards_of(kind) for kind in (*_TORCHS, *_OURS)}


def changed(model: Decoder) -> str | None:
    """What makes ``model`` other than as built, so that its weights do not say all; None: nothing does."""
    if type(model).forward is not _GPT_FORWARD or own_method(model, _PASS) is not None:
        return f"the model, a {type(model).__name__}, has a forward of its own"
    return _blueprint(model.config).difference(model)


@functools.lru_cache(maxsize=8)
def _blueprint(config: GPTConfig) -> Blueprint:
    built = skeleton(lambda: Decoder(config))
    return Blueprint(built, forwards=_FORWARDS, instead={nn.Linear: (QuantizedLinear,)})


def refused(model: Decoder, dtype: torch.dtype) -> str | None:
    """Why nothing but the layers themselves can decode, with a cache of ``dtype``; None where a step can."""
    reason = changed(model)
    if reason is None and torch.is_autocast_enabled(model.device.type):
        reason = "autocast is on"
    if reason is None and not use_kernel(model.transformer.wte.weight):
        reason = _refused_by_cpu(model, dtype)
    return reason


def _refused_by_cpu(model: Decoder, dtype: torch.dtype) -> str | None:
    if _native.extension is None:
        return "gptkern._C is not built"
    if not _native.extension.has_decoder:
        return "the CPU's decode step needs AVX2, which this processor lacks"
    return unserved(model, dtype)


def pays(model: Decoder, rows: int, steps: int) -> bool:
    """Whether a step that could decode is faster than the layers themselves."""
    return steps >= LEAST_STEPS if use_kernel(model.transformer.wte.weight) else rows <= MOST_ROWS


class Executor:
    """Takes the sequences of a cache one token on, by the fastest way that computes what the model does.

    Args:
        cache: Holds the prompts; every call takes each of its sequences one token on.
        rows, steps: How many sequences, and how many calls there will be.

    Attributes:
        step: The decode step that serves; None: the model's own layers.

    Raises:
        RuntimeError: Only the layers themselves serve, and ``GPTKERN_STRICT=1`` is set.
    """

    def __init__(self, model: Decoder, cache: KVCache, *, rows: int, steps: int) -> None:
        self._model, self._cache = model, cache
        self.step: CpuStep | DecodeStep | None = None
        if not pays(model, rows, steps):
            return
        self._watch = Watch(model)
        reason = refused(model, cache.dtype)
        if reason is not None:
            fallback("decoding", _LAYERS, reason)
            return
        self.step = (DecodeStep if use_kernel(model.transformer.wte.weight) else CpuStep)(model, cache)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``(rows, vocab_size)`` after ``tokens`` ``(rows,)`` int64."""
        reason = self.overtaken()
        if reason is not None:
            fallback("decoding", _LAYERS, reason)
            self.step = None
        if self.step is not None:
            return self.step(tokens)
        output: GPTOutput = self._model(tokens[:, None], cache=self._cache)
        return output.logits[:, -1]

    def overtaken(self) -> str | None:
        """What somebody did to the model since, so that ``step`` computes it no more; None: nothing."""
        return changed(self._model) if self.step is not None and self._watch.stirred() else None


def routes(model: Decoder) -> Iterator[Route]:
    """How the parts of a model run: a batch of the usual size, for long enough."""
    kernel = use_kernel(model.transformer.wte.weight)
    ops: Literal["kernel", "reference"] = "kernel" if kernel else "reference"
    parts = {"norm": (NORM, ("ln_1", "ln_2", "ln_f")), "mlp": (LINEAR, ("mlp.c_fc", "mlp.c_proj"))}
    names = {"norm": "layer_norm and add_layer_norm", "mlp": "gelu_mlp"}
    for part, (forwards, ends) in parts.items():
        route = Route(part, ops, names[part])
        for name, module in model.named_modules():
            if name.endswith(ends) and not untouched(module, *forwards):
                route = Route(part, "fallback", f"{name} was put in or hooked: it is called by itself")
                break
        yield route
    reason = refused(model, model.dtype)
    if reason is not None:
        yield Route("decode", "fallback", f"{_LAYERS}: {reason}")
    elif kernel:
        yield Route("decode", "engine", f"the decode step's kernels, from {LEAST_STEPS} new tokens on")
    else:
        yield Route("decode", "engine", f"the CPU's decode step, up to {MOST_ROWS} sequences")
