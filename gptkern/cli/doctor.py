"""``gptkern doctor``: which device, kernels and extension parts are in use, and why not the others."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer

import gptkern
from gptkern.cli import _options as o

# What the test suite was last run with; constraints.txt pins the same.
TESTED = {"torch": "2.13.0", "triton": "3.8.0", "tokenizers": "0.23.3", "safetensors": "0.8.0"}
TESTED_OPTIONAL = {"transformers": "5.24.0"}
TESTED_PYTHON = "3.13"
DECODE_ON_CUDA = (
    "one CUDA graph of five launches a layer; the persistent executor is off: "
    "it has not been measured to be faster"
)
Verdict = Literal["ok", "note", "fallback"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. A fallback is something slower than what this machine could do."""

    subject: str
    verdict: Verdict
    text: str


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> int:
    """Show which device, kernels and parts of the extension are in use, and why not the others.

    With `GPTKERN_STRICT=1` a fallback makes the exit code 1; other commands then refuse to run on one.
    """
    findings = examine()
    if json_:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fallback": "[red]fallback[/]"}
        for finding in findings:
            table.add_row(finding.subject, marks[finding.verdict], finding.text)
        Console(highlight=False, soft_wrap=True).print(table)
    return int(o.strict() and any(finding.verdict == "fallback" for finding in findings))


def examine() -> list[Finding]:
    """The report's lines, most important first."""
    return [*_device(), *_kernels(), *_extension(), *_executor(), *_versions()]


def _device() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if not Path("/dev/nvidiactl").exists():
            yield Finding("device", "ok", "cpu: this machine has no NVIDIA GPU")
        elif torch.version.cuda is None:
            text = f"cpu: there is an NVIDIA GPU, and torch {torch.__version__} was built without CUDA"
            yield Finding("device", "fallback", text)
        else:
            yield Finding(
                "device", "fallback", "cpu: there is an NVIDIA GPU, and CUDA cannot reach it: see nvidia-smi"
            )
        return
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        text = f"cuda:{index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}"
        if major < 8:
            yield Finding("device", "fallback", f"{text}: the kernels need sm_80 or newer")
        else:
            yield Finding("device", "ok", text)


def _kernels() -> Iterator[Finding]:
    import torch

    from gptkern.ops import _dispatch

    if _dispatch.INTERPRETED:
        yield Finding(
            "kernels", "note", "Triton's interpreter (TRITON_INTERPRET=1): for tests, and very slow"
        )
    elif torch.cuda.is_available():
        yield Finding("kernels", "ok", "Triton, compiled for the device on first use and then cached")
    else:
        yield Finding("kernels", "note", "PyTorch's CPU operators: the Triton kernels run on CUDA devices")
    yield from _packs()


def _packs() -> Iterator[Finding]:
    """The packs of machine code, each with the reason why it is not in use."""
    import torch

    from gptkern.ops.pack import loader
    from gptkern.ops.pack.file import Pack

    try:
        paths = loader.files()
    except FileNotFoundError as error:
        yield Finding("packs", "fallback", str(error))
        return
    if not paths:
        refused = o.strict() and torch.cuda.is_available()  # Triton would compile
        text = "none: kernels are compiled when first used; gptkern pack makes one"
        yield Finding("packs", "fallback" if refused else "note", text)
    for path in paths:
        try:
            pack = Pack(path)
            pack.check()
        except (OSError, ValueError) as error:
            yield Finding("pack", "fallback", str(error))
            continue
        reason = loader.reason_against(pack.made)
        if reason is None:
            held = f"{sum(pack.counts.values())} binaries of {len(pack.counts)} kernels"
            yield Finding(
                "pack", "ok", f"{path}: {held} for sm_{pack.made.arch}, by Triton {pack.made.triton}"
            )
        else:
            yield Finding("pack", "fallback", f"{path}: not in use, as {reason}")
    if paths and torch.cuda.is_available():
        yield _launched()


def _launched() -> Finding:
    """The kernels that a short generation on the GPU launches, by where their machine code comes from."""
    import torch

    from gptkern.gpt import GPT
    from gptkern.ops import _launch
    from gptkern.ops.pack import loader

    names: set[str] = set()

    def note(launch: _launch.Launch) -> bool:
        names.add(launch.name)
        return True

    try:
        loaded = loader.loader()
        if not loaded.packs:
            return Finding("kernels launched", "fallback", "no pack is in use: Triton compiles every kernel")
        loaded.compiled.clear()
        model = GPT.from_pretrained("embedded", device="cuda")
        with _launch.observe(note):
            model.generate(torch.zeros(1, 40, dtype=torch.long), max_new_tokens=4)
    # Whatever a driver, a pack or a compiler raises: that is what the report is for.
    except Exception as error:
        return Finding("kernels launched", "fallback", f"the package's model does not generate: {error}")
    return _sources(names, {name.rpartition(":")[2] for name in loaded.compiled})


def _sources(names: set[str], compiled: set[str]) -> Finding:
    text = f"generation of the package's model: {len(names - compiled)} of {len(names)} kernels from packs"
    if compiled:
        return Finding("kernels launched", "fallback", f"{text}; compiled: {', '.join(sorted(compiled))}")
    return Finding("kernels launched", "ok", f"{text}, none compiled")


def _extension() -> Iterator[Finding]:
    import torch

    from gptkern import _checkout, _native

    extension = _native.extension
    if extension is None:
        why = _checkout.warning() or f"gptkern._C cannot be loaded ({_native.load_error}): pip install ."
        yield Finding("sampler", "fallback", f"plain PyTorch: {why}")
        yield Finding("decoding on CPU", "fallback", "PyTorch's operators: gptkern._C is not loaded")
        return
    yield Finding("sampler on CPU", "ok", f"C++, {extension.cpu_path()}")
    if extension.has_decoder:
        yield Finding(
            "decoding on CPU", "ok", f"C++, {extension.decode_path()}, fp32 and bf16; int8, int4, fp8 weights"
        )
    else:
        yield Finding("decoding on CPU", "fallback", "PyTorch's operators: this processor has no AVX2")
    if torch.cuda.is_available():
        yield Finding("decoding on CUDA", "ok", DECODE_ON_CUDA)
    if extension.has_cuda:
        yield Finding("sampler on CUDA", "ok", f"CUDA C++ for {extension.cuda_archs}")
    else:
        verdict: Verdict = "fallback" if torch.cuda.is_available() else "note"
        yield Finding("sampler on CUDA", verdict, "not built: no nvcc was found when gptkern was installed")


def _executor() -> Iterator[Finding]:
    """The executor that decodes a model of floats on this machine, and the reasons against the others."""
    import torch

    from gptkern.config import GPTConfig
    from gptkern.engine.executors.choose import choose
    from gptkern.model.decoder import Decoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = GPTConfig(vocab_size=8, n_positions=8, n_layer=1, n_head=1, n_embd=8)
    model = Decoder(config).to(device)
    chosen, passed = choose(model, model.dtype)
    others = "".join(
        f"; not {other.executor.name}: {other.reason}"
        for other in passed
        if other.is_fallback or device == "cuda"
    )
    if device == "cpu":
        names = " and ".join(other.executor.name for other in passed if not other.is_fallback)
        others = f" ({names} need a CUDA device){others}"
    slower = any(other.is_fallback for other in passed)
    yield Finding("executor", "fallback" if slower else "ok", f"{chosen.name}{others}")


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    newer = _number(python)[:2] > _number(TESTED_PYTHON)
    yield Finding(
        "python", "note" if newer else "ok", f"{python}{f', newer than {TESTED_PYTHON}' if newer else ''}"
    )
    yield Finding("gptkern", "ok", gptkern.__version__)
    for name, tested in (TESTED | TESTED_OPTIONAL).items():
        try:
            found = version(name)
        except PackageNotFoundError:
            if name in TESTED:
                yield Finding(name, "fallback", "not installed")
            continue
        if _number(found) > _number(tested):
            yield Finding(name, "note", f"{found}, newer than {tested}, the newest that was tested")
        else:
            yield Finding(name, "ok", found)


def _number(text: str) -> tuple[int, ...]:
    """The release part of a version: 2.13.0+cpu gives (2, 13, 0)."""
    digits = text.partition("+")[0].split(".")
    return tuple(int(part) for part in digits if part.isdigit())
