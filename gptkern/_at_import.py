"""``attn_implementation="gptkern"`` in transformers from ``import gptkern`` on, whichever is imported first.

Importing transformers takes seconds and PyTorch, so nothing here does: a finder waits for the modules that
the names are registered with. The functions that it registers import what they need at their first call.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "gptkern"
PAGED = "paged|gptkern"


def _register(modeling_utils: ModuleType) -> None:
    from transformers.masking_utils import AttentionMaskInterface

    for name, function in ((NAME, "attention_forward"), (PAGED, "paged_attention_forward")):
        modeling_utils.AttentionInterface.register(name, _later("attention", function))
    AttentionMaskInterface.register(NAME, _later("masks", "gptkern_mask"))
    # Packed sequences are told apart by their cumulative lengths.
    AttentionMaskInterface.register(PAGED, lambda *args, **kwargs: None)


def _later(module: str, name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        # Registers the function itself, too: this one is called once at most by a model.
        found = importlib.import_module(f"gptkern.transformers.{module}")
        return getattr(found, name)(*args, **kwargs)

    return call


def _admit(continuous_api: ModuleType) -> None:
    """Let continuous batching take models whose attention is gptkern's.

    Up to transformers 5.22 it took every registered name that began with "paged|". Since then that prefix is
    cut off, and its gate knows the library's own functions alone.
    """
    manager = continuous_api.ContinuousBatchingManager
    gate = getattr(manager, "switch_to_cb_friendly_attn", None)
    if gate is None:
        return

    @functools.wraps(gate)
    def admitting(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.config._attn_implementation != NAME:
            return gate(self, model, *args, **kwargs)

    manager.switch_to_cb_friendly_attn = admitting


_AFTER = {
    "transformers.modeling_utils": _register,
    "transformers.generation.continuous_batching.continuous_api": _admit,
}


class _Finder(MetaPathFinder):
    """Finds nothing itself: it has what others find do something more after it was imported."""

    def __init__(self, waited_for: dict[str, Callable[[ModuleType], None]]) -> None:
        self._waited_for = waited_for
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._waited_for or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then(module: ModuleType) -> None:
                execute(module)
                after = self._waited_for.pop(fullname, None)
                if after is not None:
                    after(module)

            spec.loader.exec_module = then  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register with what is imported already, and wait for the rest."""
    waited_for = dict(_AFTER)
    for name in _AFTER:
        if name in sys.modules:
            waited_for.pop(name)(sys.modules[name])
    if waited_for:
        sys.meta_path.insert(0, _Finder(waited_for))
