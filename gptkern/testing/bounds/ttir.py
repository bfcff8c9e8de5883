"""Triton's intermediate text as a tree of operations."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LOCATION = re.compile(r"\s+loc\((?:[^()]|\([^()]*\))*\)")
_ARGUMENT = re.compile(r"%([\w.-]+): (!tt\.ptr<[^>]*>|[\w.]+)(?: \{([^}]*)\})?")
_LINE = re.compile(r'(?:%([\w.-]+)(?:, %([\w.-]+))?(?::\d+)? = )?"?([a-z_]+\.[\w.]+)"?(.*)')
_TYPE = re.compile(r"tensor<((?:\d+x)*)(!tt\.ptr<\w+>|\w+)>|(!tt\.ptr<\w+>)|\b([if]\d+|bf16|f8\w+)\b")


@dataclass(frozen=True)
class Type:
    """A value's shape, () of a scalar, and the name of its elements' type."""

    shape: tuple[int, ...]
    element: str

    @property
    def pointer(self) -> bool:
        """True if the elements are addresses."""
        return self.element.startswith("!tt.ptr")


@dataclass
class Operation:
    """One operation.

    Attributes:
        name: ``arith.addi``.
        result: The value's name, "" if it has none.
        second: The name of a second result (``tt.split``).
        operands: Names of values.
        text: The whole line behind the name.
        types: All types on the line, in order.
        regions: The bodies of a loop or a branch.
    """

    name: str
    result: str
    operands: list[str]
    text: str
    types: list[Type]
    second: str = ""
    regions: list[list[Operation]] = field(default_factory=list)


@dataclass(frozen=True)
class Argument:
    """A kernel's argument."""

    name: str
    type: Type
    divisor: int


@dataclass(frozen=True)
class Function:
    """A kernel."""

    name: str
    arguments: list[Argument]
    body: list[Operation]


def _types(text: str) -> list[Type]:
    types = []
    for shape, element, pointer, scalar in _TYPE.findall(text):
        extents = tuple(int(n) for n in shape.split("x") if n)
        types.append(Type(extents, element or pointer or scalar))
    return types


def _operation(line: str) -> Operation | None:
    match = _LINE.match(line)
    if match is None:
        return None
    result, second, name, text = match.groups()
    # Behind the last colon at the outside stand types.
    return Operation(name, result or "", re.findall(r"%([\w.#-]+)", text), text, _types(text), second or "")


class _Lines:
    def __init__(self, text: str) -> None:
        kept = (_LOCATION.sub("", line).strip() for line in text.splitlines())
        self.lines = [line for line in kept if line and not line.startswith(("#", "//"))]
        self.at = 0

    def take(self) -> str:
        self.at += 1
        return self.lines[self.at - 1]

    def body(self) -> tuple[list[Operation], str]:
        """Operations up to the brace that ends this region, and that line."""
        operations: list[Operation] = []
        while True:
            line = self.take()
            if line.startswith("}"):
                return operations, line
            if line.startswith("^"):
                raise NotImplementedError("control flow by blocks: a return before the end")
            operation = _operation(line)
            if operation is None:
                raise NotImplementedError(f"a line that is no operation: {line}")
            if line.endswith("({"):
                self._skip(operation)
            elif line.endswith("{"):
                end = "{"
                while end.endswith("{"):
                    region, end = self.body()
                    operation.regions.append(region)
            operations.append(operation)

    def _skip(self, operation: Operation) -> None:
        """A reduction's function: its result's type stands on its last line."""
        while not (line := self.take()).startswith("})"):
            pass
        operation.types = _types(line)


def parse(text: str) -> Function:
    """The kernel in a module's text.

    Raises:
        NotImplementedError: It has what this does not read: several blocks.
    """
    lines = _Lines(text)
    while not (line := lines.take()).startswith("tt.func"):
        pass
    name = re.findall(r"@(\w+)", line)[0]
    arguments = []
    for argument, type_text, attributes in _ARGUMENT.findall(line):
        divisor = re.findall(r"tt\.divisibility = (\d+)", attributes)
        arguments.append(Argument(argument, _types(type_text)[0], int(divisor[0]) if divisor else 1))
    return Function(name, arguments, lines.body()[0])
