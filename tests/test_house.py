"""Who may import whom, one way only: ops, the model, the engine, its fronts, the facade, all that uses it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gptkern

ROOT = Path(gptkern.__file__).parent
# Each may import those before it and its own; what is named nowhere stands below all of them.
FLOORS = (
    ("ops",),
    ("as_built", "model", "quantize"),
    ("engine",),
    ("generate",),
    ("gpt",),
    ("bench", "cli", "drop_in", "eval", "packing", "serve", "train", "transformers"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# What a function imports when it is called, because an extra may be missing.
LATE = {("gptkern.gpt", "gptkern.transformers.swap")}
MODULES = {
    ".".join(("gptkern", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if "assets" not in path.parts
}


def floor(module: str) -> int:
    parts = module.split(".")
    return FLOOR_OF.get(parts[1], -1) if len(parts) > 1 else len(FLOORS)


def imported(nodes: list[ast.stmt], deep: bool) -> Iterator[str]:
    """Modules of gptkern that statements import; those for type checkers alone are left out."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gptkern"):
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif deep or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from imported(getattr(node, field, []), deep)
            for handler in getattr(node, "handlers", []):
                yield from imported(handler.body, deep)


def graph(deep: bool) -> dict[str, set[str]]:
    return {
        module: set(imported(ast.parse(path.read_text()).body, deep)) - {module}
        for module, path in MODULES.items()
    }


def test_nobody_imports_upwards() -> None:
    upwards = {
        (module, other)
        for module, others in graph(deep=True).items()
        if 0 <= floor(module) < len(FLOORS)
        for other in others
        if floor(other) > floor(module) and not (other == "gptkern" and floor(module) == len(FLOORS) - 1)
    }
    assert upwards == LATE


@pytest.mark.parametrize("name", ["config", "tokenizer", "checkpoint", "environment", "sampler_columns"])
def test_what_stands_below_imports_none_of_them(name: str) -> None:
    own = [module for module in MODULES if module.split(".")[1:2] == [name]]
    assert own
    arrows = graph(deep=False)
    seen = set(own)
    waiting = list(own)
    while waiting:
        for other in arrows[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    assert [module for module in seen if floor(module) >= 2] == []


def test_there_are_no_circles() -> None:
    # A package's own file may give names of its modules, which do not look back at it.
    TopologicalSorter(graph(deep=False)).prepare()


def test_nothing_imports_the_command_line() -> None:
    outside = {
        module
        for module, others in graph(deep=True).items()
        if not module.startswith("gptkern.cli") and any(o.startswith("gptkern.cli") for o in others)
    }
    assert outside == {"gptkern.__main__"}
