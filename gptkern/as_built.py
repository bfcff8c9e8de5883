"""The one check before anything computes from weights alone: are modules as they were built?

A fused op or an executor reads a module's weights and never calls the module. That is right only where a
call would do no more than that: no hook, no ``forward`` of an instance's own, no layer of somebody else's in
its place, no number other than the config's. ``untouched`` checks one layer, on each pass;
``Blueprint.difference`` checks a whole model, when a generation begins; ``Watch`` says when to check again.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from gptkern import _native

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS: list[dict[int, Any]] = [getattr(torch_module, f"_global{name}") for name in _HOOKS]
_PLAIN = (int, float, bool, str, tuple, type(None), types.FunctionType, types.BuiltinFunctionType)
# Attributes that may differ: dropout is off while decoding, and a training pass reads its probability from
# the module; the others do not change what a module computes.
_FREE = {"p", "inplace", "embd_pdrop", "resid_pdrop", "training", "gradient_checkpointing", "name_or_path"}

Hook = Callable[..., Any]
T = TypeVar("T")


def untouched(module: nn.Module, *forwards: Any) -> bool:
    """True if a call of ``module`` runs one of ``forwards`` and nothing else.

    Args:
        forwards: Functions, taken from their classes when gptkern was imported, so that a function assigned
            to the class since then is noticed too. A parametrised layer still has its class's function:
            read its ``weight``, not its parameter.
    """
    return (
        type(module).forward in forwards
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not any(_GLOBAL_HOOKS)
    )


def own_method(module: nn.Module, names: Collection[str]) -> str | None:
    """The first of ``names`` under which the instance has something other than its class, or None."""
    for name in names:
        own = module.__dict__.get(name)
        # A method of the class that somebody stored in the instance is no other method.
        if own is not None and getattr(own, "__func__", None) is not getattr(type(module), name):
            return name
    return None


@functools.cache
def _methods(cls: type) -> frozenset[str]:
    return frozenset(name for name in dir(cls) if callable(getattr(cls, name, None)))


def forwards_of(cls: type) -> tuple[Any, ...]:
    """The ``forward`` of a class and of each of its bases; None for a class without one."""
    return tuple(vars(base).get("forward") for base in cls.__mro__)


class _Unset(TorchFunctionMode):
    """A mode in which initialisation does nothing: it takes most of the time of building a model."""

    _SKIPPED: ClassVar = {
        *(torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_),
        *(torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_),
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


def skeleton(make: Callable[[], T]) -> T:
    """The result of ``make`` on the meta device: modules and shapes without weights."""
    with torch.device("meta"), _Unset():
        return make()


@dataclass(frozen=True)
class _Part:
    """One module as built: its place, the classes it may have, its numbers and its parameters' shapes."""

    path: str
    name: str
    parent: int
    children: int
    kind: type
    kinds: Mapping[type, tuple[Any, ...]]
    plain: dict[str, Any]
    shapes: dict[str, torch.Size]


class Blueprint:
    """The modules of a model that has just been built, for comparison with a model in use.

    Args:
        built: The new model, on any device.
        instead: For a class, other classes that may stand in its place and compute the same.
        forwards: For a class, its ``forwards_of`` from before anybody could have assigned another.
        harmless: A function that is True for a hook without effect on what is computed.

    Only the hooks and children of the root are compared: its class, methods and numbers are the caller's.
    """

    def __init__(
        self,
        built: nn.Module,
        *,
        forwards: Mapping[type, tuple[Any, ...]],
        instead: Mapping[type, Collection[type]] = types.MappingProxyType({}),
        harmless: Callable[[Hook], bool] = lambda hook: False,
    ) -> None:
        self._harmless = harmless
        self._parts: list[_Part] = []
        places: dict[str, int] = {}
        for path, module in built.named_modules(remove_duplicate=False):
            kind = type(module)
            plain = {
                name: value
                for name, value in vars(module).items()
                if name[0] != "_" and name not in _FREE and isinstance(value, _PLAIN)
            }
            kinds = {k: forwards.get(k) or forwards_of(k) for k in (kind, *instead.get(kind, ()))}
            owner, _, name = path.rpartition(".")
            places[path] = len(self._parts)
            children = len(module._modules)
            self._parts.append(
                _Part(path, name, places.get(owner, -1), children, kind, kinds, plain, _shapes(module))
            )

    def difference(self, model: nn.Module) -> str | None:
        """The first difference between ``model`` and the model as built, in words; None if there is none."""
        if any(_GLOBAL_HOOKS):
            return "a hook of all modules is registered"
        found: list[nn.Module] = []
        forwards: dict[type, tuple[Any, ...]] = {}
        for part in self._parts:
            module = found[part.parent]._modules.get(part.name) if part.path else model
            if module is None:
                return f"{part.path} is missing"
            found.append(module)
            reason = self._hooked(module)
            if part.path and reason is None:
                reason = _replaced_method(module) or _part_difference(module, part, forwards)
            if reason:
                return f"{part.path or 'the model'} {reason}"
            if len(module._modules) > part.children:
                return f"{part.path or 'the model'} has a module more, {next(reversed(module._modules))!r}"
        return None

    def _hooked(self, module: nn.Module) -> str | None:
        for name in _HOOKS:
            hooks = module.__dict__[name]
            if hooks and not all(map(self._harmless, hooks.values())):
                return "is hooked"
        return None


def _replaced_method(module: nn.Module) -> str | None:
    kind: type = type(module)
    methods = _methods(kind)
    if methods.isdisjoint(module.__dict__):
        return None
    own = own_method(module, methods & module.__dict__.keys())
    return own and f"has a {own} of its own"


def _part_difference(module: nn.Module, part: _Part, forwards: dict[type, tuple[Any, ...]]) -> str | None:
    """The first difference between ``module`` and ``part``; ``forwards`` caches ``forwards_of`` classes."""
    kind, inside = type(module), module.__dict__
    if kind not in part.kinds:
        return f"is a {kind.__name__} that was put in"
    if kind not in forwards:
        forwards[kind] = forwards_of(kind)
    if forwards[kind] != part.kinds[kind]:
        return f"is a {kind.__name__}, whose class was given another forward"
    for name, value in part.plain.items():
        now = inside.get(name, value)
        if now is not value and now != value:
            return f"has {name} {now!r}, where the config gives {value!r}"
    # A substitute of another class may store its matrix in its own way.
    if module._parameters and issubclass(kind, part.kind):
        shapes = _shapes(module)
        if shapes != part.shapes:
            name = next(n for n in {**part.shapes, **shapes} if part.shapes.get(n) != shapes.get(n))
            now, value = (s.get(name) and tuple(s[name]) for s in (shapes, part.shapes))
            return f"has {name} {now}, where the config gives {value}"
    return None


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in module._parameters.items() if p is not None}


class Watch:
    """A cheap detector of changes in a model's modules: a few microseconds a call.

    It notices forward hooks, modules that replace others and any new attribute of an instance, such as a
    ``forward``.

    Attributes:
        hooked: True if some module had a forward hook when this object was made.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        hooks = [*_GLOBAL_HOOKS, *(vars(m)[name] for m in modules for name in _HOOKS[:2])]
        self.hooked = any(hooks)
        # The model's own dictionary may lead back to whoever holds this object.
        self._root = weakref.ref(model)
        self._dicts = [*hooks, *(vars(module) for module in modules if module is not model)]
        self._owners: list[dict[str, Any]] = [module._modules for module in modules if module._modules]
        self._look()

    def stirred(self) -> bool:
        """True if something has changed since the last call, or since this object was made."""
        if len(vars(self._root())) == self._root_size and _same_entries(
            self._dicts, self._sizes, self._owners, self._children
        ):
            return False
        self._look()
        return True

    def _look(self) -> None:
        self._root_size, self._sizes = len(vars(self._root())), list(map(len, self._dicts))
        self._children = _values(self._owners)


def _values(owners: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(owner.values() for owner in owners))


def _same_entries_in_python(
    dicts: list[dict[Any, Any]], sizes: list[int], owners: list[dict[str, Any]], values: list[Any]
) -> bool:
    return list(map(len, dicts)) == sizes and _values(owners) == values


_same_entries: Callable[..., bool] = getattr(_native.extension, "same_entries", _same_entries_in_python)
