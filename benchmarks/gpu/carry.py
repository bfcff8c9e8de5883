"""Makes, on a machine without a GPU, everything that a session on one would otherwise compile there.

    python benchmarks/gpu/carry.py                # record launches, compile, pack, try
    python benchmarks/gpu/carry.py --recorded     # after an edit of kernels: the launches as recorded before

Triton's cache holds for the same build of Triton alone, the extension for the same Python: both are made in
an environment of their own. One archive comes out, ``build/gpu/carried.tar.xz``, which ``gpu_session.sh``
unpacks where it finds it. Then it is unpacked elsewhere, and a second process must find all launches in it.

Needs Python 3.12 with its headers, gcc and nvcc, and a network for Triton's wheel at the first time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import archive
from launches import lines
from plan import TESTS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "gpu"
LAUNCHES, CACHE = WORK / "launches", WORK / "cache"
# What machines with torch 2.11 have.
TRITON, ARCH = "3.6.0", 90
MOST_BYTES = 30 << 20
_LOADING = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gptkern._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.has_cuda
"""


def record() -> None:
    """What the kernel tests, the stages and ``generate`` launch."""
    shutil.rmtree(LAUNCHES, ignore_errors=True)
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "GPTKERN_LAUNCHES": str(LAUNCHES),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "-p", "record", "-q", "-n", str(_processors())]
    _run([sys.executable, "-m", "pytest", *options, "-m", "kernels and not slow", *TESTS], environment)
    _run([sys.executable, str(HERE / "record.py"), str(LAUNCHES)])


def environment(python: str) -> Path:
    """An interpreter with that Triton and what builds the extension, made where it is not there yet."""
    folder = WORK / "env"
    found = folder / "bin" / "python"
    if not (folder / "ready").exists():
        _run([python, "-m", "venv", "--clear", str(folder)])
        _run([str(found), "-m", "pip", "install", "-q", f"triton=={TRITON}"])
        tools = ["setuptools", "pybind11", "cmake", "ninja"]
        _run([str(found), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *tools])
        (folder / "ready").touch()
    return found


def precompile(python: Path, launches: Path, cache: Path, used: Path | None = None) -> dict[str, Any]:
    """Have all launches compiled or found in ``cache``; what the processes counted.

    Raises:
        SystemExit: A launch does not compile.
    """
    count = _processors()
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    environment.pop("PYTHONPATH", None)
    command = [str(python), str(HERE / "precompile.py"), str(launches), "--arch", str(ARCH), "--launchers"]
    processes = []
    for part in range(count):
        options = ["--part", f"{part}/{count}", *([] if used is None else ["--used", f"{used}{part}"])]
        process = subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True)
        processes.append(process)
    told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("carry: these launches do not compile")
    total: Counter[str] = Counter()
    for numbers in told:
        total.update({name: value for name, value in numbers.items() if isinstance(value, int)})
    return {"triton": told[0]["triton"], "triton_key": told[0]["triton_key"], **total}


def extension(python: Path) -> Path:
    """``gptkern._C`` for that interpreter and GPU."""
    build, lib = WORK / "extension", WORK / "lib"
    scripts = str(python.parent)
    environment = os.environ | {"GPTKERN_CUDA": "1", "GPTKERN_CUDA_ARCHS": str(ARCH)}
    environment["PATH"] = os.pathsep.join([scripts, os.environ["PATH"]])
    folders = ["--build-temp", str(build), "--build-lib", str(lib)]
    _run([str(python), "setup.py", "-q", "build_ext", *folders], environment)
    (found,) = (lib / "gptkern").glob("_C.*.so")
    _run([str(python), "-c", _LOADING, str(found)])
    return found


def tried(python: Path, made: Path, launches: Path) -> dict[str, Any]:
    """What a second process makes of the archive, unpacked elsewhere.

    Raises:
        SystemExit: It compiles or writes anything.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache, package = Path(folder) / "cache", Path(folder) / "package"
        archive.unpack(made, cache, package)
        counts = precompile(python, launches, cache)
    if counts.get("compiled") or counts.get("written"):
        raise SystemExit(f"carry: a second process does not find all in the archive: {counts}")
    return counts


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    print("$", " ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recorded", action="store_true", help="take the launches recorded before")
    parser.add_argument("--python", default="python3.12", help="the interpreter (default: %(default)s)")
    asked = parser.parse_args()
    if not asked.recorded:
        record()
    every = WORK / "launches.jsonl"
    every.write_text("".join(f"{text}\n" for text in lines(LAUNCHES.glob("*.jsonl"))))
    python = environment(asked.python)
    with tempfile.TemporaryDirectory() as folder:
        used = Path(folder) / "used"
        made = precompile(python, every, CACHE, used)
        keys = {key for file in Path(folder).iterdir() for key in json.loads(file.read_text())}
    described = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    manifest = made | {"arch": ARCH, "commit": commit}
    archive.pack(archive.ARCHIVE, CACHE, keys, extension(python), manifest)
    found = tried(python, archive.ARCHIVE, every)
    size = archive.ARCHIVE.stat().st_size
    print(f"{made}\nunpacked elsewhere: {found}")
    print(f"{size / 1e6:.1f} MB, to lie in the same place on the other machine: {archive.ARCHIVE}")
    if size > MOST_BYTES:
        raise SystemExit(f"carry: more than {MOST_BYTES >> 20} MiB")


if __name__ == "__main__":
    main()
