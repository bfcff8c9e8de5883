"""Packs of machine code: the file, the key, the loader's choices, and launches on a stand-in driver."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import fake_driver
import pytest
import torch
import triton
from cubins import parameter_sizes
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import gptkern
from gptkern import _native, packing
from gptkern.cli import doctor
from gptkern.config import GPTConfig
from gptkern.environment import FallbackWarning
from gptkern.gpt import GPT
from gptkern.ops import _aot, _cases, _launch, layer_norm
from gptkern.ops.decode_embed import kernels
from gptkern.ops.pack import build, signature
from gptkern.ops.pack import loader as loading
from gptkern.ops.pack.bare import Pointer, bare, received, sent
from gptkern.ops.pack.file import Binary, Made, Pack, PackError, write

HERE = Path(__file__).parent
MADE = Made("0.0", "digest", "3.8.0", "12.9", 90)
BINARIES = {
    "ops.a:first": [
        Binary(b"k1", b"ELF" * 100, {"entry": "first"}),
        Binary(b"k0", b"FLE" * 9, {"entry": "x"}),
    ],
    "ops.b:second": [Binary(b"k0", b"ELF" * 100, {"entry": "first"})],
}

FACTS = {"entry": "e", "needs": "", "passed": [], "maps": [], "threads": 32, "shared": 0, "scratch": 0} | {
    "blocks_per_cluster": 1,
    "dependent": False,
    "cooperative": False,
}


def process(script: str, *args: object, **environment: str) -> str:
    """What a script prints, in a process in which kernels are compiled and not interpreted."""
    settings = os.environ | {"TRITON_INTERPRET": "0"} | environment
    command = [sys.executable, str(HERE / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack of a small model's generation on sm_90."""
    path = tmp_path_factory.mktemp("pack") / "sm90.pack"
    process("packed_make.py", path, 90)
    return path


@pytest.fixture(autouse=True)
def own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is warned anew."""
    monkeypatch.setattr("gptkern.environment._past_warnings", set())


# --- the file


def test_a_pack_gives_back_what_was_written_and_its_bytes_do_not_depend_on_the_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a.pack", tmp_path / "b.pack"
    write(first, MADE, BINARIES)
    write(second, MADE, {name: list(reversed(BINARIES[name])) for name in reversed(BINARIES)})
    assert first.read_bytes() == second.read_bytes()
    pack = Pack(first)
    assert pack.made == MADE and pack.counts == {"ops.a:first": 2, "ops.b:second": 1}
    for name, binaries in BINARIES.items():
        assert sorted(pack.read(name), key=lambda b: b.key) == sorted(binaries, key=lambda b: b.key)
    assert pack.read("ops.c:third") == []


def test_every_changed_byte_of_a_pack_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    write(path, MADE, BINARIES)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(PackError):
            pack = Pack(path)
            for name in BINARIES:
                pack.read(name)
        with pytest.raises(PackError):
            Pack(path).check()


@pytest.mark.parametrize("length", [0, 7, 40, 200, -1])
def test_a_cut_pack_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.pack"
    write(path, MADE, BINARIES)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(PackError, match=r"a\.pack is"):
        pack = Pack(path)
        for name in BINARIES:
            pack.read(name)


def test_a_header_with_other_entries_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    for header in (b"[]", b'{"kernels": {}}', b'{"made": {"future": 1}, "kernels": {}}', b"no JSON", b"\xff"):
        length = len(header).to_bytes(8, "little")
        path.write_bytes(b"gptkern pack 1\n" + hashlib.sha256(header).digest() + length + header)
        with pytest.raises(PackError, match=r"a\.pack is no pack of this version: its header has other"):
            Pack(path)


# --- the key


def key(*args: Any, **kwargs: Any) -> bytes:
    """The key of a kernel with two pointers, a size, one that is not specialised, and a constant."""

    def body(x_ptr, y_ptr, size, rows, BLOCK: tl.constexpr = 8):  # type: ignore[no-untyped-def]  # noqa: F821
        pass

    class Kernel:
        fn, do_not_specialize = body, ["rows"]

    return bytes(signature.empty(Kernel).key(args, kwargs))


BASE = torch.zeros(64)
CALL: tuple[Any, ...] = (BASE, None, 5, 5)


def test_what_changes_no_code_changes_no_key() -> None:
    same = key(*CALL, BLOCK=8, num_warps=4)
    assert key(torch.ones(3), None, 7, 1, num_warps=4, BLOCK=8) == same
    assert key(BASE, None, size=11, rows=16, num_warps=4) == same
    assert key(torch.zeros(8, device="meta"), None, 5, 5, num_warps=4) == same
    assert key(BASE.requires_grad_(False)[4:], None, 5, 5, num_warps=4) == same


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((BASE.half(), None, 5, 5), {}),
        ((BASE.int(), None, 5, 5), {}),
        ((BASE.to(torch.float8_e4m3fn), None, 5, 5), {}),
        ((BASE[1:], None, 5, 5), {}),
        ((BASE, BASE, 5, 5), {}),
        ((BASE, None, 1, 5), {}),
        ((BASE, None, 16, 5), {}),
        ((BASE, None, 1 << 31, 5), {}),
        ((BASE, None, -(1 << 31) - 1, 5), {}),
        ((BASE, None, 1 << 63, 5), {}),
        ((BASE, None, 5.0, 5), {}),
        ((BASE, None, True, 5), {}),
        ((BASE, None, 5, 1 << 40), {}),
        (CALL, {"BLOCK": 16}),
        (CALL, {"BLOCK": True}),
        (CALL, {"BLOCK": 8.0}),
        (CALL, {"BLOCK": "8"}),
        (CALL, {"BLOCK": (8,)}),
        (CALL, {"BLOCK": None}),
        (CALL, {"BLOCK": triton.language.bfloat16}),
        (CALL, {"num_warps": 8}),
        (CALL, {"num_stages": 2}),
        (CALL, {"launch_pdl": True}),
        (CALL, {"launch_cooperative_grid": True}),
    ],
)
def test_what_changes_code_changes_the_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert key(*args, **kwargs) != key(*CALL)


def test_dtypes_have_one_code_with_memory_and_without() -> None:
    for dtype in (
        torch.bool,
        torch.int16,
        torch.uint8,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.bfloat16,
    ):
        with_memory, without = torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype, device="meta")
        assert key(with_memory, None, 5, 5) == key(without, None, 5, 5)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (CALL, {"BLOKC": 4}, "body has no parameter BLOKC"),
        ((BASE,), {}, "body: missing: y_ptr"),
        ((*CALL, 8), {"BLOCK": 8}, "body: given twice: BLOCK"),
        (("x", None, 5, 5), {}, "cannot be given a str as an argument"),
        (CALL, {"BLOCK": object()}, "cannot be given a object as a compile-time value"),
    ],
)
def test_a_call_that_fits_no_kernel_is_refused(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        key(*args, **kwargs)


def test_a_call_has_its_key_whatever_is_launched_while_its_values_are_read() -> None:
    """Reading a value may run Python, and another launch of the same kernel, on this thread or another."""

    def body(x_ptr, y_ptr, size):  # type: ignore[no-untyped-def]
        pass

    class Kernel:
        fn = body

    kernel = signature.empty(Kernel)

    class Interrupting(Pointer):
        def data_ptr(self) -> int:
            assert not kernel.launch((1,), (None, 3.0, True), {}, 0, 0)
            return self.address

    plain, interrupting = (kind(torch.float32, 64) for kind in (Pointer, Interrupting))
    held = kernel.key((plain, plain, 5), {})
    assert kernel.key((interrupting, plain, 5), {}) == held
    kernel.add(held, b"no machine code", FACTS)
    with pytest.raises(RuntimeError, match=r"libcuda|cuLibraryLoadData"):  # it is found, whatever comes then
        kernel.launch((1,), (interrupting, plain, 5), {}, 0, 0)


def test_a_launch_without_its_tensors_has_the_same_key_here_and_in_another_process() -> None:
    x = torch.zeros(3 * 64 + 1)
    with gptkern.backend("kernel"), _launch.record(90) as launches:
        layer_norm(x[1:].view(3, 64), torch.ones(64), None, eps=1e-5)
    for launch in launches:
        kernel = signature.empty(launch.kernel)
        again = received(pickle.loads(pickle.dumps(sent(bare(launch)))))
        assert again.kernel is launch.kernel and again.grid == launch.grid
        assert kernel.key(again.args, again.kwargs) == kernel.key(launch.args, launch.kwargs)
    assert launches


def test_a_model_without_written_weights_launches_what_one_with_weights_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "CALLS", ((1, 7, 3), (2, 33, 3)))
    config = GPTConfig(n_layer=1, n_head=4, n_embd=128, vocab_size=64, bos_token_id=None, eos_token_id=None)
    recorded = []
    with gptkern.backend("kernel"):
        for model in (GPT(config).bfloat16().eval(), packing.unwritten(config, torch.bfloat16)):
            found = packing.model_launches(model, 90)
            recorded.append({(x.name, signature.empty(x.kernel).key(x.args, x.kwargs)) for x in found})
    assert {"decode_linear_kernel", "flash_attention_forward"} < {name for name, _ in recorded[0]}
    assert recorded[0] == recorded[1]


def test_an_architecture_without_e4m3_is_given_no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CALLS", ((1, 7, 3),))
    config = GPTConfig(n_layer=1, n_head=4, n_embd=128, vocab_size=64, bos_token_id=None, eos_token_id=None)

    def dtypes(arch: int) -> set[torch.dtype]:
        model = packing.unwritten(config, torch.bfloat16)
        found = [launch.args for launch in packing.model_launches(model, arch)]
        return {value.dtype for args in found for value in args if isinstance(value, Pointer)}

    with gptkern.backend("kernel"):
        assert torch.float8_e4m3fn in dtypes(89) and torch.float8_e4m3fn not in dtypes(80)
        with pytest.raises(ValueError, match="pack: fp8 weights need sm_89 or newer, not sm_80"):
            list(packing.model_launches(packing.unwritten(config, torch.bfloat16, "fp8"), 80))


@pytest.mark.slow
def test_calls_with_one_key_have_one_machine_code() -> None:
    """Over every launch of a small model's generation and of the norms' cases, as Triton compiles it."""
    assert process("packed_make.py", "--codes", "-", 90, "layer_norm") == "1\n"


def test_every_file_with_a_kernel_counts_among_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(signature.__file__).parents[1]
    marks = ("@triton.jit", "@gluon.jit")
    files = list(folder.rglob("*.py"))
    with_kernels = {file for file in files if any(mark in file.read_text() for mark in marks)}
    read: set[Path] = set()
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: (read.add(self), plain(self))[1])
    signature.sources.__wrapped__()
    assert {"_device.py", "kernels_hopper.py"} <= {file.name for file in with_kernels}
    assert with_kernels <= read


def test_tables_and_committed_machine_code_name_the_triton_that_is_tested_with() -> None:
    root = HERE.parent
    (pinned,) = re.findall(r"^triton==(\S+)$", (root / "constraints.txt").read_text(), re.M)
    for arch in (80, 90, 100):
        assert f" triton {pinned} " in _launch.table_file(arch).read_text().partition("[[")[0]
    assert json.loads((root / "benchmarks" / "machine_code.json").read_text())["triton"] == pinned


# --- the choice of packs


def found(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> loading.Loader:
    monkeypatch.setenv(loading.VARIABLE, os.pathsep.join(map(str, paths)))
    return loading.Loader()


def compiled(kernel: Any) -> JITFunction[Any]:
    """A kernel as it is where Triton compiles it: the tests' own process may interpret it."""
    return JITFunction(kernel.fn)


def fitting(**changed: Any) -> Made:
    return dataclasses.replace(Made("0.0", signature.sources(), triton.__version__, "12.9", 90), **changed)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"sources": "other", "gptkern": "0.1"}, r"it was made from the kernels of another gptkern \(0\.1\)"),
        ({"triton": "3.0.0"}, rf"it was made by Triton 3\.0\.0, and {triton.__version__} is installed"),
    ],
)
def test_a_pack_that_does_not_fit_is_passed_over_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict[str, str], reason: str
) -> None:
    write(tmp_path / "bad.pack", fitting(**changed), BINARIES)
    write(tmp_path / "good.pack", fitting(), BINARIES)
    with pytest.warns(FallbackWarning, match=rf"bad\.pack runs on code that Triton compiles: {reason}"):
        loader = found(monkeypatch, tmp_path)
    assert [pack.path.name for pack in loader.packs] == ["good.pack"]
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    with pytest.raises(RuntimeError, match=reason):
        found(monkeypatch, tmp_path / "bad.pack")


def test_a_damaged_pack_is_passed_over_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.pack").write_bytes(b"gptkern pack 1\n" + bytes(200))
    with pytest.warns(FallbackWarning, match="is damaged: its header does not match its checksum"):
        assert found(monkeypatch, tmp_path).packs == []


def test_doctor_says_of_each_pack_whether_it_is_in_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path / "foreign.pack", fitting(triton="3.0.0"), BINARIES)
    write(tmp_path / "good.pack", fitting(), BINARIES)
    whole = (tmp_path / "good.pack").read_bytes()
    (tmp_path / "damaged.pack").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.setenv(loading.VARIABLE, str(tmp_path))
    found = [(finding.verdict, finding.text.removeprefix(f"{tmp_path}/")) for finding in doctor._packs()]
    assert [verdict for verdict, _ in found][:3] == ["fallback", "fallback", "ok"]
    assert found[0][1] == "damaged.pack is damaged: ops.b:second does not match its checksum"
    assert found[1][1].startswith("foreign.pack: not in use, as it was made by Triton 3.0.0, and ")
    assert found[2][1] == f"good.pack: 3 binaries of 2 kernels for sm_90, by Triton {triton.__version__}"
    monkeypatch.setenv(loading.VARIABLE, str(tmp_path / "nowhere"))
    (missing,) = doctor._packs()
    assert missing.verdict == "fallback" and "there is no file or folder" in missing.text


def test_doctor_says_that_no_pack_is_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "foreign.pack", fitting(triton="3.0.0"), BINARIES)
    with pytest.warns(FallbackWarning, match=r"3\.0\.0"):
        loaded = found(monkeypatch, tmp_path)
    monkeypatch.setattr(loading, "loader", lambda: loaded)
    finding = doctor._launched()
    assert (finding.verdict, finding.text) == (
        "fallback",
        "no pack is in use: Triton compiles every kernel",
    )

    def refused() -> loading.Loader:
        raise RuntimeError("it was made by Triton 3.0.0")

    monkeypatch.setattr(loading, "loader", refused)  # under GPTKERN_STRICT=1
    assert doctor._launched().text.endswith("does not generate: it was made by Triton 3.0.0")


def test_doctor_names_the_kernels_that_were_compiled() -> None:
    text = "generation of the package's model: 2 of {} kernels from packs{}"
    assert doctor._sources({"a", "b"}, set()).text == text.format(2, ", none compiled")
    partly = doctor._sources({"a", "b", "c"}, {"c"})
    assert (partly.verdict, partly.text) == ("fallback", text.format(3, "; compiled: c"))


def test_a_place_that_is_not_there_is_an_error_and_an_empty_one_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="GPTKERN_PACK: there is no file or folder"):
        found(monkeypatch, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"GPTKERN_PACK: the folder .* holds no file \*\.pack"):
        found(monkeypatch, tmp_path)
    monkeypatch.setenv(loading.VARIABLE, "")
    assert loading.files() == []


def test_a_place_stays_where_it_is_when_the_process_goes_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path / "a.pack", fitting(), BINARIES)
    monkeypatch.chdir(tmp_path)
    (pack,) = found(monkeypatch, Path("a.pack")).packs
    monkeypatch.chdir("/")
    assert len(pack.read("ops.a:first")) == 2


def test_packs_for_other_gpus_alone_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for arch in (90, 80):
        write(tmp_path / f"sm{arch}.pack", fitting(arch=arch), BINARIES)
    loader = found(monkeypatch, tmp_path)
    kernel = compiled(kernels.decode_embed_kernel)
    assert loader.kernel(kernel, 120) is None
    reason = "the packs in use are for sm_80, sm_90, not for sm_120"
    with pytest.warns(FallbackWarning, match=f"a GPU of sm_120 .*: {reason}"):
        loader._miss(kernel)
    assert loader.compiled.total() == 1
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    with pytest.raises(
        RuntimeError, match=rf"would compile ops\.decode_embed.*:decode_embed_kernel: {reason}"
    ):
        loader._miss(kernel)


def test_of_two_packs_the_first_is_asked_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And the second has what the first lacks."""
    name = signature.name_of(kernels.decode_embed_kernel)
    held = {"first": [b"k0"], "second": [b"k0", b"k1"]}
    for file, keys in held.items():
        binaries = [Binary(key, b"ELF", {"entry": f"{file} {key!r}"}) for key in keys]
        write(tmp_path / f"{file}.pack", fitting(), {name: binaries})
    loader = found(monkeypatch, *(tmp_path / f"{file}.pack" for file in held))
    added = {}

    class Kernel:
        def add(self, key: bytes, image: bytes, facts: dict[str, Any]) -> None:
            added[key] = facts["entry"]

    monkeypatch.setattr(signature, "empty", lambda kernel: Kernel())
    loader.kernel(kernels.decode_embed_kernel, 90)
    assert added == {b"k0": "first b'k0'", b"k1": "second b'k1'"}


def test_code_serves_its_own_architecture_and_before_hopper_its_generation() -> None:
    served = {
        pack: [arch for arch in (75, 80, 86, 89, 90, 100, 103, 120) if loading.serves(pack, arch)]
        for pack in (80, 89, 90, 100)
    }
    assert served == {80: [80, 86, 89], 89: [89], 90: [90], 100: [100]}


def test_a_call_that_no_pack_holds_is_compiled_and_named_once_a_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path / "a.pack", fitting(), BINARIES)
    loader = found(monkeypatch, tmp_path)
    kernel = compiled(kernels.decode_embed_kernel)
    assert loader.kernel(kernel, 90) is not None
    with pytest.warns(FallbackWarning, match="no pack in use holds it for these types and sizes"):
        loader._miss(kernel)
    loader._miss(kernel)
    assert loader.compiled == {signature.name_of(kernel): 2}
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    with pytest.raises(RuntimeError, match="no pack in use holds it"):
        loader._miss(kernel)


def test_strict_mode_refuses_every_launch_that_triton_would_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any pack, too; the interpreter compiles nothing, and is no such launch."""
    loader = found(monkeypatch)
    assert loader.packs == []
    monkeypatch.setattr(_launch, "loader", lambda: loader)
    launched = []

    class Kernel(JITFunction):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args: launched.append((grid, args))

    kernel = Kernel(kernels.decode_embed_kernel.fn)
    _launch.launch(kernel, (1,), 7)
    assert launched == [((1,), (7,))]
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    needed = (
        r"no pack is in use \(GPTKERN_STRICT=1 .*GPTKERN_PACK, which gptkern pack .*unset GPTKERN_STRICT$"
    )
    with pytest.raises(RuntimeError, match=rf"ops\.decode_embed\.kernels:decode_embed_kernel: {needed}"):
        _launch.launch(kernel, (1,), 7)
    assert len(launched) == 1
    loader._miss(InterpretedFunction(kernels.decode_embed_kernel.fn))
    monkeypatch.setattr(_native, "extension", None)
    with pytest.raises(RuntimeError, match=r"decode_embed_kernel: gptkern\._C, which launches packs"):
        _launch.launch(kernel, (1,), 7)


def test_doctor_calls_it_a_fallback_in_strict_mode_that_a_gpu_has_no_pack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(loading.VARIABLE, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [finding.verdict for finding in doctor._packs()] == ["note"]
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    assert [finding.verdict for finding in doctor._packs()] == ["fallback"]


# --- machine code, launched by a stand-in for the driver


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the stand-in for the driver")
    return fake_driver.build(tmp_path_factory.mktemp("driver"))


def launched(library: Path, pack: Path, *args: object) -> dict[str, Any]:
    strict = {"GPTKERN_PACK": str(pack), "GPTKERN_STRICT": "1"}
    told: dict[str, Any] = json.loads(process("packed_run.py", library, *args, **strict))
    return told


def test_generate_without_triton_launches_all_from_the_pack(packed: Path, library: Path) -> None:
    told = launched(library, packed, 90)
    assert (told["wrong"], told["errors"]) == (0, [])
    assert told["mapped"]  # so that its maps were made again, and others in their place
    names = {"linear", "decode_linear_kernel", "decode_attention_kernel", "flash_attention_forward"}
    assert names <= set(told["kernels"])
    assert told["loaded"] == sum(Pack(packed).counts.values())


def test_a_driver_that_refuses_is_named_with_its_version(packed: Path, library: Path) -> None:
    told = launched(library, packed, 90)
    made_by = Pack(packed).made.ptxas
    assert told["refused"].split(" ", 1)[1] == (
        f"(sm_90, by ptxas {made_by}, for {build.driver_for(made_by, 90)}): cuLibraryLoadData: "
        "CUDA_ERROR_NO_BINARY_FOR_GPU (the driver serves CUDA 12.4)"
    )


@pytest.mark.parametrize(
    ("ptxas", "arch", "needed"),
    [
        ("12.9", 80, "NVIDIA's driver 525 (CUDA 12.0) or newer"),
        ("12.8", 90, "NVIDIA's driver 525 (CUDA 12.0) or newer"),
        ("12.9", 100, "NVIDIA's driver 570 (CUDA 12.8) or newer"),
        ("12.9", 103, "NVIDIA's driver 575 (CUDA 12.9) or newer"),
        ("13.3", 100, "NVIDIA's driver 580 (CUDA 13.0) or newer"),
        ("14.1", 90, "a driver that serves CUDA 14.0"),
    ],
)
def test_the_driver_that_code_needs(ptxas: str, arch: int, needed: str) -> None:
    assert build.driver_for(ptxas, arch) == needed


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_without_a_driver_a_launch_says_what_is_needed() -> None:
    packed_kernel = signature.empty(kernels.decode_embed_kernel)
    values = dict.fromkeys(inspect.signature(kernels.decode_embed_kernel.fn).parameters)
    packed_kernel.add(packed_kernel.key((), values), b"", FACTS)
    with pytest.raises(
        RuntimeError, match=r"libcuda\.so\.1.*need NVIDIA's driver 525 \(CUDA 12\.0\) or newer"
    ):
        packed_kernel.launch((1,), (), values, 0, 0)


def test_what_a_pack_lacks_is_an_error_without_triton(packed: Path, library: Path, tmp_path: Path) -> None:
    pack = Pack(packed)
    less = {kernel: pack.read(kernel) for kernel in pack.counts}
    (name,) = (name for name in less if name.endswith(":decode_embed_kernel"))
    less[name] = []
    write(tmp_path / "less.pack", pack.made, less)
    told = launched(library, tmp_path / "less.pack", 90)
    assert told["wrong"] == told["kernels"]["decode_embed_kernel"]
    assert set(told["errors"]) == {
        f"generate: decode_embed_kernel: gptkern: Triton would compile {name}: no pack in use holds it for "
        "these types and sizes (GPTKERN_STRICT=1 makes this an error). Name a pack that holds it in "
        "GPTKERN_PACK, which gptkern pack makes without a GPU, or unset GPTKERN_STRICT"
    }


def tensor_map(rank: int) -> list[int]:
    """The sizes of its parameters: the map, its sizes, its strides."""
    return [128, *[4] * rank, *[8] * rank]


def check_machine_code(path: Path, arch: int) -> None:
    """Every cubin of a pack: NVIDIA's tool reads it, parameters are those passed, a block fits the GPU."""
    sizes = {"pointer": [8], "i8": [1], "i32": [4], "i64": [8], "f32": [4]}
    pack = Pack(path)
    for binary in (binary for name in pack.counts for binary in pack.read(name)):
        facts = binary.facts
        ranks = iter([len(layout["box"]) for layout in facts["maps"]])
        passed = [sizes.get(form) or tensor_map(next(ranks)) for _, form in facts["passed"]]
        wanted = [*chain.from_iterable(passed), *[8] * facts["scratch"]]
        assert parameter_sizes(binary.image, facts["entry"]) == wanted
        registers, _ = _aot._resources(binary.image)
        assert _aot.blocks_per_sm(arch, facts["threads"], registers, facts["shared"]) >= 1
        assert facts["blocks_per_cluster"] <= 16


def test_the_machine_code_is_what_the_launcher_takes_it_for(packed: Path) -> None:
    check_machine_code(packed, 90)


@pytest.mark.slow
def test_a_pack_is_made_anew_bit_for_bit(packed: Path, tmp_path: Path) -> None:
    """By a compiler that finds nothing in its cache, of launches in another order; no path is in it."""
    process(
        "packed_make.py", tmp_path / "a.pack", 90, "--backwards", TRITON_CACHE_DIR=str(tmp_path / "cache")
    )
    assert (tmp_path / "a.pack").read_bytes() == packed.read_bytes()
    pack = Pack(packed)
    images = b"".join(binary.image for name in pack.counts for binary in pack.read(name))
    assert images and str(HERE.parent).encode() not in images


PARTS = (*_cases.ops(), "training", "embedded")
IN_CI = ((80, "decode_attention"), (90, "decode_embed"), (100, "rotary"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("arch", "part"),
    [
        pytest.param(arch, part, marks=[pytest.mark.ci] if (arch, part) in IN_CI else [])
        for arch in (80, 90, 100)
        for part in PARTS
    ],
)
def test_every_case_launches_from_its_pack(arch: int, part: str, library: Path, tmp_path: Path) -> None:
    process("packed_make.py", tmp_path / "all.pack", arch, part)
    check_machine_code(tmp_path / "all.pack", arch)
    told = launched(library, tmp_path / "all.pack", arch, part)
    assert (told["wrong"], told["errors"]) == (0, [])
