"""The C++ and CUDA sources by themselves: sanitizers over random rows, and what nvcc makes of the kernels."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


def _compile(program: str, folder: Path, *more: str) -> Path:
    """``program``.cpp of this folder with the sampler's CPU part, under sanitizers."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    sources = [HERE / f"{program}.cpp", CSRC / "sampling" / "cpu_path.cpp", CSRC / "common" / "threads.cpp"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    flags = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command = [
        "g++",
        *flags,
        *sanitizers,
        f"-I{CSRC}",
        *map(str, sources),
        *more,
        "-o",
        str(folder / program),
    ]
    subprocess.run(command, check=True)
    return folder / program


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compile("fuzz_sampling", tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("rows", "threads"), [(1_000_000, 1), (20_000, 3)])
def test_random_rows_under_sanitizers(fuzzer: Path, rows: int, threads: int) -> None:
    done = subprocess.run([fuzzer, str(rows), str(threads)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{rows} rows" in done.stdout


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(300)
def test_a_failed_allocation_or_thread_start_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run([_compile("faults", tmp_path, "-ldl")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "survived" in done.stdout


_ISAS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
}
_ISAS["avx2_vnni"] = [*_ISAS["avx2"], "-mavxvnni"]
_ISAS["avx512_vnni"] = [*_ISAS["avx512"], "-mavx512vnni"]
_ISAS["avx512_bf16"] = [*_ISAS["avx512_vnni"], "-mavx512bf16"]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="no g++ for x86-64")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_random_models_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    checks = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    flags = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-DGPTKERN_X86"]
    command = ["g++", *flags, *checks, f"-I{CSRC}"]
    objects = []
    for name, options in _ISAS.items():
        objects.append(str(tmp_path / f"{name}.o"))
        isa = [*options, f"-DGPTKERN_ISA={name}", "-c", str(CSRC / "decode" / "cpu_path.cpp")]
        subprocess.run([*command, *isa, "-o", objects[-1]], check=True)
    binary = tmp_path / "fuzz_decode"
    sources = [HERE / "fuzz_decode.cpp", CSRC / "decode" / "decoder.cpp", CSRC / "common" / "threads.cpp"]
    subprocess.run([*command, *map(str, sources), *objects, "-pthread", "-o", str(binary)], check=True)
    done = subprocess.run([binary, "150", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "150 models" in done.stdout


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cuda_compiles_without_warnings_or_spills(arch: int, tmp_path: Path) -> None:
    defines = ["-DGPTKERN_ISA=cuda", f'-DGPTKERN_CUDA_ARCHS="{arch}"']
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v"]
    target = [
        "-gencode",
        f"arch=compute_{arch},code=sm_{arch}",
        "-cubin",
        "-o",
        str(tmp_path / "sampling.cubin"),
    ]
    command = ["nvcc", f"-I{CSRC}", *flags, *defines, *target, str(CSRC / "sampling" / "cuda_path.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert len(usage) == 5
    assert all(numbers == ("0", "0", "0") for numbers in usage), done.stderr
    # 64-bit atomics on another block's shared memory go through generic addresses: there are none.
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-sass", str(tmp_path / "sampling.cubin")]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "ATOMS." in sass
    assert not re.findall(r"ATOM\.E\.ADD\.64\S*", sass)


@pytest.fixture(scope="module")
def sanitised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension's CPU part under the address and undefined behaviour sanitizers."""
    cmake = shutil.which("cmake")
    if shutil.which("g++") is None or cmake is None or shutil.which("ninja") is None:
        pytest.skip("no g++, cmake or ninja")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("sanitised")
    options = {
        "CMAKE_CXX_COMPILER": "g++",
        "CMAKE_CXX_FLAGS": "-O1 -g1 -fno-omit-frame-pointer "
        "-fsanitize=address,undefined -fno-sanitize-recover=all",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(folder),
        "GPTKERN_MODULE_FILE": "_C.so",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "GPTKERN_CUDA": "OFF",
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    build = folder / "build"
    subprocess.run([cmake, "-S", str(CSRC), "-B", str(build), "-G", "Ninja", *defines], check=True)
    subprocess.run([cmake, "--build", str(build)], check=True)
    return folder / "_C.so"


def _library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("calls", [pytest.param(1000, marks=pytest.mark.ci), 10_000])
def test_random_calls_from_python_under_sanitizers(sanitised: Path, calls: int) -> None:
    # libstdc++ too: the sanitizer looks for what it throws exceptions with when a process starts.
    environment = os.environ | {
        "LD_PRELOAD": f"{_library('libasan.so')} {_library('libstdc++.so')}",
        # torch and Python themselves keep memory to the end.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, str(HERE / "fuzz_boundary.py"), str(calls), "0", str(sanitised)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{calls} calls" in done.stdout
