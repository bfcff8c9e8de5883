"""The interpreter's operations on floats, replaced by the ring's while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from gptkern.testing.exact import ring

_REFUSED = (
    *("create_frem", "create_clampf", "create_floor", "create_ceil"),
    *("create_fp_ext", "create_fp_trunc", "create_fp_to_fp", "create_dot_scaled"),
)
_SYMBOLS = ("rsqrt", "sqrt", "precise_sqrt", "erf", "sin", "cos")
_COMPARISONS = {
    "LT": np.less,
    "GT": np.greater,
    "LE": np.less_equal,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}


def _data(handle: TensorHandle) -> np.ndarray:
    if handle.data.dtype != np.float32:
        raise TypeError(f"exact algebra is of float32 tensors; a kernel computes with {handle.dtype}")
    data: np.ndarray = handle.data
    return data


def _float(data: np.ndarray) -> TensorHandle:
    return TensorHandle(np.asarray(data, np.float32), tl.float32)


def _elementwise(function: Callable[..., np.ndarray]) -> Callable[..., TensorHandle]:
    return lambda *handles: _float(function(*(_data(h) for h in handles)))


def _compared(order: np.ufunc) -> Callable[..., TensorHandle]:
    def compare(a: TensorHandle, b: TensorHandle) -> TensorHandle:
        return TensorHandle(order(ring.lifted(_data(a)), ring.lifted(_data(b))), tl.int1)

    return compare


def _chosen(larger: bool, *, nan_wins: bool) -> Callable[..., TensorHandle]:
    """The larger or the smaller of two elements, in the ring's order; NaN if asked for, else the other."""

    def choose(a: TensorHandle, b: TensorHandle) -> TensorHandle:
        x, y = np.broadcast_arrays(_data(a), _data(b))
        first, second = ring.lifted(x), ring.lifted(y)
        takes_first = first >= second if larger else first <= second
        takes_first = np.where(np.isnan(first), nan_wins, takes_first | (np.isnan(second) & (not nan_wins)))
        return _float(np.where(takes_first, x, y))

    return choose


def _exp2(a: np.ndarray) -> np.ndarray:
    unit = ring.packed(*(np.array(part) for part in ring.LOG2E))
    return ring.exp(ring.divide(a, unit))


def _log2(a: np.ndarray) -> np.ndarray:
    unit = ring.packed(*(np.array(part) for part in ring.LOG2E))
    return ring.multiply(ring.log(a), unit)


def _from_integers(src: TensorHandle, dst_type: Any) -> TensorHandle:
    if dst_type.scalar != tl.float32:
        raise TypeError(f"exact algebra is of float32 tensors; a kernel makes {dst_type.scalar} of integers")
    numbers = src.data.astype(np.int64)
    return _float(ring.packed(numbers % ring.P, numbers % ring.N))


def _to_integers(src: TensorHandle, dst_type: Any) -> TensorHandle:
    """0, which masked loads of integers are given; no other element is an integer."""
    if _data(src).any():
        raise TypeError("exact algebra has no integers of floats")
    return TensorHandle(np.zeros(src.data.shape, interpreter._get_np_dtype(dst_type)), dst_type.scalar)


def _dot(a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
    return _float(ring.add(ring.matmul(_data(a), _data(b)), _data(d)))


def _fma(x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    return _float(ring.add(ring.multiply(_data(x), _data(y)), _data(z)))


def _refused(name: str) -> Callable[..., TensorHandle]:
    def refuse(*operands: Any) -> TensorHandle:
        raise TypeError(f"exact algebra has no {name.removeprefix('create_')}: float32 ring operations alone")

    return refuse


def _bitcast(original: Callable[..., Any]) -> Callable[..., Any]:
    def bitcast(src: TensorHandle, dst_type: Any) -> Any:
        if src.data.dtype == np.float32 or dst_type.scalar == tl.float32:
            raise TypeError("exact algebra has no bitcast of floats: their bits are not those of a number")
        return original(src, dst_type)

    return bitcast


def _operations(builder: Any) -> dict[str, Callable[..., Any]]:
    operations: dict[str, Callable[..., Any]] = {
        "get_fp32": lambda number: _float(np.array([ring.stored(number)])),
        "create_fadd": _elementwise(ring.add),
        "create_fsub": _elementwise(ring.subtract),
        "create_fmul": _elementwise(ring.multiply),
        "create_fdiv": _elementwise(ring.divide),
        "create_precise_divf": _elementwise(ring.divide),
        "create_fneg": _elementwise(ring.negate),
        "create_fabs": _elementwise(ring.absolute),
        "create_exp": _elementwise(ring.exp),
        "create_exp2": _elementwise(_exp2),
        "create_log": _elementwise(ring.log),
        "create_log2": _elementwise(_log2),
        "create_fma": _fma,
        "create_dot": _dot,
        "create_si_to_fp": _from_integers,
        "create_ui_to_fp": _from_integers,
        "create_fp_to_si": _to_integers,
        "create_fp_to_ui": _to_integers,
        "create_maximumf": _chosen(True, nan_wins=True),
        "create_maxnumf": _chosen(True, nan_wins=False),
        "create_minimumf": _chosen(False, nan_wins=True),
        "create_minnumf": _chosen(False, nan_wins=False),
        "create_bitcast": _bitcast(builder.create_bitcast),
    }
    operations |= {name: _refused(name) for name in _REFUSED}
    for name in _SYMBOLS:
        symbol = "sqrt" if name == "precise_sqrt" else name
        operations[f"create_{name}"] = _elementwise(lambda a, symbol=symbol: ring.apply(symbol, a))
    for kind, order in _COMPARISONS.items():
        operations |= {f"create_fcmp{ordered}{kind}": _compared(order) for ordered in "OU"}
    return operations


def _is_float(value: Any) -> bool:
    return bool(value.handle.data.dtype == np.float32)


def _reductions() -> dict[str, Callable[..., Any]]:
    """``ReduceOps``' methods, for floats in the ring."""
    owner = interpreter.ReduceOps
    numeric_sum, numeric_min_max, generic = owner.sum, owner.min_max, owner.generic_reduce

    def total(self: Any, value: Any) -> Any:
        if not _is_float(value):
            return numeric_sum(self, value)
        return self.to_tensor(ring.total(value.handle.data, self.axis, self.keep_dims), value.dtype)

    def min_max(self: Any, source: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        value = source[0] if isinstance(source, tuple) else source
        if not _is_float(value):
            return numeric_min_max(self, source, val_reduce_op, idx_reduce_op)
        data, order = value.handle.data, ring.lifted(value.handle.data)
        if self.axis is None:
            data, order = data.ravel(), order.ravel()
        axis = 0 if self.axis is None else self.axis
        largest = val_reduce_op is np.nanmax or idx_reduce_op is np.nanargmax
        # NaN loses, as in the interpreter.
        order = np.where(np.isnan(order), -np.inf if largest else np.inf, order)
        at = np.expand_dims((np.argmax if largest else np.argmin)(order, axis=axis), axis)
        best = np.take_along_axis(data, at, axis)
        if not self.keep_dims:
            best, at = best.squeeze(axis), at.squeeze(axis)
        results = []
        if val_reduce_op:
            results.append(self.to_tensor(best, value.dtype))
        if idx_reduce_op:
            results.append(self.to_tensor(at, tl.int32))
        return results[0] if len(results) == 1 else tuple(results)

    def generic_reduce(self: Any, source: Any) -> Any:
        if any(_is_float(value) for value in source):
            raise TypeError("exact algebra has no reduction of floats but sum, max and min")
        return generic(self, source)

    return {"sum": total, "min_max": min_max, "generic_reduce": generic_reduce}


@contextmanager
def substituted() -> Iterator[None]:
    """Interpret kernels in the ring within the block."""
    builder, owner = interpreter.interpreter_builder, interpreter.ReduceOps
    reductions = _reductions()
    originals = {name: getattr(owner, name) for name in reductions}
    operations = _operations(builder)
    try:
        for name, function in operations.items():
            setattr(builder, name, function)
        for name, function in reductions.items():
            setattr(owner, name, function)
        yield
    finally:
        for name in operations:
            delattr(builder, name)
        for name, function in originals.items():
            setattr(owner, name, function)
