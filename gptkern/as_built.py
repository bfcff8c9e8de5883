"""Whether modules are as they were built: the one check before anything computes from weights alone.

A fused op or a decode step reads a module's weights and never calls the module. That is right only where a
call would do no more than that: no hook, no ``forward`` of an instance's own, no layer of somebody else's in
its place, no number other than the config's. ``untouched`` asks this of one layer, on each pass;
``Blueprint.difference`` of a whole model, when a generation begins; ``Watch`` says when to ask again.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS: list[dict[int, Any]] = [getattr(torch_module, f"_global{name}") for name in _HOOKS]
_PLAIN = (int, float, bool, str, tuple, type(None), types.FunctionType, types.BuiltinFunctionType)
# Dropout is off while decoding, and a training pass reads its probability from the module; the rest says
# nothing of what a module computes.
_FREE = {"p", "inplace", "embd_pdrop", "resid_pdrop", "training", "gradient_checkpointing", "name_or_path"}

Hook = Callable[..., Any]


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


@dataclass(frozen=True)
class _Part:
    path: str
    kind: type
    kinds: Mapping[type, tuple[Any, ...]]
    plain: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


class Blueprint:
    """What the modules of a model are when it has just been built.

    Args:
        built: Such a model, on any device.
        instead: Of a class, those that may stand in its place and compute the same.
        forwards: Of a class, ``forwards_of`` it before anybody could have put another there.
        harmless: Tells hooks that have no effect on what is computed.

    The root's class and numbers are the caller's to look at.
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
        self._parts = []
        for path, module in built.named_modules(remove_duplicate=False):
            kind = type(module)
            plain = {
                name: value
                for name, value in vars(module).items()
                if path and name[0] != "_" and name not in _FREE and isinstance(value, _PLAIN)
            }
            kinds = {k: forwards.get(k) or forwards_of(k) for k in (kind, *instead.get(kind, ()))}
            self._parts.append(_Part(path, kind, kinds, plain, _shapes(module)))
        self._paths = {part.path for part in self._parts}

    def difference(self, model: nn.Module) -> str | None:
        """The first thing in which ``model`` is not as built, in words; None: it is, throughout."""
        if any(_GLOBAL_HOOKS):
            return "a hook of all modules is registered"
        found = dict(model.named_modules(remove_duplicate=False))
        for part in self._parts:
            module = found.get(part.path)
            if module is None:
                return f"{part.path} is missing"
            reason = self._touched(module) or (part.path and _other(module, part))
            if reason:
                return f"{part.path or 'the model'} {reason}"
        if len(found) > len(self._parts):
            return f"{next(path for path in found if path not in self._paths)} was put in"
        return None

    def _touched(self, module: nn.Module) -> str | None:
        inside = module.__dict__
        for name in _HOOKS:
            if inside[name] and not all(map(self._harmless, inside[name].values())):
                return "is hooked"
        kind: type = type(module)
        methods = _methods(kind)
        if not methods.isdisjoint(inside):
            own = own_method(module, methods & inside.keys())
            if own is not None:
                return f"has a {own} of its own"
        return None


def _other(module: nn.Module, part: _Part) -> str | None:
    kind, inside = type(module), module.__dict__
    if kind not in part.kinds:
        return f"is a {kind.__name__} that was put in"
    if forwards_of(kind) != part.kinds[kind]:
        return f"is a {kind.__name__}, whose class was given another forward"
    for name, value in part.plain.items():
        now = inside.get(name, value)
        if now is not value and now != value:
            return f"has {name} {now!r}, where the config gives {value!r}"
    # A layer that only stands in for one keeps its matrix in its own way.
    if issubclass(kind, part.kind) and (part.shapes or module._parameters):
        shapes = _shapes(module)
        if shapes != part.shapes:
            name = next(n for n in {**part.shapes, **shapes} if part.shapes.get(n) != shapes.get(n))
            return f"has {name} {shapes.get(name)}, where the config gives {part.shapes.get(name)}"
    return None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}


class Watch:
    """Whether a model's modules have stirred since; a few microseconds a question.

    It sees hooks, modules put in another's place and anything new in an instance, such as a ``forward``.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._hooks = [*_GLOBAL_HOOKS, *(vars(m)[name] for m in modules for name in _HOOKS)]
        self._insides = [vars(module) for module in modules]
        self._children = [module._modules for module in modules if module._modules]
        self._before = self._now()

    def stirred(self) -> bool:
        """Whether something has changed since this was made, or since it was asked last."""
        before, self._before = self._before, self._now()
        return before != self._before

    def _now(self) -> tuple[list[int], list[int], list[Any]]:
        return (
            list(map(len, self._hooks)),
            list(map(len, self._insides)),
            list(chain.from_iterable(map(_values, self._children))),
        )


def _values(children: dict[str, Any]) -> Iterator[Any]:
    return iter(children.values())
