"""A kernel's addresses and masks as terms of z3, for one lane of one program in one turn of each loop.

Integers are z3's, without bounds; what a 32-bit operation gives is asked to fit, so that nothing wraps.
Floats, and comparisons of them, are unknown; so is what is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import z3

from gptkern.testing.bounds.ttir import Function, Operation, Type

Index = tuple[Any, ...]
_UNKNOWN = object()
_ORDERS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b,
    "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b,
    "sge": lambda a, b: a >= b,
}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.minsi": lambda a, b: z3.If(a < b, a, b),
    "arith.maxsi": lambda a, b: z3.If(a > b, a, b),
}
_LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "arith.andi": z3.And,
    "arith.ori": z3.Or,
    "arith.xori": z3.Xor,
}


@dataclass
class Value:
    """A value: its type, and its element at an index; a pointer's element is an offset from ``base``."""

    type: Type
    at: Callable[[Index], Any]
    base: str = ""


@dataclass
class Access:
    """One load or store of one lane.

    Attributes:
        kind: ``load``, ``store`` or ``atomic``.
        base: The argument whose memory it is.
        offset: In elements.
        conditions: What holds when it takes place: branches, loops, the lane's range, its mask.
        reached: The same without the mask.
        fits: 32-bit results on the way to address and mask.
        line: The operation.
    """

    kind: str
    base: str
    offset: Any
    conditions: list[Any]
    reached: list[Any]
    fits: list[Any]
    line: str


@dataclass
class Model:
    """All accesses of a kernel.

    Attributes:
        accesses: In the order of the text.
        locals: Variables that each program has for itself.
        facts: Definitions of quotients and of loops' turns.
        turns: (turn, step) of loops whose step is no constant.
        loaded: (base, offset, mask, value) of integers that are loaded.
    """

    accesses: list[Access] = field(default_factory=list)
    locals: list[Any] = field(default_factory=list)
    facts: list[Any] = field(default_factory=list)
    turns: list[tuple[Any, Any]] = field(default_factory=list)
    loaded: list[tuple[str, Any, Any, Any]] = field(default_factory=list)


class Evaluator:
    """Runs a kernel's operations on terms.

    Args:
        function: The kernel.
        arguments: A term or a number for each integer argument.
        programs: The grid's extents.
        loaded: (least, largest) of the integers in an argument's memory.
    """

    def __init__(
        self,
        function: Function,
        arguments: dict[str, Any],
        programs: list[Any],
        loaded: dict[str, tuple[int, int]],
    ) -> None:
        self.loaded = loaded
        self.model = Model()
        self.values: dict[str, Value] = {}
        self.defined: dict[str, Operation] = {}
        self.path: list[Any] = []
        self.programs = programs
        self.ids = [self._local(f"program_{axis}") for axis in "xyz"]
        for own, count in zip(self.ids, programs, strict=True):
            self.model.facts += [own >= 0, own < count]
        self.fits: dict[int, Any] = {}
        self.quotients: dict[tuple[str, str], tuple[Any, Any]] = {}
        for argument in function.arguments:
            if argument.type.pointer:
                self.values[argument.name] = Value(argument.type, lambda index: 0, argument.name)
            else:
                known = arguments.get(argument.name, _UNKNOWN)
                self.values[argument.name] = Value(argument.type, lambda index, known=known: known)  # type: ignore[misc]
        self._run(function.body)

    def _local(self, name: str, sort: Any = z3.Int) -> Any:
        variable = sort(f"{name}!{len(self.model.locals)}")
        self.model.locals.append(variable)
        return variable

    def _run(self, operations: list[Operation]) -> None:
        for operation in operations:
            if operation.result:
                self.defined[operation.result] = operation
            handler = getattr(self, "_" + operation.name.replace(".", "_"), None)
            if handler is not None:
                handler(operation)
            elif operation.name in _ARITHMETIC or operation.name in _LOGIC:
                self._binary(operation)
            elif operation.result:
                self._opaque(operation)
                if operation.second:
                    self._opaque(Operation("", operation.second, [], "", operation.types))

    def _set(self, operation: Operation, at: Callable[[Index], Any], base: str = "") -> None:
        memo: dict[str, tuple[Any, dict[int, Any]]] = {}

        def once(index: Index) -> Any:
            key = repr(index)
            if key not in memo:
                outer, self.fits = self.fits, {}
                memo[key] = at(index), self.fits
                self.fits = outer
            term, fits = memo[key]
            # Every access has the ranges on its way, those of terms that it shares with others too.
            self.fits |= fits
            return term

        self.values[operation.result] = Value(operation.types[-1], once, base)

    def _opaque(self, operation: Operation, limits: tuple[int, int] | None = None) -> None:
        """An unknown value: a float, or an integer of which its width is known, or its limits."""
        element = operation.types[-1].element if operation.types else "f32"

        def at(index: Index) -> Any:
            if element == "i1":
                return self._local("unknown", z3.Bool)
            if not element.startswith("i"):
                return _UNKNOWN
            unknown, bits = self._local("unknown"), int(element[1:])
            least, most = limits or (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            self.model.facts += [unknown >= least, unknown <= most]
            return unknown

        self._set(operation, at)

    def _operands(self, operation: Operation, count: int | None = None) -> list[Value]:
        return [self.values[name] for name in operation.operands[:count]]

    # Constants, ranges, shapes.

    def _arith_constant(self, operation: Operation) -> None:
        number = re.findall(r"(?:dense<)?(-?\d+|true|false)>? :|^ (true|false)", operation.text)
        integral = operation.types[-1].element.startswith("i") if operation.types else True
        if not operation.types:
            operation.types = [Type((), "i1")]
        if not integral or not number:
            return self._opaque(operation)
        word = number[0][0] or number[0][1]
        value: Any = z3.BoolVal(word == "true") if word in ("true", "false") else int(word)
        return self._set(operation, lambda index: value)

    def _tt_make_range(self, operation: Operation) -> None:
        start = int(re.findall(r"start = (\d+)", operation.text)[0])
        operation.types = operation.types[-1:]
        self._set(operation, lambda index: start + index[0])

    def _tt_splat(self, operation: Operation) -> None:
        (source,) = self._operands(operation)
        self._set(operation, lambda index: source.at(()), source.base)

    def _tt_expand_dims(self, operation: Operation) -> None:
        (source,) = self._operands(operation)
        axis = int(re.findall(r"axis = (\d+)", operation.text)[0])
        self._set(operation, lambda index: source.at(index[:axis] + index[axis + 1 :]), source.base)

    def _tt_broadcast(self, operation: Operation) -> None:
        (source,) = self._operands(operation)
        shape = source.type.shape

        def at(index: Index) -> Any:
            return source.at(tuple(0 if n == 1 else i for i, n in zip(index, shape, strict=True)))

        self._set(operation, at, source.base)

    def _tt_trans(self, operation: Operation) -> None:
        (source,) = self._operands(operation)
        order = [int(n) for n in re.findall(r"order = array<i32: ([\d, ]+)>", operation.text)[0].split(",")]

        def at(index: Index) -> Any:
            return source.at(tuple(index[order.index(axis)] for axis in range(len(order))))

        self._set(operation, at, source.base)

    # Arithmetic.

    def _fitting(self, element: str, term: Any) -> Any:
        if element == "i32" and z3.is_expr(term):
            self.fits[term.get_id()] = z3.And(term >= -(2**31), term < 2**31)
        return term

    def _binary(self, operation: Operation) -> None:
        a, b = self._operands(operation, 2)
        element = operation.types[-1].element
        if element == "i1":
            logic = _LOGIC[operation.name]
            return self._set(operation, lambda index: logic(a.at(index), b.at(index)))
        if operation.name in _LOGIC:
            return self._opaque(operation)
        function = _ARITHMETIC[operation.name]
        return self._set(operation, lambda index: self._fitting(element, function(a.at(index), b.at(index))))

    def _division(self, a: Any, b: Any) -> tuple[Any, Any]:
        """(quotient, remainder), rounded to 0 as the machine does."""
        if isinstance(a, int) and isinstance(b, int):
            quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
            return quotient, a - quotient * b
        key = repr(a), repr(b)
        if key not in self.quotients:
            quotient, rest = self._local("quotient"), self._local("rest")
            self.model.facts += [
                z3.Implies(b > 0, a == quotient * b + rest),
                z3.Implies(z3.And(a >= 0, b > 0), z3.And(rest >= 0, rest < b, quotient >= 0, quotient <= a)),
                z3.Implies(z3.And(a < 0, b > 0), z3.And(rest <= 0, rest > -b, quotient <= 0)),
                z3.Implies(z3.And(a >= 0, a < b), quotient == 0),
                z3.Implies(z3.And(b > 0, a >= b), quotient >= 1),
            ]
            self.quotients[key] = quotient, rest
        return self.quotients[key]

    def _arith_divsi(self, operation: Operation) -> None:
        a, b = self._operands(operation, 2)
        self._set(operation, lambda index: self._division(a.at(index), b.at(index))[0])

    def _arith_remsi(self, operation: Operation) -> None:
        a, b = self._operands(operation, 2)
        self._set(operation, lambda index: self._division(a.at(index), b.at(index))[1])

    def _arith_extsi(self, operation: Operation) -> None:
        (source,) = self._operands(operation)
        self._set(operation, source.at)

    def _arith_extui(self, operation: Operation) -> None:
        (source,) = self._operands(operation)
        if source.type.element != "i1":
            return self._opaque(operation)
        return self._set(operation, lambda index: z3.If(source.at(index), 1, 0))

    def _arith_trunci(self, operation: Operation) -> None:
        (source,) = self._operands(operation)
        element = operation.types[-1].element
        self._set(operation, lambda index: self._fitting(element, source.at(index)))

    def _arith_cmpi(self, operation: Operation) -> None:
        a, b = self._operands(operation, 2)
        order = _ORDERS.get(operation.text.split(",")[0].strip())
        operation.types = [Type(operation.types[-1].shape, "i1")]
        if order is None or a.type.element == "i1":
            return self._opaque(operation)
        return self._set(operation, lambda index: order(a.at(index), b.at(index)))

    def _arith_cmpf(self, operation: Operation) -> None:
        operation.types = [Type(operation.types[-1].shape, "i1")]
        self._opaque(operation)

    def _arith_select(self, operation: Operation) -> None:
        condition, a, b = self._operands(operation, 3)
        if operation.types[-1].pointer or not operation.types[-1].element.startswith("i"):
            return self._opaque(operation)

        def at(index: Index) -> Any:
            chosen = condition.at(index if condition.type.shape else ())
            return z3.If(chosen, a.at(index), b.at(index))

        return self._set(operation, at)

    # The grid.

    def _tt_get_program_id(self, operation: Operation) -> None:
        axis = "xyz".index(operation.text.split()[0])
        self._set(operation, lambda index: self.ids[axis])

    def _tt_get_num_programs(self, operation: Operation) -> None:
        axis = "xyz".index(operation.text.split()[0])
        self._set(operation, lambda index: self.programs[axis])

    # Memory.

    def _tt_addptr(self, operation: Operation) -> None:
        pointer, offset = self._operands(operation, 2)
        operation.types = operation.types[:1]
        self._set(operation, lambda index: pointer.at(index) + offset.at(index), pointer.base)

    def _tt_load(self, operation: Operation) -> None:
        operands = self._operands(operation)
        pointer, mask = operands[0], operands[1] if len(operands) > 1 else None
        self._access("load", operation, pointer, mask)
        element = re.sub(r"!tt\.ptr<(\w+)>", r"\1", pointer.type.element)
        operation.types = [Type(pointer.type.shape, element)]
        self._opaque(operation, self.loaded.get(pointer.base))
        if element.startswith("i"):
            unknown = self.values[operation.result]

            def at(index: Index) -> Any:
                value, offset = unknown.at(index), pointer.at(index)
                active = z3.BoolVal(True) if mask is None else mask.at(index if mask.type.shape else ())
                self.model.loaded.append((pointer.base, offset, active, value))
                return value

            self._set(operation, at)

    def _tt_store(self, operation: Operation) -> None:
        operands = self._operands(operation)
        self._access("store", operation, operands[0], operands[2] if len(operands) > 2 else None)

    def _tt_atomic_rmw(self, operation: Operation) -> None:
        operands = self._operands(operation)
        self._access("atomic", operation, operands[0], operands[2] if len(operands) > 2 else None)
        self._opaque(operation)

    def _access(self, kind: str, operation: Operation, pointer: Value, mask: Value | None) -> None:
        if not pointer.base:
            raise NotImplementedError("an address that is chosen, carried by a loop or made of a number")
        lanes = [self._local("lane") for _ in pointer.type.shape]
        reached = [*self.path]
        for lane, extent in zip(lanes, pointer.type.shape, strict=True):
            reached += [lane >= 0, lane < extent]
        self.fits = {}
        offset = pointer.at(tuple(lanes))
        active = [] if mask is None else [mask.at(tuple(lanes) if mask.type.shape else ())]
        if offset is _UNKNOWN or any(term is _UNKNOWN for term in active):
            raise NotImplementedError("an address that depends on a float")
        self.model.accesses.append(
            Access(
                kind,
                pointer.base,
                offset,
                [*reached, *active],
                reached,
                [*self.fits.values()],
                operation.text.strip(),
            )
        )

    # Loops and branches.

    def _scf_for(self, operation: Operation) -> None:
        header = re.match(r" %([\w.-]+) = %([\w.#-]+) to %([\w.#-]+) step %([\w.#-]+)", operation.text)
        assert header is not None
        name, *bounds = header.groups()
        first, end, step = (self.values[bound].at(()) for bound in bounds)
        place, turn = self._local("place"), self._local("turn")
        inside = [place >= first, place < end, turn >= 0, place == first + turn * step, step >= 1]
        if not isinstance(step, int):
            self.model.turns.append((turn, step))
        self.values[name] = Value(Type((), "i32"), lambda index: place)
        carried = re.findall(r"%([\w.-]+) = %([\w.#-]+)", operation.text[header.end() :])
        yielded = next((o.operands for o in reversed(operation.regions[0]) if o.name == "scf.yield"), [])
        for (argument, start), following in zip(carried, yielded, strict=True):
            self._carry(argument, start, following, operation.regions[0], turn)
        before, self.path = self.path, [*self.path, *inside]
        self._run(operation.regions[0])
        self.path = before
        if operation.result:
            self._results(operation, [self.values[start].type for _, start in carried])

    def _carry(self, argument: str, start: str, following: str, body: list[Operation], turn: Any) -> None:
        """A value that a loop carries: known where each turn adds the same to it."""
        initial = self.values[start]
        step = next((o for o in body if o.result == following), None)
        unknown = Operation("", argument, [], "", [initial.type])
        adds = step is not None and step.name in ("tt.addptr", "arith.addi") and step.operands[0] == argument
        if not adds:
            if initial.type.pointer:
                self.values[argument] = Value(initial.type, initial.at)
                return
            self._opaque(unknown)
            return
        assert step is not None
        constant = self.values.get(step.operands[1])
        if constant is None:
            raise NotImplementedError("a loop that adds to an address what it computes itself")
        at: Callable[[Index], Any] = lambda index: initial.at(index) + turn * constant.at(index)  # noqa: E731
        self.values[argument] = Value(initial.type, at, initial.base)

    def _results(self, operation: Operation, types: list[Type]) -> None:
        names = (
            [operation.result] if len(types) == 1 else [f"{operation.result}#{i}" for i in range(len(types))]
        )
        for name, type in zip(names, types, strict=True):
            self._opaque(Operation("", name, [], "", [type]))

    def _scf_if(self, operation: Operation) -> None:
        condition = self.values[operation.operands[0]].at(())
        before = self.path
        for branch, region in zip((condition, z3.Not(condition)), operation.regions, strict=False):
            self.path = [*before, branch]
            self._run(region)
        self.path = before
        if operation.result:
            self._results(operation, operation.types)

    def _scf_while(self, operation: Operation) -> None:
        raise NotImplementedError("a loop until a value in memory changes")

    def _tt_int_to_ptr(self, operation: Operation) -> None:
        raise NotImplementedError("addresses that are read from memory")
