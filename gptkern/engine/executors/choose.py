"""The choice of an executor: the first that serves a model, and the reasons of those passed over."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from gptkern.as_built import untouched
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.base import Executor, TableExecutor
from gptkern.engine.executors.cpu import CpuExecutor
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.persistent import PersistentExecutor
from gptkern.engine.executors.prompt import PromptExecutor
from gptkern.engine.executors.torch import TorchExecutor
from gptkern.engine.model_state import ModelState
from gptkern.environment import fallback
from gptkern.model.decoder import Decoder
from gptkern.model.layers import LINEAR, NORM
from gptkern.ops._dispatch import use_kernel
from gptkern.routes import Route

# In the order in which they are asked; the last serves everything.
EXECUTORS: tuple[type[Executor], ...] = (PersistentExecutor, GraphExecutor, CpuExecutor, TorchExecutor)
_LAYERS = "the model's layers one by one"
STEERING = "steering vectors are added between the model's layers, which this executor does not call"
_log = logging.getLogger("gptkern")

# Dtype, device and quantisation.
Weights = tuple[torch.dtype, torch.device, str | None]


@dataclass(frozen=True)
class PassedOver:
    """An executor that was not taken.

    Attributes:
        is_fallback: It was made for such a device, and what is taken in its place is slower.
    """

    executor: type[Executor]
    reason: str
    is_fallback: bool


def choose(
    model: Decoder, dtype: torch.dtype, steering: bool = False
) -> tuple[type[Executor], list[PassedOver]]:
    """The executor of a model over a cache of ``dtype``, and those before it in order.

    Args:
        steering: Vectors are to be added between the layers, which the layers themselves alone can do.
    """
    passed: list[PassedOver] = []
    device = "cuda" if use_kernel(model.transformer.wte.weight) else "cpu"
    for executor in EXECUTORS:
        if steering and executor is not TorchExecutor:
            passed.append(PassedOver(executor, STEERING, False))
            continue
        reason = executor.serves(model, dtype)
        if executor.on_request:
            passed.append(PassedOver(executor, reason or "it is taken only on request", False))
        elif reason is None:
            return executor, passed
        else:
            passed.append(PassedOver(executor, reason, executor.made_for == device))
    raise AssertionError("the last executor serves everything")


class Executors:
    """The executors of one model over one cache: the first that serves, and for prompts what is fastest.

    The choice holds until somebody touches the model's modules; it is made anew before the next pass.

    Args:
        max_rows: Most tokens of one launch, where the executor has no bound of its own.
        steering: See ``choose``.

    Attributes:
        prefill: Runs prompts: ``decode`` itself, or units by the model's layers.
        reason: Why the fastest executor for this device was passed over; None: it was not.
    """

    def __init__(self, model: Decoder, cache: KVCache, max_rows: int, steering: bool = False) -> None:
        self.reason: str | None = None
        self._steering = steering
        # Weak, as in ``Executor``.
        self._model_ref, self._cache, self._max_rows = weakref.ref(model), cache, max_rows
        self._layers = TorchExecutor(model, cache)
        self._weights = _weights_of(model)
        self._decode: Executor | None = None
        self.prefill: Executor | PromptExecutor
        self._choose()

    @property
    def _model(self) -> Decoder:
        model = self._model_ref()
        if model is None:
            raise RuntimeError("Executors: the model is gone: keep it while its executors run")
        return model

    @property
    def unit(self) -> int:
        """Tokens of the units that a prompt is computed in; 1: its bits are the same in any division."""
        return self.prefill.unit if isinstance(self.prefill, PromptExecutor) else 1

    @property
    def decode(self) -> Executor:
        """Runs single tokens and drafts.

        Raises:
            RuntimeError: The weights were moved, quantised or given another dtype since, or what served
                until now does so no more and ``GPTKERN_STRICT=1`` is set.
        """
        weights = _weights_of(self._model)
        if weights != self._weights:
            raise RuntimeError(
                f"GPT: weights changed while generation was under way: they were {_in_words(self._weights)}, "
                f"they are {_in_words(weights)}"
            )
        autocast = torch.is_autocast_enabled(weights[1].type)
        if self._state.stirred() or autocast != self._autocast or self._decode is None:
            self._choose()
        assert self._decode is not None
        return self._decode

    def weights_written(self) -> None:
        """See ``Executor``."""
        if self._decode is not None:
            self._decode.weights_written()

    def look_again(self) -> None:
        """Look at the whole model: at much that may change without a trace that ``decode`` finds.

        Raises:
            RuntimeError: The layers themselves decode, and ``GPTKERN_STRICT=1`` is set.
        """
        if self._decode is None or self._way() != self._chosen_for or self._state.differs():
            self._choose()
        else:
            self._tell()

    def _way(self) -> tuple[object, bool]:
        """The choice's premises beside the model."""
        return EXECUTORS, use_kernel(self._model.transformer.wte.weight)

    def _choose(self) -> None:
        model = self._model
        self._state, self._chosen_for = ModelState(model), self._way()
        self._autocast = torch.is_autocast_enabled(model.device.type)
        kind, self._passed = choose(model, self._cache.dtype, self._steering)
        for other in self._passed:
            _log.debug("decoding: the %s executor is passed over: %s", other.executor.name, other.reason)
        if type(self._decode) is not kind:
            self._decode = None
        self._tell()
        if self._decode is None:
            _log.debug("decoding: the %s executor runs", kind.name)
            self._decode = self._made(kind)
            self.prefill = self._decode
            if not self._decode.row_invariant or self._decode.prompt_tokens is not None:
                self.prefill = PromptExecutor(self._cache, self._layers, self._decode)

    def _tell(self) -> None:
        """Warn, or in strict mode raise, where an executor made for this device was passed over."""
        self.reason = next((other.reason for other in self._passed if other.is_fallback), None)
        for other in self._passed:
            if other.is_fallback:
                fallback("decoding", _LAYERS, other.reason)

    def _made(self, kind: type[Executor]) -> Executor:
        if issubclass(kind, TableExecutor) and not issubclass(kind, CpuExecutor):
            return kind(self._model, self._cache, self._max_rows)
        return kind(self._model, self._cache)


def _weights_of(model: Decoder) -> Weights:
    # One walk to the weight: this is asked in every pass, and each step of a walk costs a microsecond.
    weight, quantised = model.transformer.wte.weight, model.quantization
    return weight.dtype, weight.device, None if quantised is None else quantised.format


def _in_words(weights: Weights) -> str:
    dtype, device, quantised = weights
    return f"{dtype} on {device}" + (f" quantised as {quantised}" if quantised else "")


def routes(model: Decoder) -> Iterator[Route]:
    """The routes of a model's parts, and the reasons why executors before the chosen one were passed over."""
    kernel = use_kernel(model.transformer.wte.weight)
    ops: Literal["kernel", "reference"] = "kernel" if kernel else "reference"
    norms = ("ln_1", "ln_2", "ln_f", "post_attn_norm", "post_mlp_norm")
    parts = {"norm": (NORM, norms), "mlp": (LINEAR, ("mlp.c_fc", "mlp.c_proj"))}
    norm = "rms_norm" if model.spec.norm.kind == "rms" else "layer_norm"
    names = {"norm": f"{norm} and add_{norm}", "mlp": "gated_mlp" if model.spec.gated else "gelu_mlp"}
    for part, (forwards, ends) in parts.items():
        route = Route(part, ops, names[part])
        for name, module in model.named_modules():
            if name.endswith(ends) and not untouched(module, *forwards):
                route = Route(part, "fallback", f"{name} was put in or hooked: it is called by itself")
                break
        yield route
    chosen, passed = choose(model, model.dtype)
    for other in passed:
        yield Route(f"decode by {other.executor.name}", "passed over", other.reason)
    reasons = [other for other in passed if other.is_fallback]
    if chosen is TorchExecutor:
        told = reasons[0].reason if reasons else "no executor was made for this device"
        yield Route("decode", "fallback", f"{_LAYERS}: {told}")
    else:
        yield Route("decode", "engine", f"the {chosen.name} executor")
