"""Whether modules are as they were built: the one check before anything computes from weights alone.

A fused op or a decode step reads a module's weights and never calls the module. That is right only where a
call would do no more than that: no hook, no ``forward`` of an instance's own, no layer of somebody else's in
its place, no number other than the config's. ``untouched`` asks this of one layer, on each pass;
``Blueprint.difference`` of a whole model, when a generation begins; ``Watch`` says when to ask again.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS: list[dict[int, Any]] = [getattr(torch_module, f"_global{name}") for name in _HOOKS]
_PLAIN = (int, float, bool, str, tuple, type(None), types.FunctionType, types.BuiltinFunctionType)
# Dropout is off while decoding, and a training pass reads its probability from the module; the rest says
# nothing of what a module computes.
_FREE = {"p", "inplace", "embd_pdrop", "resid_pdrop", "training", "gradient_checkpointing", "name_or_path"}

Hook = Callable[..., Any]
T = TypeVar("T")


def untouched(module: nn.Module, *forwards: Any) -> bool:
    """Whether a call of ``module`` runs one of ``forwards`` and nothing beside it.

    Args:
        forwards: Functions, taken from their classes when gptkern was imported, so that one that was put into
            its class's place since is found too. A parametrised layer has its class's function still: its
            ``weight`` may be read and not its parameter.
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
        # A method that somebody put aside and back again is the class's after all.
        if own is not None and getattr(own, "__func__", None) is not getattr(type(module), name):
            return name
    return None


@functools.cache
def _methods(cls: type) -> frozenset[str]:
    return frozenset(name for name in dir(cls) if callable(getattr(cls, name, None)))


def forwards_of(cls: type) -> tuple[Any, ...]:
    """The ``forward`` of a class and of each of its bases; None of one that has none."""
    return tuple(vars(base).get("forward") for base in cls.__mro__)


class _Unset(TorchFunctionMode):
    """Leaves tensors as they were allocated: most of a model's construction is drawing its first weights."""

    _SKIPPED: ClassVar = {
        *(torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_),
        *(torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_),
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})


def skeleton(make: Callable[[], T]) -> T:
    """What ``make`` builds, on the meta device: modules and shapes without weights."""
    with torch.device("meta"), _Unset():
        return make()


@dataclass(frozen=True)
class _Part:
    """One module as built: its place, the classes it may be of, its numbers and its parameters' shapes."""

    path: str
    name: str
    parent: int
    children: int
    kind: type
    kinds: Mapping[type, tuple[Any, ...]]
    plain: dict[str, Any]
    shapes: dict[str, torch.Size]


class Blueprint:
    """What the modules of a model are when it has just been built.

    Args:
        built: Such a model, on any device.
        instead: Of a class, those that may stand in its place and compute the same.
        forwards: Of a class, ``forwards_of`` it before anybody could have put another there.
        harmless: Tells hooks that have no effect on what is computed.

    Of the root, only hooks and children are looked at: its class, methods and numbers are the caller's.
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
        """The first thing in which ``model`` is not as built, in words; None: it is, throughout."""
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
                reason = _own(module) or _other(module, part, forwards)
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


def _own(module: nn.Module) -> str | None:
    kind: type = type(module)
    methods = _methods(kind)
    if methods.isdisjoint(module.__dict__):
        return None
    own = own_method(module, methods & module.__dict__.keys())
    return own and f"has a {own} of its own"


def _other(module: nn.Module, part: _Part, forwards: dict[type, tuple[Any, ...]]) -> str | None:
    """In what ``module`` is not what ``part`` says; ``forwards`` remembers those of classes."""
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
    # A layer that only stands in for one keeps its matrix in its own way.
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
    """Whether a model's modules have stirred since; a few microseconds a question.

    It sees forward hooks, modules put in another's place and anything new in an instance, such as a
    ``forward``.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        hooks = [*_GLOBAL_HOOKS, *(vars(m)[name] for m in modules for name in _HOOKS[:2])]
        self._empty, self._hooks = [h for h in hooks if not h], [h for h in hooks if h]
        self._insides = [vars(module) for module in modules]
        self._children = [module._modules.values() for module in modules if module._modules]
        self._before = self._now()

    def stirred(self) -> bool:
        """Whether something has changed since this was made, or since it was asked last."""
        if self._before == self._now() and not any(self._empty):
            return False
        self._before = self._now()
        return True

    def _now(self) -> tuple[list[int], list[int], list[Any]]:
        return (
            list(map(len, self._hooks)),
            list(map(len, self._insides)),
            list(chain.from_iterable(self._children)),
        )
