"""The C++ and CUDA sources by themselves: sanitizers over random rows, and what nvcc makes of the kernels."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


def _compile(program: str, folder: Path, *more: str) -> Path:
    """``program``.cpp of this folder with the sampler's CPU part, under sanitizers."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    sources = [HERE / f"{program}.cpp", CSRC / "sampling_cpu.cpp", CSRC / "threads.cpp"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pthread"]
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
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-Wno-maybe-uninitialized"],
}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="no g++ for x86-64")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_random_models_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    checks = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-DGPTKERN_X86"]
    command = ["g++", *flags, *checks, f"-I{CSRC}"]
    objects = []
    for name, options in _ISAS.items():
        objects.append(str(tmp_path / f"{name}.o"))
        isa = [*options, f"-DGPTKERN_ISA={name}", "-c", str(CSRC / "decode_cpu.cpp")]
        subprocess.run([*command, *isa, "-o", objects[-1]], check=True)
    binary = tmp_path / "fuzz_decode"
    sources = [HERE / "fuzz_decode.cpp", CSRC / "decoder.cpp", CSRC / "threads.cpp"]
    subprocess.run([*command, *map(str, sources), *objects, "-pthread", "-o", str(binary)], check=True)
    done = subprocess.run([binary, "300", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 models" in done.stdout


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
    command = ["nvcc", *flags, *defines, *target, str(CSRC / "sampling_cuda.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert len(usage) == 4
    assert all(numbers == ("0", "0", "0") for numbers in usage), done.stderr
