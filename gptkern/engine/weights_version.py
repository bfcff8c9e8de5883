"""WeightsVersion: a number that changes when what a model computes may have changed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from gptkern.engine.model_state import ModelState
from gptkern.model.decoder import Decoder

# Values of each tensor that are compared.
_SAMPLES = 8
# Fused optimizers write without counting it in the tensor's version.
_optimizer_steps = [0]


def optimizer_steps() -> int:
    """The steps of all optimizers of the process until now."""
    return _optimizer_steps[0]


def _count_step(*_: Any) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_step)


class WeightsVersion:
    """Watches a model's parameters, buffers, modules, hooks and plain attributes.

    It sees every optimizer's step, writes in place by PyTorch's operators, tensors that moved, and what
    ``ModelState`` sees. Nobody knows what a forward hook computes from: while there is one, every look finds
    another version. Of writes that leave no other trace (through ``parameter.data``, a raw pointer) it sees
    those that change one of a few values of some tensor; whoever writes less calls ``changed``.
    """

    def __init__(self, model: Decoder) -> None:
        # Weak, as in ``Executor``.
        self._model_ref = weakref.ref(model)
        self._version = 0
        self._look_anew()

    def current(self) -> int:
        """The version now; never again one that it was before. On a GPU this waits for it."""
        if (
            self._state.hooked
            or self._state.differs()
            or self._writes() != self._writes_before
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
        self._state = ModelState(model)
        tensors = self._state.tensors
        # Tensors made in inference mode count no writes.
        self._counting = [t for t in tensors if not t.is_inference()]
        self._samples: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() and tensor.device.type != "meta":
                self._samples.setdefault((tensor.dtype, tensor.device), []).append(_sample(tensor))
        self._writes_before = self._writes()
        self._sampled_before = self._sampled()

    def _writes(self) -> tuple[Any, ...]:
        places = list(map(torch.Tensor.data_ptr, self._state.tensors))
        return places, [t._version for t in self._counting], optimizer_steps()

    def _sampled(self) -> list[torch.Tensor]:
        """Some values of every tensor, those of one dtype and device together."""
        return [torch.cat(views) for views in self._samples.values()]


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
