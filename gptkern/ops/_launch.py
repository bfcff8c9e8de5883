"""Launching kernels: the launch table, one launch function, and a recorder of launches.

Launch configurations are data, in ``tables/sm80.toml``, ``sm90.toml`` and ``sm100.toml``: per
kernel an ordered list of rows. A row's ``max_<name>`` keys and string keys say
when it applies, the other keys are the kernel's options. The first row that applies wins. There
is no autotuning at run time: it would stall first calls, break graph capture and make results depend
on timing.
"""

from __future__ import annotations

import functools
import inspect
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from threading import get_ident
from typing import Any, Final, Generic, TypeVar

import torch

from gptkern.ops._counters import are_counters, counters
from gptkern.ops.pack.loader import loader

# The architectures that kernels are compiled for and checked on: one for each table, and sm_89, where
# sm80.toml's rows have the least shared memory.
ARCHS = (80, 89, 90, 100)
_NOTES = ("measured",)

Observer = Callable[["Launch"], bool]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class Launch:
    """One kernel launch: the kernel, the grid and the arguments."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def arguments(self) -> dict[str, Any]:
        """The values by the names of the kernel's parameters, defaults among them."""
        signature = inspect.signature(self.kernel.fn)
        named = {name: value for name, value in self.kwargs.items() if name in signature.parameters}
        call = signature.bind(*self.args, **named)
        call.apply_defaults()
        return dict(call.arguments)


# (architecture, kernel, position) of each table row in use: the ahead-of-time report finds the others.
row_lookups: set[tuple[int, str, int]] = set()

_observer: Observer | None = None
# The launches of threads that are in ``repeated``: an observer has those of all threads.
_collected: dict[int, list[Launch]] = {}
_recorded_arch: int | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Launch ``kernel`` over ``grid`` on the current stream; an empty grid launches nothing.

    The caller has made the tensors' device current (see ``on_device``).
    """
    if 0 in grid:
        return
    if _collected and (made := _collected.get(get_ident())) is not None:
        made.append(Launch(kernel, grid, args, kwargs))
    if _observer is not None and not _observer(Launch(kernel, grid, args, kwargs)):
        return
    if not loader().launch(kernel, grid, args, kwargs):
        for value in args:
            if isinstance(value, torch.Tensor) and value.is_neg():
                raise ValueError(
                    "a kernel is given a tensor with the negative bit, whose memory has the opposites of its "
                    "elements: call its resolve_neg()"
                )
        kernel[grid](*args, **kwargs)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Pass every launch to ``observer``, which returns True to let it take place."""
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous


@contextmanager
def record(arch: int) -> Iterator[list[Launch]]:
    """Collect launches instead of making them, with the launch table of ``arch`` (90 for sm_90).

    Called with meta tensors, an op then yields exactly what it would launch on such a GPU: this
    is what the ahead-of-time report compiles.
    """
    global _recorded_arch
    launches: list[Launch] = []

    def collect(item: Launch) -> bool:
        launches.append(item)
        return False

    previous, _recorded_arch = _recorded_arch, arch
    try:
        with observe(collect):
            yield launches
    finally:
        _recorded_arch = previous


def recording() -> bool:
    """True while launches are collected, those of meta tensors included (see ``record``)."""
    return _recorded_arch is not None


def on_device(tensor: torch.Tensor) -> Any:
    """Context that makes ``tensor``'s GPU current, as Triton launches on the current one."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NO_CONTEXT


class _NoContext:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


_NO_CONTEXT = _NoContext()


@functools.cache
def _device_arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    capability = 10 * major + minor
    if capability < ARCHS[0]:
        raise RuntimeError(
            f"GPU {index} has compute capability {major}.{minor}; gptkern's kernels need 8.0 or newer"
        )
    return capability


def arch(device: torch.device) -> int:
    """Compute capability as an integer (90 for 9.0); a CPU, where kernels are interpreted, counts as 90."""
    if _recorded_arch is not None:
        return _recorded_arch
    if device.type == "cuda":
        return _device_arch(device.index if device.index is not None else torch.cuda.current_device())
    return 90


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 132 (an H100) where there is no GPU to ask."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 132


def _serving(arch: int) -> int:
    """The architecture whose table serves ``arch``.

    sm_120 is newer than sm_100, but has sm_89's shared memory (99 KB a block) and no tensor memory:
    it takes sm_80's rows, which fit in that.
    """
    if arch < 90 or arch >= 120:
        return 80
    return 90 if arch < 100 else 100


def table_file(arch: int) -> Path:
    """The file of the launch table that serves ``arch``."""
    return Path(str(resources.files(__package__).joinpath("tables", f"sm{_serving(arch)}.toml")))


@functools.cache
def table(arch: int) -> dict[str, list[dict[str, Any]]]:
    """The launch table that serves ``arch``: rows by kernel."""
    return tomllib.loads(table_file(arch).read_text())


_caches: list[Any] = []


def planned(function: Function) -> Function:
    """``functools.cache`` for results that depend on the launch table: cleared when a row changes."""
    cached = functools.cache(function)
    _caches.append(cached)
    return cached  # type: ignore[return-value]


_MOST_PLANS = 4096
# Of a call that was checked, and whose launches are worked out each time.
CHECKED: Final = "checked"
Plan = TypeVar("Plan")
Tensors = Sequence[torch.Tensor | None]


class Plans(Generic[Plan]):
    """Calls of an op that were checked and laid out for their launch, by ``_dispatch.call_key``.

    They are cleared when a row of the launch table changes, and when there are very many.
    """

    def __init__(self) -> None:
        self._plans: dict[Any, Plan] = {}
        self.get = self._plans.get
        self.cache_clear = self._plans.clear
        _caches.append(self)

    def keep(self, key: object, plan: Plan) -> Plan:
        """``plan``, which calls of this key have from now on; a key of None is that of no call."""
        if key is not None:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan


# The place of a tensor of ``counters`` among a call's.
_COUNTERS = -1


class _Made:
    """A launch that was made once: its tensors' places, and all else."""

    def __init__(self, made: Launch, places: dict[tuple[int, torch.dtype], int]) -> None:
        self._kernel, self._grid, self._options = made.kernel, made.grid, made.kwargs
        self._args = list(made.args)
        # position among the arguments, place among the call's tensors, what makes the argument of the tensor:
        # the number of counters, a tensor map without its tensor, or None
        self._places: list[tuple[int, int, Any]] = []
        for position, value in enumerate(made.args):
            base = getattr(value, "base", value) if hasattr(value, "block_shape") else value
            if not isinstance(base, torch.Tensor):
                continue
            self._args[position] = type(value)
            if are_counters(base):
                self._places.append((position, _COUNTERS, base.numel()))
                continue
            mapped = None if base is value else {**value.__dict__, "base": None}
            self._places.append((position, places[base.data_ptr(), base.dtype], mapped))

    def launch(self, tensors: Tensors, device: torch.device) -> None:
        args = self._args.copy()
        for position, place, detail in self._places:
            if place == _COUNTERS:
                args[position] = counters(device, detail)
            elif detail is None:
                args[position] = tensors[place]
            else:
                made = object.__new__(args[position])
                made.__dict__.update(detail, base=tensors[place])
                args[position] = made
        launch(self._kernel, self._grid, *args, **self._options)


class Again:
    """A call's launches, to be made of other tensors of the same shapes.

    Args:
        made: The launches.
        tensors: The call's tensors, None among them, each with its own address; the first is on its device.
        new: The tensors that the call has allocated: results, then scratch memory.

    Raises:
        LookupError: A launch has a tensor that is none of them, nor of ``counters``; or a new one is not
            contiguous.
    """

    def __init__(self, made: Sequence[Launch], tensors: Tensors, new: Tensors = ()) -> None:
        if not all(t is None or t.is_contiguous() for t in new):
            raise LookupError("a new tensor is not contiguous")
        places = {(t.data_ptr(), t.dtype): i for i, t in enumerate((*tensors, *new)) if t is not None}
        self._launches = [_Made(item, places) for item in made]
        self._new = [None if t is None else (t.shape, t.dtype) for t in new]

    def launch(self, tensors: Tensors) -> list[Any]:
        """Make the launches of these tensors: the new ones."""
        assert tensors[0] is not None
        device = tensors[0].device
        new = [None if t is None else torch.empty(t[0], dtype=t[1], device=device) for t in self._new]
        given = (*tensors, *new)
        for item in self._launches:
            item.launch(given, device)
        return new


def repeated(
    plans: Plans[Any], key: object, tensors: Tensors, make: Callable[[], Sequence[Any] | None]
) -> Sequence[Any]:
    """Make the launches that ``make`` makes, or made in a call of the same key, of ``tensors``.

    Args:
        key: From ``_dispatch.call_key``, of all that decides on the launches.
        tensors: All tensors that the launches are given, in an order of the op's own; None for none.
        make: Returns what it allocates for the launches by ``torch.empty``, None among it: results first.

    Returns:
        What ``make`` returns, of these tensors.
    """
    again = plans.get(key)
    if isinstance(again, Again):
        return again.launch(tensors)
    given = [tensor.data_ptr() for tensor in tensors if tensor is not None]
    if key is None or len(set(given)) < len(given):  # which is which would not be seen
        return make() or ()
    thread = get_ident()
    outer = _collected.get(thread)
    made: list[Launch] = []
    _collected[thread] = made
    try:
        new = make() or ()
    finally:
        if outer is None:
            del _collected[thread]
        else:
            outer.extend(made)
            _collected[thread] = outer
    if made:  # none, where there is nothing to compute
        with suppress(LookupError):
            plans.keep(key, Again(made, tensors, new))
    return new


def forget() -> None:
    """Clear ``Plans``, the caches of ``planned`` functions and ``row_lookups``."""
    row_lookups.clear()
    for cached in _caches:
        cached.cache_clear()


@contextmanager
def replaced_row(arch: int, kernel: str, index: int, row: dict[str, Any]) -> Iterator[None]:
    """Replace one row of the launch table that serves ``arch`` within the block: for the tuner."""
    rows = table(arch)[kernel]
    before, rows[index] = rows[index], row
    forget()
    try:
        yield
    finally:
        rows[index] = before
        forget()


def _applies(row: dict[str, Any], shape: dict[str, Any]) -> bool:
    for name, value in shape.items():
        if isinstance(value, str):
            if row.get(name, value) != value:
                return False
        elif value > row.get(f"max_{name}", value):
            return False
    return True


@planned
def _row(kernel: str, arch: int, shape: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    extents = dict(shape)
    for index, row in enumerate(table(arch).get(kernel, ())):
        if _applies(row, extents):
            row_lookups.add((arch, kernel, index))
            return {
                key: value
                for key, value in row.items()
                if not key.startswith("max_") and key not in extents and key not in _NOTES
            }
    raise ValueError(f"{kernel}: no launch row for {extents} on sm_{arch}; see gptkern/ops/tables/")


def config(kernel: str, device: torch.device, **shape: Any) -> dict[str, Any]:
    """The launch configuration of ``kernel`` for a shape class: block sizes, num_warps, num_stages."""
    return _row(kernel, arch(device), tuple(sorted(shape.items())))
