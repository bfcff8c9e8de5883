"""bfloat16 and e4m3 by value in Triton's interpreter.

The interpreter (seen in triton 3.6.0 and 3.8.0) keeps bf16 as raw 16-bit patterns and lets NumPy
add, compare and multiply those patterns; its cast from fp32 truncates where hardware rounds to
nearest even. ``install`` wraps its builder: a bf16 operand is widened to fp32, the operation is
done there, and a bf16 result is rounded to nearest even, as the hardware does. Its casts to and from
e4m3 lose the carry of a rounding, and NaN; here PyTorch casts.

Its matrix products are a BLAS library's, which sums in an order that depends on processor, shape and
layout (seen: OpenBLAS 0.3.31 on a machine with AVX2 alone, rows of 16 and of 64). A matrix unit has no such
dependence: here the sums are computed in fp64 and rounded once, which hides their order.

It replaces the functions of ``triton.language`` by its own for a launch, and looks for them anew at every
call of a device function: half the time of an attention. Here it looks only where some are not replaced.
It makes the table of NumPy's dtypes anew at every load, store and cast; here each entry is asked for once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

_COMPUTED = (
    "create_fadd",
    "create_fsub",
    "create_fmul",
    "create_fdiv",
    "create_frem",
    "create_precise_divf",
    "create_minimumf",
    "create_minnumf",
    "create_maximumf",
    "create_maxnumf",
    "create_clampf",
    "create_fma",
    "create_fneg",
    "create_floor",
    "create_ceil",
    "create_sqrt",
    "create_precise_sqrt",
    "create_rsqrt",
    "create_exp",
    "create_exp2",
    "create_log",
    "create_log2",
    "create_sin",
    "create_cos",
    "create_erf",
)
_COMPARED = tuple(
    f"create_fcmp{order}{kind}" for order in "OU" for kind in ("LT", "GT", "LE", "GE", "EQ", "NE")
)


def widen(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bf16 bit patterns nearest to fp32 ``values``, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    last_bit = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + last_bit) >> np.uint32(16)).astype(np.uint16)
    quiet_nan = np.uint16(0x7FC0)
    return np.where(np.isnan(values), quiet_nan, rounded).reshape(np.shape(values))


def _truncate_to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return (bits >> np.uint32(16)).astype(np.uint16).reshape(np.shape(values))


def _is_bf16(handle: Any) -> bool:
    # The interpreter gives a comparison's result the type of its operands, so the data's dtype counts too.
    return (
        isinstance(handle, TensorHandle)
        and not isinstance(handle.dtype, tl.pointer_type)
        and handle.dtype.scalar == tl.bfloat16
        and handle.data.dtype == np.uint16
    )


def _widened(handle: Any) -> Any:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrowed(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(round_to_bf16(handle.data), tl.bfloat16)


def _by_value(original: Callable[..., Any], *, rounds: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def operation(self: Any, *operands: Any) -> Any:
        if not any(_is_bf16(x) for x in operands):
            return original(self, *operands)
        result = original(self, *(_widened(x) for x in operands))
        return _narrowed(result) if rounds else TensorHandle(result.data, tl.int1)

    return operation


def _is_e4m3(dtype: Any) -> bool:
    return bool(dtype.scalar == tl.float8e4nv)


def _from_e4m3(handle: TensorHandle) -> TensorHandle:
    wide = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn).float()
    return TensorHandle(wide.numpy().reshape(handle.data.shape), tl.float32)


def _to_e4m3(handle: TensorHandle) -> TensorHandle:
    narrow = torch.from_numpy(np.ascontiguousarray(handle.data, dtype=np.float32)).to(torch.float8_e4m3fn)
    return TensorHandle(narrow.view(torch.uint8).numpy().reshape(handle.data.shape), tl.float8e4nv)


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        src = _widened(src)
        if _is_e4m3(src.dtype) and not _is_e4m3(dst_type):
            src = _from_e4m3(src)
        if _is_e4m3(dst_type) and src.dtype.scalar == tl.float32:
            return _to_e4m3(src)
        if dst_type.scalar != tl.bfloat16:
            return original(self, src, dst_type)
        return _narrowed(original(self, src, tl.float32))

    return cast_impl


def _float_cast(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            nearest = rounding_mode == interpreter._ir.ROUNDING_MODE.RTNE
            return TensorHandle((round_to_bf16 if nearest else _truncate_to_bf16)(src.data), tl.bfloat16)
        if _is_e4m3(dst_type) and src.dtype.scalar == tl.float32:
            return _to_e4m3(src)
        if _is_e4m3(src.dtype) and not _is_e4m3(dst_type):
            wide = _from_e4m3(src)
            return wide if dst_type.scalar == tl.float32 else self.cast_impl(wide, dst_type)
        return original(self, src, dst_type, rounding_mode)

    return create_fp_to_fp


def _dot(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> Any:
        a, b = _widened(a), _widened(b)
        if not all(x.dtype.scalar in (tl.float16, tl.float32) for x in (a, b, d)):
            return original(self, a, b, d, *options)
        with np.errstate(all="ignore"):  # a GPU multiplies inf and NaN in silence
            products = np.matmul(a.data, b.data, dtype=np.float64)
        return TensorHandle(products.astype(d.data.dtype) + d.data, d.dtype.scalar)

    return create_dot


def _whole_array(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a reduction or scan that NumPy computes over the whole array at once."""

    @functools.wraps(original)
    def reduction(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        value = source[0] if isinstance(source, tuple) else source
        if not _is_bf16(value.handle):
            return original(self, source, *args, **kwargs)
        result = original(self, self.to_tensor(widen(value.handle.data), tl.float32), *args, **kwargs)
        if isinstance(result, tuple | list):
            return type(result)(_narrowed_tensor(self, x) for x in result)
        return _narrowed_tensor(self, result)

    return reduction


def _narrowed_tensor(self: Any, value: Any) -> Any:
    if value.dtype != tl.float32:  # the index of an argmin or argmax
        return value
    handle = _narrowed(value.handle)
    return tl.tensor(
        handle, value.type.with_element_ty(tl.bfloat16) if value.type.is_block() else tl.bfloat16
    )


def _get_bf16(self: Any, value: float) -> TensorHandle:
    return TensorHandle(round_to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)


def _is_patched(language: Any) -> bool:
    # The interpreter leaves a module that a device function alone has brought replaced, but not its tensor.
    return not (tl.core.is_builtin(language.load) or tl.core.is_builtin(language.tensor.__add__))


def _patch_once(original: Callable[..., Any]) -> Callable[..., Any]:
    languages: dict[Any, list[Any]] = {}

    @functools.wraps(original)
    def patch_lang(fn: Any) -> Any:
        if fn not in languages:
            languages[fn] = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if languages[fn] and all(_is_patched(language) for language in languages[fn]):
            return interpreter._LangPatchScope()  # whoever replaced them restores them
        return original(fn)

    return patch_lang


def _np_dtype_once(original: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    @functools.wraps(original)
    def get_np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):  # not hashable
            return original(scalar)
        if scalar not in known:
            known[scalar] = original(scalar)
        return known[scalar]

    return get_np_dtype


def install() -> None:
    """Make the interpreter of this process compute bf16 and e4m3 by value; a second call does nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "computes_bf16_by_value", False):
        return
    for names, rounds in ((_COMPUTED, True), (_COMPARED, False)):
        for name in names:
            if hasattr(builder, name):  # which operations there are differs between Triton versions
                setattr(builder, name, _by_value(getattr(builder, name), rounds=rounds))
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _float_cast(builder.create_fp_to_fp)
    builder.create_dot = _dot(builder.create_dot)
    builder.get_bf16 = _get_bf16
    for owner, name in (
        (interpreter.ReduceOps, "sum"),
        (interpreter.ReduceOps, "min_max"),
        (interpreter.ScanOps, "cumsum"),
        (interpreter.ScanOps, "cumprod"),
    ):
        setattr(owner, name, _whole_array(getattr(owner, name)))
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _np_dtype_once(interpreter._get_np_dtype)
    builder.computes_bf16_by_value = True
