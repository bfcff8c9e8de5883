"""What Triton compiles, what it finds in its cache, and which build of it that is."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton


@contextmanager
def counting(counted: Counter[str]) -> Iterator[None]:
    """Count kernels as "compiled" and as "found"; those outside hear of them too."""
    outer = triton.knobs.compilation.listener

    def listen(*, cache_hit: bool, **told: Any) -> None:
        counted["found" if cache_hit else "compiled"] += 1
        if outer is not None:
            outer(cache_hit=cache_hit, **told)

    triton.knobs.compilation.listener = listen
    try:
        yield
    finally:
        triton.knobs.compilation.listener = outer


def triton_key() -> str:
    """What the keys of Triton's cache begin with: where it differs, a cache made elsewhere is missed."""
    from triton.runtime.cache import triton_key as key

    return hashlib.sha256(key().encode()).hexdigest()
