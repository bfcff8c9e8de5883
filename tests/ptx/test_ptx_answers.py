"""Every form of instruction that a kernel uses has an answer worked out apart from the executor."""

from __future__ import annotations

import math
from typing import Any

import ptx_answers
import ptx_forms
import pytest
import torch
from ptx_support import run

_INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
_REGISTERS = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}


def _column(bits: list[int], size: int) -> torch.Tensor:
    wrapped = [value - (1 << size) if value >> (size - 1) & 1 else value for value in bits]
    return torch.tensor(wrapped, dtype=_INTEGERS[size])


def _loaded(position: int, kind: str, size: int) -> tuple[str, str]:
    """(instructions that load a source, its register)."""
    register = f"{_REGISTERS[size]}{10 + position}"
    at = f"mul.wide.u32 %rd30, %r0, {size // 8}; add.s64 %rd30, %rd30, %rd{position};"
    load = f"{at} ld.global.b{size} {register}, [%rd30];"
    if kind == "pred":
        return f"{load} setp.ne.b32 %p{10 + position}, {register}, 0;", f"%p{10 + position}"
    return load, register


def executed(form: str, answer: ptx_answers.Answer, columns: list[list[int]]) -> list[int]:
    """The result's bits for each lane."""
    # A byte comes in a register of 16 bits.
    sizes = [max(16, ptx_answers.size_of(kind)) for kind in answer.sources]
    size = max(16, ptx_answers.size_of(answer.result))
    loads, names = zip(
        *(_loaded(i, kind, s) for i, (kind, s) in enumerate(zip(answer.sources, sizes, strict=True))),
        strict=True,
    )
    result = f"{_REGISTERS[size]}20"
    target, after = (result, "") if answer.result != "pred" else ("%p20", f"selp.b32 {result}, 1, 0, %p20;")
    store = f"mul.wide.u32 %rd31, %r0, {size // 8}; add.s64 %rd31, %rd31, %rd{len(names)};"
    out = torch.zeros(ptx_answers.LANES, dtype=_INTEGERS[size])
    run(
        f"{' '.join(loads)} {form} {', '.join([target, *names])}; {after} {store} "
        f"st.global.b{size} [%rd31], {result};",
        *(_column(bits, s) for bits, s in zip(columns, sizes, strict=True)),
        out,
    )
    return [value & ((1 << size) - 1) for value in out.tolist()]


def same(kind: str, bits: int, expected: Any, tolerance: float) -> bool:
    """True if the bits are the number that is expected, of a pair both."""
    if isinstance(expected, list):
        half = kind.removesuffix("x2")
        return all(same(half, bits >> 16 * i, value, tolerance) for i, value in enumerate(expected))
    if not isinstance(expected, float):
        size = ptx_answers.size_of(kind)
        return bits & ((1 << size) - 1) == ptx_answers.encoded(kind, expected)
    found = ptx_answers.decoded(kind, bits)
    if math.isnan(expected):
        return math.isnan(found)
    if tolerance:
        return math.isclose(found, expected, rel_tol=tolerance, abs_tol=2.0**-149)
    return found == expected and math.copysign(1, found) == math.copysign(1, expected)


@pytest.mark.parametrize("form", ptx_forms.ARITHMETIC)
def test_an_instruction_gives_its_answer(form: str) -> None:
    answer = ptx_answers.answer(form)
    columns = [ptx_answers.operands(form, kind, i) for i, kind in enumerate(answer.sources)]
    found = executed(form, answer, columns)
    for lane, bits in enumerate(found):
        values = [
            ptx_answers.decoded(kind, column[lane])
            for kind, column in zip(answer.sources, columns, strict=True)
        ]
        expected = answer.function(*values)
        assert same(answer.result, bits, expected, answer.tolerance), (form, values, hex(bits), expected)
