"""The archive for a GPU session: launches as lines, packing, and that Triton finds what is in it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton.language as tl

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


launches, archive = _module("launches"), _module("archive")


def _a_kernel(x_ptr, count, scale, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stands for a kernel's function."""


class _Kernel:
    fn = staticmethod(_a_kernel)


def _line(*args: object, interpreted: bool = False, **kwargs: object) -> str:
    found: str = launches.line(_Kernel, args, kwargs, interpreted=interpreted)
    return found


def test_launches_that_one_binary_serves_have_one_line() -> None:
    x = torch.zeros(64)
    first = _line(x, 32, 0.1, 64, num_warps=4, PDL=False)
    assert first == _line(torch.ones(3), 48, 7.0, 64, PDL=False, num_warps=4)
    others = [
        _line(x[1:], 32, 0.1, 64, num_warps=4, PDL=False),
        _line(x.half(), 32, 0.1, 64, num_warps=4, PDL=False),
        _line(x, 33, 0.1, 64, num_warps=4, PDL=False),
        _line(x, 1, 0.1, 64, num_warps=4, PDL=False),
        _line(x, 1 << 40, 0.1, 64, num_warps=4, PDL=False),
        _line(x, 32, None, 64, num_warps=4, PDL=False),
        _line(x, 32, 0.1, 128, num_warps=4, PDL=False),
        _line(x, 32, 0.1, 64, num_warps=8, PDL=False),
        _line(x, 32, 0.1, 64, num_warps=4, PDL=True),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_a_line_is_read_back_as_arguments_that_specialise_alike() -> None:
    x = torch.zeros(64, dtype=torch.bfloat16)
    args = (x[1:], 48, -(1 << 40), None, True)
    found = launches.read(_line(*args, CUT=(3, None, (4, 5)), WEIGHT=tl.float8e4nv, ACTIVATION="none"))
    assert (found.module, found.kernel) == (_a_kernel.__module__, "_a_kernel")
    pointer, count, long, nothing, flag = found.args
    assert pointer.dtype == "bfloat16" and pointer.data_ptr() % 16
    assert count % 16 == 0 and count < 1 << 31 and long >= 1 << 31 and long % 16 == 0
    assert nothing is None and flag is True
    assert found.kwargs == {"CUT": (3, None, (4, 5)), "WEIGHT": tl.float8e4nv, "ACTIVATION": "none"}


def test_an_interpreted_launch_stands_for_the_compiled_one() -> None:
    x = torch.zeros(64)
    found = launches.read(_line(x, interpreted=True, PDL=False)).kwargs
    assert found == {"PDL": True, "launch_pdl": True}
    found = launches.read(_line(x, interpreted=True, COMPILED=False)).kwargs
    assert found == {"COMPILED": True, "launch_cooperative_grid": True}


def test_what_a_line_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="a launch passes"):
        _line(torch.zeros(1), BLOCK=torch.zeros(1))


def test_an_archive_is_at_home_wherever_it_is_unpacked(tmp_path: Path) -> None:
    made, elsewhere, package = (tmp_path / name for name in ("made", "elsewhere", "package"))
    for key in ("USED", "UNUSED"):
        (made / key).mkdir(parents=True)
        for name in ("k.cubin", "k.json", "k.ptx"):
            (made / key / name).write_text(name)
        paths = {name: str(made / key / name) for name in ("k.cubin", "k.json", "k.ptx")}
        (made / key / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    extension = tmp_path / "_C.cpython-312-x86_64-linux-gnu.so"
    extension.write_bytes(b"machine code")
    archive.pack(tmp_path / "a.tar.xz", made, ["USED"], extension, {"triton": "3.6.0"})

    assert archive.unpack(tmp_path / "a.tar.xz", elsewhere, package) == {"triton": "3.6.0"}
    assert sorted(path.name for path in elsewhere.iterdir()) == ["USED", "manifest.json"]
    index = json.loads((elsewhere / "USED" / "__grp__k.json").read_text())
    assert index == {"child_paths": {name: str(elsewhere / "USED" / name) for name in ("k.cubin", "k.json")}}
    assert not (elsewhere / "USED" / "k.ptx").exists()
    assert (package / "gptkern" / extension.name).read_bytes() == b"machine code"


# Compiles real launches as any process with PyTorch does: of meta tensors, an unaligned one, and both kinds
# of tensor maps.
_COMPILING = """
import sys, torch
sys.path[:0] = [{folder!r}, {benchmarks!r}]
import launch_cost_kernels as kernels
from launches import line
from gptkern.ops import _aot, _cases, _launch

wanted = [_launch.Launch(kernels.empty_kernel, (1,), (torch.zeros(5)[1:],), dict(PDL=True, launch_pdl=True))]
for op, name in (("layer_norm", 0), ("decode_linear", 0), ("linear", 0), ("gated_mlp", 4)):
    case = _cases.cases(op)[name]
    wanted += _cases.record_case(case, torch.bfloat16, 90)[:1]
for launch in wanted:
    _aot.compile_launch(launch, 90)
    print(line(launch.kernel, launch.args, launch.kwargs))
"""


@pytest.mark.slow
@pytest.mark.ci
def test_a_process_without_pytorch_finds_what_real_launches_compiled(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    script = _COMPILING.format(folder=str(FOLDER), benchmarks=str(FOLDER.parent))

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    lines = tmp_path / "launches.jsonl"
    lines.write_text(run("-c", script))
    count = len(lines.read_text().splitlines())
    assert count == 5
    precompile = str(FOLDER / "precompile.py")
    used = tmp_path / "used"
    found = json.loads(run(precompile, str(lines), "--used", str(used)))
    assert (found.get("compiled"), found["found"], found.get("written")) == (None, count, None)

    extension = tmp_path / "_C.so"
    extension.touch()
    archive.pack(tmp_path / "a.tar.xz", cache, json.loads(used.read_text()), extension, {})
    archive.unpack(tmp_path / "a.tar.xz", tmp_path / "elsewhere", tmp_path / "package")
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "elsewhere")
    found = json.loads(run(precompile, str(lines)))
    assert (found.get("compiled"), found["found"], found.get("written")) == (None, count, None)
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "nothing")
    assert json.loads(run(precompile, str(lines)))["compiled"] == count
