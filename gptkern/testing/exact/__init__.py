"""Kernels computed exactly: floats are elements of a finite ring, so that order and rounding drop out.

Within ``algebra`` the interpreter computes every kernel, unchanged, in the ring that ``ring`` explains. Two
ways to the same sum then agree bit for bit, however they are ordered or split, and a term that is lost,
doubled or scaled otherwise changes every bit that depends on it: no tolerance can hide it.

``numbers`` draws inputs, ``assert_same`` compares. It needs ``TRITON_INTERPRET=1``, and float32 tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptkern.ops._cases import tensors
from gptkern.ops._dispatch import INTERPRETED, backend
from gptkern.testing.exact import ring

__all__ = ["algebra", "assert_same", "encoded", "numbers", "parts"]

# PyTorch's operators that move numbers, or make memory without any.
_MOVES = frozenset({
    "_local_scalar_dense", "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "cat",
    "clone", "copy_", "detach", "empty", "empty_like", "empty_strided", "expand", "index", "lift_fresh",
    "masked_fill", "new_empty", "new_empty_strided", "new_zeros", "permute", "select", "set_", "slice",
    "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unsqueeze", "view", "zero_",
    "zeros", "zeros_like",
})  # fmt: skip
_FILLS = frozenset(["fill_", "full", "full_like", "new_full", "new_ones", "ones", "ones_like"])


class _OutsideRefused(TorchDispatchMode):
    """Refuses what PyTorch itself would compute with floats: it knows nothing of the ring."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        floats = any(x.is_floating_point() for x in tensors(result))
        if not floats or name in _MOVES or func.namespace != "aten":
            return result
        if name not in _FILLS:
            raise RuntimeError(f"exact algebra: PyTorch computes {name} of floats, outside of the ring")
        return encoded(result, out=result)


@contextmanager
def algebra() -> Iterator[None]:
    """Kernels within the block are interpreted in the ring, on tensors of ``numbers`` or ``encoded``.

    Raises:
        RuntimeError: Kernels are not interpreted in this process; from within, PyTorch computes with floats.
        TypeError: From within, a kernel does what has no meaning in the ring.
    """
    if not INTERPRETED:
        raise RuntimeError(
            "exact algebra needs TRITON_INTERPRET=1 in the environment before triton is imported"
        )
    from gptkern.testing.exact.builder import substituted

    with backend("kernel"), substituted(), _OutsideRefused():
        yield


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """A float32 tensor of random elements; their exponents are even, so that halves exist."""
    generator = np.random.default_rng(seed)
    value, exponent = generator.integers(0, ring.P, shape), 2 * generator.integers(0, ring.N // 2, shape)
    return torch.from_numpy(ring.packed(value, exponent))


def encoded(tensor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The elements of the numbers in a float32 tensor; see ``ring.constant`` for those that have one."""
    plain = tensor.detach().reshape(-1).numpy()
    elements = np.array([ring.stored(float(number)) for number in plain], np.float32)
    result = torch.empty_like(tensor) if out is None else out
    with torch.no_grad():
        return result.copy_(torch.from_numpy(elements).view(tensor.shape))


def parts(tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(value, exponent) of a tensor's elements, each in int64; -1 where it holds an infinity or NaN."""
    value, exponent, special = ring.split(tensor.detach().contiguous().numpy())
    return np.where(special, -1, value), np.where(special, -1, exponent)


def assert_same(
    got: torch.Tensor,
    right: torch.Tensor,
    what: str = "result",
    of: Literal["both", "value", "exponent"] = "both",
) -> None:
    """Equal elements, bit for bit.

    Args:
        got: What a kernel gave.
        right: What it should give.
        what: Names the tensor in the message.
        of: The component that is compared: a logarithm has its exponent alone.

    Raises:
        AssertionError: says how many differ, and where the first is.
    """
    if got.shape != right.shape:
        raise AssertionError(f"{what} is {tuple(got.shape)}; {tuple(right.shape)} is right")
    pairs = list(zip(("value", "exponent"), parts(got), parts(right), strict=True))
    for name, a, b in pairs:
        if of in ("both", name) and (a != b).any():
            where = tuple(int(i) for i in np.argwhere(a != b)[0])
            raise AssertionError(
                f"{what}: {int((a != b).sum())} of {a.size} elements differ in {name}, the first at {where}"
            )
