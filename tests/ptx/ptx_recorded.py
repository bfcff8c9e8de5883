"""Launches of an op, recorded with the contents of their tensors, to be executed again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import ptx_kernels
import torch

from gptkern import testing
from gptkern.testing.ptx import TensorMap, kernels
from gptkern.testing.ptx.launch import execute

# Bytes around each tensor's memory in which ``within_margins`` lets a kernel go astray.
_MARGIN = 4096


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())


def _base(value: Any) -> Any:
    return value.base if isinstance(value, TensorMap) else value


@dataclass
class Recorded:
    """One launch: a kernel's name, its text, its arguments, and what they held before it."""

    name: str
    text: str
    grid: tuple[int, ...]
    values: list[Any]
    options: dict[str, Any]
    also: Sequence[torch.Tensor] = ()
    contents: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.contents = [(tensor, _whole(tensor).clone()) for tensor in self.tensors()]

    def tensors(self) -> list[torch.Tensor]:
        """One tensor for each storage."""
        every = [*map(_base, self.values), *self.also]
        found = {item.untyped_storage().data_ptr(): item for item in every if isinstance(item, torch.Tensor)}
        return [tensor for tensor in found.values() if tensor.untyped_storage().nbytes()]

    def again(self, text: str = "", times: int = 1, **options: Any) -> list[torch.Tensor]:
        """The bytes of all tensors after the launch, ``times`` in a row; with another text if given."""
        for tensor, before in self.contents:
            _whole(tensor).copy_(before)
        for _ in range(times):
            execute(text or self.text, self.grid, self.values, also=self.also, **self.options, **options)
        return [_whole(tensor).clone() for tensor, _ in self.contents]

    def before(self, **changes: Any) -> Recorded:
        """The launch with other fields, on memory as it was before the launch."""
        for tensor, contents in self.contents:
            _whole(tensor).copy_(contents)
        return replace(self, **changes)

    def at_edges(self, dtype: torch.dtype, size: int, values: Sequence[int]) -> Recorded | None:
        """The launch with these values first in its tensor of so many elements; None if it has none."""
        for place, value in enumerate(self.values):
            if isinstance(value, torch.Tensor) and value.dtype == dtype and value.numel() == size:
                changed = value.clone()
                changed.view(-1)[: len(values)] = torch.tensor(values)
                return self.before(values=[*self.values[:place], changed, *self.values[place + 1 :]])
        return None

    def within_margins(self) -> Recorded:
        """The launch on copies with memory around them, in which nobody checks its bounds."""
        storages: dict[int, torch.Tensor] = {}
        for tensor, before in self.contents:
            room = torch.full((len(before) + 2 * _MARGIN,), 0x3F, dtype=torch.uint8)
            room[_MARGIN : len(before) + _MARGIN] = before
            storages[tensor.untyped_storage().data_ptr()] = room

        def moved(value: Any) -> Any:
            if isinstance(value, TensorMap):
                return replace(value, base=moved(value.base))
            if not isinstance(value, torch.Tensor) or not value.untyped_storage().nbytes():
                return value
            room = storages[value.untyped_storage().data_ptr()]
            at = value.storage_offset() + _MARGIN // value.element_size()
            empty = torch.empty(0, dtype=value.dtype)
            return empty.set_(room.untyped_storage(), at, value.shape, value.stride())

        options = {name: value for name, value in self.options.items() if name != "stream"}
        return Recorded(
            self.name, self.text, self.grid, [moved(value) for value in self.values], options,
            [*map(moved, self.also), *storages.values()],
        )  # fmt: skip


def recorded(call: Callable[[], Any], arch: int, also: Sequence[torch.Tensor] = ()) -> list[Recorded]:
    """The launches of ``call``, which are executed. Memory that nobody has written holds NaN."""
    found: list[Recorded] = []
    names: list[str] = []

    def noted(ptx: str, grid: tuple[int, ...], values: list[Any], **options: Any) -> None:
        plain = {name: value for name, value in options.items() if name not in ("seed", "stream", "also")}
        found.append(Recorded("", ptx, grid, values, plain, also))
        execute(ptx, grid, values, also=also, **{"seed": options.get("seed", 0)}, **plain)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with (
            mock.patch.object(kernels, "execute", noted),
            kernels.executed(arch, done=lambda launch: names.append(launch.name)),
        ):
            call()
    finally:
        torch.use_deterministic_algorithms(False)
    for item, name in zip(found, names, strict=True):
        item.name = name
    return found


def of_check(op: str, begin: str, arch: int, dtype: torch.dtype = torch.bfloat16) -> list[Recorded]:
    """The launches of the small call of ``op`` whose name begins so, and of its backward pass."""
    case = next(case for case in ptx_kernels.calls(op) if case.name.startswith(begin))
    torch.manual_seed(0)
    call = case.make(torch.device("cpu"), dtype)
    return recorded(lambda: testing._run(case.op, call), arch)


def difference(found: Sequence[torch.Tensor], plain: Sequence[torch.Tensor], launch: Recorded) -> str:
    """The difference between two states: "numbers" beyond rounding, "bits" within it, or none."""
    worst = ""
    for a, b, (tensor, _) in zip(found, plain, launch.contents, strict=True):
        if torch.equal(a, b):
            continue
        dtype = tensor.dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            return "numbers"
        whole = len(a) // dtype.itemsize * dtype.itemsize
        x, y = (side[:whole].view(dtype).double() for side in (a, b))
        size = y.nan_to_num(0, 0, 0).square().mean().sqrt()
        if not torch.allclose(x, y, rtol=0.03, atol=0.03 * float(size), equal_nan=True):
            return "numbers"
        worst = "bits"
    return worst


def orders_that_differ(launch: Recorded, orders: int) -> list[int]:
    """The orders of the blocks, of so many, that leave other bits than the first."""
    plain = launch.again()
    return [seed for seed in range(1, orders) if difference(launch.again(seed=seed), plain, launch)]
