"""The claims about a kernel's accesses, each handed to z3: no counterexample, for all sizes at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import z3

from gptkern.testing.bounds.specs import Spec
from gptkern.testing.bounds.symbolic import Access, Evaluator, Model
from gptkern.testing.bounds.ttir import Function


@dataclass(frozen=True)
class Finding:
    """A claim that does not hold, or that was not decided in time.

    Attributes:
        claim: ``bounds``, ``int32`` or ``race``; ``reached`` if the access never takes place.
        access: The operation.
        example: Numbers that break it, or that the solver gave up.
    """

    claim: str
    access: str
    example: str


class Kernel:
    """A kernel with a specification.

    Args:
        function: Its text.
        arguments: The recorded integer arguments, constexpr ones among them.
        grid: The recorded grid.
        spec: What is symbolic, and how large the tensors are.
        seconds: The solver's time for one claim.
    """

    def __init__(
        self, function: Function, arguments: dict[str, Any], grid: tuple[int, ...], spec: Spec, seconds: int
    ) -> None:
        self.spec, self.seconds = spec, seconds
        symbols = {name: z3.Int(name) for name in spec.sizes}
        self.sizes = [
            z3.And(symbols[name] >= low, symbols[name] <= high) for name, (low, high) in spec.sizes.items()
        ]
        self.names: dict[str, Any] = {**arguments, **symbols}
        for name, formula in spec.arguments.items():
            self.names[name] = formula(self.names)
        for argument in function.arguments:
            if argument.name in spec.sizes and argument.divisor > 1:
                self.sizes.append(symbols[argument.name] % argument.divisor == 0)
        programs: list[Any] = [*grid, *(1 for _ in range(3 - len(grid)))]
        for axis, formula in spec.grid.items():
            programs[axis] = formula(self.names)
        self.sizes += [z3.And(n >= 1, n < 2**31) for n in programs if z3.is_expr(n)]
        self.names |= {f"programs_{axis}": count for axis, count in enumerate(programs)}
        terms = {name: term for name, term in self.names.items() if isinstance(term, int) or z3.is_expr(term)}
        self.evaluator = Evaluator(function, terms, programs, spec.loaded)
        self.model: Model = self.evaluator.model

    def _counterexample(self, claims: list[Any]) -> str:
        """Numbers for which all of ``claims`` hold; "" if there are none."""
        solver = z3.Solver()
        solver.set("timeout", 1000 * self.seconds)
        solver.add(*self.sizes, *claims)
        answer = solver.check()
        if answer == z3.unsat:
            return ""
        if answer == z3.unknown:
            return f"not decided in {self.seconds} s"
        model = solver.model()
        return ", ".join(sorted(f"{d.name()} = {model[d]}" for d in model.decls())[:12])

    def _inside(self, access: Access) -> Finding | None:
        extent = self.spec.extents[access.base](self.names)
        outside = z3.Or(access.offset < 0, access.offset >= extent)
        example = self._counterexample([*self.model.facts, *access.conditions, outside])
        return Finding("bounds", access.line, example) if example else None

    def _reached(self, access: Access) -> Finding | None:
        """The claims are not empty: there are numbers for which the access takes place."""
        example = self._counterexample([*self.model.facts, *access.conditions])
        return Finding("reached", access.line, "never") if not example else None

    def _fitting(self, access: Access) -> Finding | None:
        if not access.fits:
            return None
        example = self._counterexample([*self.model.facts, *access.reached, z3.Not(z3.And(access.fits))])
        return Finding("int32", access.line, example) if example else None

    def _renamed(self, terms: list[Any]) -> list[Any]:
        pairs = [(own, z3.Const(f"other_{own}", own.sort())) for own in self.model.locals]
        return [z3.substitute(term, *pairs) if z3.is_expr(term) else term for term in terms]

    def _turns(self) -> Iterator[Any]:
        """Products of a turn and a step grow with the turn, by a step at least: true of all integers."""
        for turn, step in self.model.turns:
            (other,) = self._renamed([turn])
            yield z3.Implies(turn == other, turn * step == other * step)
            yield z3.Implies(turn > other, turn * step >= other * step + step)
            yield z3.Implies(turn < other, turn * step + step <= other * step)

    def _constants(self) -> Iterator[Any]:
        """Both programs load the same integer from one address, where nobody stores."""
        stored = {access.base for access in self.model.accesses if access.kind != "load"}
        for base, offset, active, value in self.model.loaded:
            if base not in stored:
                other_offset, other_active, other = self._renamed([offset, active, value])
                yield z3.Implies(z3.And(offset == other_offset, active, other_active), value == other)

    def _apart(self, first: Access, second: Access) -> Finding | None:
        """No two programs, one at each access, use one address."""
        own = [*self.model.facts, *first.conditions]
        offset, *others = self._renamed([second.offset, *self.model.facts, *second.conditions])
        programs = z3.Or(
            [a != b for a, b in zip(self.evaluator.ids, self._renamed(self.evaluator.ids), strict=True)]
        )
        claims = [*own, *others, *self._turns(), *self._constants(), programs, first.offset == offset]
        example = self._counterexample(claims)
        return Finding("race", f"{first.line} and {second.line}", example) if example else None

    def findings(self) -> list[Finding]:
        """The claims that do not hold."""
        found: list[Finding | None] = []
        for access in self.model.accesses:
            found += [self._reached(access), self._inside(access), self._fitting(access)]
        stores = [a for a in self.model.accesses if a.kind == "store" and a.base not in self.spec.shared]
        for number, access in enumerate(stores):
            found += [self._apart(access, other) for other in stores[number:] if other.base == access.base]
        for load in self.model.accesses:
            if load.kind == "load":
                found += [self._apart(load, store) for store in stores if store.base == load.base]
        return [finding for finding in found if finding is not None]
