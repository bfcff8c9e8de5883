"""Faults planted in the source of interpreted kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime.interpreter import FunctionRewriter, InterpretedFunction


class _Changed(FunctionRewriter):
    def __init__(self, kernel: InterpretedFunction, old: str, new: str) -> None:
        super().__init__(kernel.fn, **kernel.kwargs)
        self.old, self.new = old, new

    def _prepare_source(self, lines: list[str]) -> str:
        source = str(super()._prepare_source(lines))
        assert source.count(self.old) == 1, f"{self.old!r} occurs {source.count(self.old)} times"
        return source.replace(self.old, self.new)


@contextmanager
def planted(kernel: Any, old: str, new: str) -> Iterator[None]:
    """Interpret ``kernel`` with ``new`` in place of ``old``, which its source holds once."""
    rewritten = InterpretedFunction.rewritten_fn
    original = kernel.rewrite()
    rewritten[kernel.fn] = _Changed(kernel, old, new).rewrite_ast()
    try:
        yield
    finally:
        rewritten[kernel.fn] = original
