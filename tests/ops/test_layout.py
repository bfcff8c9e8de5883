"""An op is always the same files, and each of them is what its name says."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch

import gptkern.ops
from gptkern.ops import _register

OPS = Path(gptkern.ops.__file__).parent
FOLDERS = sorted(
    path.parent for path in OPS.glob("*/__init__.py") if path.parent.name not in ("tables", "pack")
)
NAMES = [folder.name for folder in FOLDERS]
FILES = {"reference.py", "kernels.py", "launch.py", "op.py", "register.py", "cases.py"}
# The sampler's kernels are C++ and CUDA (csrc/sampling), and its cases are its own tests'.
WITHOUT = {"sample": {"kernels.py", "cases.py"}}
RETIRED = {"samples.py", "launcher.py", "autograd.py", "_library.py", "_native.py"}
LONGEST = 500


def _imports(path: Path) -> set[str]:
    """The modules that a file imports when it is loaded."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def test_every_op_is_here() -> None:
    assert {"flash_attention", "decode_step", "layer_norm", "linear", "sample"} <= set(NAMES)


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_the_files_of_an_op(folder: Path) -> None:
    files = {path.name for path in folder.glob("*.py")}
    assert FILES - WITHOUT.get(folder.name, set()) <= files
    assert not files & RETIRED
    lengths = {path.name: len(path.read_text().splitlines()) for path in folder.glob("*.py")}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_a_reference_imports_torch_alone(folder: Path) -> None:
    """It may be made of other ops' references, and of types; nothing in it knows a kernel."""
    for module in _imports(folder / "reference.py"):
        known = module.split(".")[0] in ("__future__", "collections", "math", "torch", "typing")
        ours = module == "gptkern.ops._types" or module.endswith((".reference", ".formats"))
        assert known or ours, f"{folder.name}/reference.py imports {module}"


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_kernels_are_device_code_alone(folder: Path) -> None:
    for path in folder.glob("kernels*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
                assert "jit" in decorators, f"{path.name}: {node.name} is not a kernel"


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_an_op_is_registered_by_the_shared_function(folder: Path) -> None:
    module = importlib.import_module(f"gptkern.ops.{folder.name}.register")
    assert "gptkern.ops._register" in _imports(folder / "register.py") or folder.name == "rms_norm"
    assert module.__doc__


def test_there_is_one_library() -> None:
    owners = [path for path in OPS.rglob("*.py") if "Library(" in path.read_text()]
    assert owners == [OPS / "_register.py"]
    assert isinstance(_register._LIBRARY, torch.library.Library)
