"""PTX text as a list of instructions.

Source: "Parallel Thread Execution ISA", chapters "Syntax" and "Instruction Operands", NVIDIA, version 8.8.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

WIDTHS = {"pred": 0, "b8": 1, "b16": 2, "b32": 4, "b64": 8}
_SIZES = {kind + str(8 * size): size for kind in "bsuf" for size in (1, 2, 4, 8)}
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*(.*?)\{", re.DOTALL)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\S*\s+(?:\.\w+\s+)*?(?:\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
_LABEL = re.compile(r"([$\w.]+):(?!:)\s*")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;")
_THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+([\d\s,]+)")
_CLUSTER = re.compile(r"\.reqnctapercluster\s+([\d\s,]+)")


@dataclass(frozen=True)
class Parameter:
    """One parameter of an entry: its name, its place in parameter memory and its size, in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: The name with its modifiers, ``ld.global.v4.b32``.
        operands: As text; a list ``{a, b}`` and an address ``[a + 4]`` are one operand.
        predicate: The register that switches it, or None; ``negated`` if by being false.
        source: File and line, as far as the compiler wrote them.
    """

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    source: str

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


@dataclass
class Program:
    """One entry of a module.

    Attributes:
        registers: Bytes of a register by the prefix of its name; 0 for a predicate.
        shared: Offset in shared memory by the name of a variable.
        labels: Position among the instructions by name.
        targets: Labels of a ``brx.idx`` by the name of their list.
        static_bytes: Shared memory that the module itself asks for.
        threads: Threads of a block that the entry requires, or the most it allows; 0 where it says nothing.
        cluster: Blocks of a cluster along x, y, z.
    """

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    static_bytes: int = 0
    threads: int = 0
    cluster: tuple[int, int, int] = (1, 1, 1)

    def width(self, register: str) -> int:
        """Bytes of a register, 0 for a predicate."""
        if register in self.registers:
            return self.registers[register]
        return self.registers[register.rstrip("0123456789")]


def _parameters(text: str) -> list[Parameter]:
    found, offset = [], 0
    for align, kind, name, count in _PARAMETER.findall(text):
        size = int(count) if count else _SIZES[kind]
        step = int(align) if align else size
        offset = -(-offset // step) * step
        found.append(Parameter(name, offset, size))
        offset += size
    return found


def split(text: str) -> tuple[str, ...]:
    """Operands, at the commas outside of brackets."""
    parts, depth, begin = [], 0, 0
    for at, letter in enumerate(text):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    parts.append(text[begin:].strip())
    return tuple(part for part in parts if part)


def _statements(body: str) -> list[str]:
    """The body without comments, cut into statements, labels and scope braces."""
    body = re.sub(r"//[^\n]*", "", body)
    found: list[str] = []
    open_statement = ""
    for line in body.splitlines():
        text = f"{open_statement} {line.strip()}".strip()
        open_statement = ""
        while text:
            if text[0] in "{}":
                found.append(text[0])
                text = text[1:].strip()
            elif label := _LABEL.match(text):
                found.append(label.group(0).strip())
                text = text[label.end() :]
            elif text.startswith(".loc") or text.startswith(".pragma"):
                found.append(text.rstrip(";"))
                text = ""
            elif ";" in text:
                statement, _, text = text.partition(";")
                found.append(statement.strip())
                text = text.strip()
            else:
                open_statement, text = text, ""
    return found


class _Reader:
    """Reads an entry's statements. A scope's own registers and labels get names of their own."""

    def __init__(self, program: Program, files: dict[str, str]) -> None:
        self.program, self._files = program, files
        self._scopes: list[dict[str, str]] = [{}]
        self._count = 0
        self._source = ""

    def read(self, statement: str) -> None:
        if statement == "{":
            self._count += 1
            self._scopes.append({})
        elif statement == "}":
            self._scopes.pop()
        elif statement.endswith(":"):
            self.program.labels[self._renamed(statement[:-1], declare=True)] = len(self.program.instructions)
        elif statement.startswith(".branchtargets"):
            # Its label was read as one of an instruction.
            name = list(self.program.labels)[-1]
            self.program.targets[name] = split(statement.removeprefix(".branchtargets"))
        elif location := _LOCATION.match(statement):
            file, line, _ = location.groups()
            self._source = f"{self._files.get(file, file)}:{line}"
        elif declared := _REGISTERS.match(statement):
            self._declare(declared.group(1), declared.group(2))
        elif statement and not statement.startswith("."):
            self.program.instructions.append(self._instruction(statement))

    def _declare(self, kind: str, names: str) -> None:
        width = WIDTHS.get(kind, _SIZES.get(kind, 4))
        for name in names.split(","):
            plain = name.strip()
            prefix, _, count = plain.partition("<")
            if count and len(self._scopes) > 1:
                for number in range(int(count.rstrip(">"))):
                    self.program.registers[self._renamed(f"{prefix}{number}", declare=True)] = width
            elif count:
                self.program.registers[prefix] = width
            else:
                self.program.registers[self._renamed(plain, declare=True)] = width

    def _renamed(self, name: str, declare: bool = False) -> str:
        if declare and len(self._scopes) > 1:
            self._scopes[-1][name] = f"{name}.{self._count}."
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return name

    def _instruction(self, statement: str) -> Instruction:
        predicate, negated = None, False
        if statement.startswith("@"):
            guard, statement = statement.split(None, 1)
            negated = guard.startswith("@!")
            predicate = self._renamed(guard.lstrip("@!"))
        opcode, _, rest = statement.partition(" ") if " " in statement else statement.partition("\t")
        opcode, _, more = opcode.partition("\t")
        operands = split(re.sub(r"[$%\w.]+", lambda name: self._renamed(name.group(0)), f"{more} {rest}"))
        return Instruction(opcode.strip(), operands, predicate, negated, self._source)


def _end_of_body(ptx: str, begin: int) -> int:
    """The place of the brace that closes the one before ``begin``."""
    depth = 1
    for brace in re.finditer(r"[{}]|//[^\n]*", ptx[begin:]):
        depth += {"{": 1, "}": -1}.get(brace.group(0), 0)
        if depth == 0:
            return begin + brace.start()
    raise ValueError("the entry's body has no end")


def parse(ptx: str, name: str = "") -> Program:
    """The module's entry whose name has ``name`` in it.

    Raises:
        ValueError: There is none, or more than one.
    """
    entries = [entry for entry in _ENTRY.finditer(ptx) if name in entry.group(1)]
    if len(entries) != 1:
        raise ValueError(f"the module has {len(entries)} entries {name!r}; one is needed")
    (entry,) = entries
    program = Program(entry.group(1), _parameters(entry.group(2)))
    if threads := _THREADS.search(entry.group(3)):
        program.threads = math.prod(_numbers(threads.group(1)))
    if cluster := _CLUSTER.search(entry.group(3)):
        x, y, z, *_ = *_numbers(cluster.group(1)), 1, 1
        program.cluster = (x, y, z)
    end = _end_of_body(ptx, entry.end())
    for declared in _SHARED.finditer(ptx):
        if entry.end() <= declared.start() < end or not _within_entry(ptx, declared.start()):
            _place_shared(program, *declared.groups())
    files = {number: name.rsplit("/", 1)[-1] for number, name in _FILE.findall(ptx)}
    reader = _Reader(program, files)
    for statement in _statements(ptx[entry.end() : end]):
        reader.read(statement)
    return program


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _within_entry(ptx: str, place: int) -> bool:
    """True for a place within some entry's body."""
    before = list(_ENTRY.finditer(ptx, 0, place))
    return bool(before) and place < _end_of_body(ptx, before[-1].end())


def _place_shared(program: Program, align: str | None, kind: str, name: str, count: str | None) -> None:
    """Give a variable its place in shared memory; one without a length begins where dynamic memory does."""
    size = _SIZES[kind]
    step = int(align) if align else size
    program.static_bytes = -(-program.static_bytes // step) * step
    program.shared[name] = program.static_bytes
    program.static_bytes += size * (1 if count is None else int(count or 0))
