"""WeightsVersion: a number that changes when what a model computes may have changed."""

from __future__ import annotations

import types
import weakref
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from gptkern.as_built import Watch
from gptkern.model.decoder import Decoder

_HELD = (bool, int, float, str, type(None), types.FunctionType, types.MethodType)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Values of each tensor that are compared.
_SAMPLES = 8
# Fused optimizers write without counting it in the tensor's version.
_optimizer_steps = [0]


def _count_step(*_: Any) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_step)


class WeightsVersion:
    """Watches a model's parameters, buffers, modules, hooks and plain attributes.

    It sees every optimizer's step, writes in place by PyTorch's operators, tensors that moved or were
    replaced, autocast, and what ``Watch`` sees. Nobody knows what a forward hook computes from: while there
    is one, every look finds another version. Of writes that leave no other trace (through
    ``parameter.data``, a raw pointer) it sees those that change one of a few values of some tensor; whoever
    writes less calls ``changed``.
    """

    def __init__(self, model: Decoder) -> None:
        # Weak, as in ``Executor``.
        self._model_ref = weakref.ref(model)
        self._version = 0
        self._look_anew()

    def current(self) -> int:
        """The version now; never again one that it was before. On a GPU this waits for it."""
        if (
            self._watch.hooked
            or self._watch.stirred()
            or self._traces() != self._traces_before
            or not all(map(torch.equal, self._sampled(), self._sampled_before))
        ):
            self.changed()
        return self._version

    def changed(self) -> None:
        """Count what was computed until now as computed with other weights."""
        self._version += 1
        self._look_anew()

    def _look_anew(self) -> None:
        model = self._model_ref()
        assert model is not None
        modules = list(model.modules())
        self._watch = Watch(model)
        self._owners = [owner for m in modules for owner in (m._parameters, m._buffers) if owner]
        self._types = {type(module) for module in modules}
        self._own = _own_names(model)
        self._inside = [(vars(module), _own_names(module)) for module in modules if module is not model]
        self._samples: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for tensor in self._tensors():
            if tensor.numel() and tensor.device.type != "meta":
                self._samples.setdefault((tensor.dtype, tensor.device), []).append(_sample(tensor))
        self._traces_before = self._traces()
        self._sampled_before = self._sampled()

    def _tensors(self) -> list[torch.Tensor]:
        return [t for t in chain.from_iterable(owner.values() for owner in self._owners) if t is not None]

    def _traces(self) -> tuple[Any, ...]:
        tensors = [
            # Tensors made in inference mode count no writes.
            (id(t), t.data_ptr(), t.dtype, -1 if t.is_inference() else t._version)
            for t in self._tensors()
        ]
        model = self._model_ref()
        assert model is not None
        device, own = model.device.type, vars(model)
        return (
            tensors,
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            [_trace(own.get(name)) for name in self._own],
            [_trace(inside.get(name)) for inside, names in self._inside for name in names],
            [kind.forward for kind in self._types],
            *_optimizer_steps,
        )

    def _sampled(self) -> list[torch.Tensor]:
        """Some values of every tensor, those of one dtype and device together."""
        return [torch.cat(views) for views in self._samples.values()]


def _own_names(module: nn.Module) -> list[str]:
    """The attributes that a module's class gave it; what every module has is watched in other ways."""
    return [name for name in vars(module) if name not in _OF_EVERY_MODULE]


def _trace(value: Any, depth: int = 2) -> Any:
    """Equal as long as an attribute says the same; adapters keep numbers in lists and dictionaries."""
    if isinstance(value, dict) and depth:
        return [(key, _trace(inner, depth - 1)) for key, inner in value.items()]
    if isinstance(value, list | tuple) and depth:
        return [_trace(inner, depth - 1) for inner in value]
    # Functions are held, so that another one cannot have the same place.
    return value if isinstance(value, _HELD) else id(value)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a few values, evenly apart in memory."""
    dense = tensor.numel() == 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    if not dense:
        return (
            tensor.detach()[(0,) * (tensor.dim() - 1)][:_SAMPLES] if tensor.dim() else tensor.detach()[None]
        )
    count = min(_SAMPLES, tensor.numel())
    return tensor.detach().as_strided((count,), (max(tensor.numel() // _SAMPLES, 1),))
