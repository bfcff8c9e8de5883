"""ModelState: whether anything in a model was put in, replaced or moved since a moment."""

from __future__ import annotations

import operator
import types
import weakref
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from gptkern.as_built import Watch
from gptkern.model.decoder import Decoder

_HELD = (bool, int, float, str, type(None), types.FunctionType, types.MethodType)
_LISTS = (dict, list, tuple)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class ModelState:
    """A model's modules, hooks, attributes and tensors as they were when this was made.

    A look compares objects by identity, which costs far less than the check of each that follows where one
    is another. It sees all that ``Watch`` sees, every attribute that was given another value, forwards of
    classes, tensors that were replaced or lie otherwise, and autocast. Values written in place are not seen.
    """

    def __init__(self, model: Decoder) -> None:
        # Weak, as in ``Executor``: the model's own dictionary may lead back to whoever holds this object.
        self._model_ref = weakref.ref(model)
        self._watch = Watch(model)
        modules = list(model.modules())
        self._own = [
            (vars(module), [name for name in vars(module) if name not in _OF_EVERY_MODULE])
            for module in modules
            if module is not model
        ]
        owners = [own for module in modules for own in (module._parameters, module._buffers)]
        # Most have no backward hooks and no buffers: that it stays so is asked of all of them at once.
        hooks = [h for module in modules for h in (module._backward_hooks, module._backward_pre_hooks)]
        self._empty = [entries for entries in (*owners, *hooks) if not entries]
        self._filled: list[Mapping[Any, Any]] = [entries for entries in (*owners, *hooks) if entries]
        self._lists = [(own, n) for own, names in self._own for n in names if isinstance(own[n], _LISTS)]
        self._kinds = {type(module) for module in modules}
        self.tensors = [t for t in chain.from_iterable(owner.values() for owner in owners) if t is not None]
        self._values = self._values_now()
        self._rest = self._rest_now(model)

    @property
    def hooked(self) -> bool:
        """True if some module had a forward hook."""
        return self._watch.hooked

    def stirred(self) -> bool:
        """True if ``Watch`` saw something since the last call: a few microseconds."""
        return self._watch.stirred()

    def differs(self) -> bool:
        """True if anything is not what it was."""
        model = self._model_ref()
        assert model is not None
        values = self._values_now()
        return (
            self._watch.stirred()
            or any(self._empty)
            or len(values) != len(self._values)
            or any(map(operator.is_not, values, self._values))
            or self._rest_now(model) != self._rest
        )

    def _values_now(self) -> list[Any]:
        entries = chain.from_iterable([entries.values() for entries in self._filled])
        return [*entries, *(own.get(name) for own, names in self._own for name in names)]

    def _rest_now(self, model: Decoder) -> tuple[Any, ...]:
        tensors, device = self.tensors, model.device.type
        return (
            [t.dtype for t in tensors],
            [t.device for t in tensors],
            [t.shape for t in tensors],
            list(map(torch.Tensor.stride, tensors)),
            [kind.forward for kind in self._kinds],
            [_trace(own.get(name)) for own, name in self._lists],
            {name: _trace(value) for name, value in vars(model).items() if name not in _OF_EVERY_MODULE},
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        )


def _trace(value: Any, depth: int = 2) -> Any:
    """Equal as long as an attribute says the same; adapters keep numbers in lists and dictionaries."""
    if isinstance(value, dict) and depth:
        return [(key, _trace(inner, depth - 1)) for key, inner in value.items()]
    if isinstance(value, list | tuple) and depth:
        return [_trace(inner, depth - 1) for inner in value]
    # Functions are held, so that another one cannot have the same place.
    return value if isinstance(value, _HELD) else id(value)
