"""Stages that are commands of their own: the kernel tests, sanitizers, the soak, tuning, the drop-in."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from plan import TESTS
from stages import Row, Scope, tiny

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# The packs that were made for the session.
PACKS = ROOT / "build" / "gpu" / "packs"
# Tokens that the drop-in's stage gives, and asks for.
PROMPT, NEW = 32, 128
# The ops whose launch rows are tuned, in this order; those of the first take all of the time, if not more.
TUNED = ("decode_linear", "decode_attention", "layer_norm")


def tests(scope: Scope) -> Iterator[Row]:
    """The kernel tests, compiled, eight processes on one card."""
    files = TESTS[:1] if scope.dry else list(TESTS)
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not scope.dry else ["-p", "no:xdist"]
    # Without the options of pyproject.toml: they ask for plugins that may not be there.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-q",
        *workers,
    ]
    command += ["-m", "kernels and not slow", *files]
    if scope.dry:
        command += ["-k", "test_bad_arguments"]
    done = _run(command, scope)
    print(done.stdout)
    for name in re.findall(r"^(?:FAILED|ERROR) (\S+.*)$", done.stdout, re.M):
        yield Row(name[:150], ok=False)
    last = done.stdout.strip().splitlines()[-1:] or ["no output"]
    yield Row("pytest", ok=done.returncode == 0, note=last[0].strip("= "))


def first_token(scope: Scope) -> Iterator[Row]:
    """From a process's start to its first token: with a pack and no Triton, and compiled by Triton anew."""
    device = scope.device.type
    packs = os.environ.get("GPTKERN_PACK", str(PACKS) if PACKS.is_dir() else "")
    with tempfile.TemporaryDirectory() as cache:
        ways = {
            "a pack, Triton hidden": (["--no-triton"], {"GPTKERN_PACK": packs, "GPTKERN_STRICT": "1"}),
            "Triton, nothing in its cache": ([], {"GPTKERN_PACK": "", "TRITON_CACHE_DIR": cache}),
        }
        texts = []
        for name, (flags, environment) in ways.items():
            if not packs and flags and not scope.dry:
                yield Row(f"first token, {name}", note=f"there is no pack in {PACKS}: see docs/gpu.md")
                continue
            script = [sys.executable, str(HERE / "first_token.py"), str(time.monotonic()), device, *flags]
            done = _run(script, scope, TRITON_INTERPRET="0", **environment)
            lines = done.stdout.strip().splitlines() or [""]
            if done.returncode:
                print(done.stdout)
                yield Row(f"first token, {name}", ok=False, note=lines[-1])
                continue
            found = json.loads(lines[-1])
            texts.append(found["text"])
            note = f"compiled: {', '.join(found['compiled']) or 'none'}" if flags else ""
            yield Row(f"first token, {name}", value=found["seconds"], unit="s", note=note)
        if len(texts) == len(ways):
            same = texts[0] == texts[1]
            yield Row("the pack's text is Triton's", ok=same, note="" if same else str(texts))


def soak(scope: Scope) -> Iterator[Row]:
    """5,000 persistent steps, every tenth cycle compared with separate launches."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import soak_persistent

    from gptkern.bench.suites import _models as models

    config, steps, dtype = soak_persistent.CONFIG, 5000, torch.bfloat16
    if scope.dry:
        config, steps, dtype = tiny(models.GPT2), 2, torch.float32
    for batch in (1, 8)[: 1 if scope.dry else None]:
        began = time.monotonic()
        compared = soak_persistent.soak(config, scope.device, dtype, batch=batch, steps=steps)
        seconds = time.monotonic() - began
        yield Row(
            f"{steps} persistent steps of {batch}",
            ok=True,
            note=f"{compared} cycles compared, {seconds:.0f} s",
        )


def sanitizers(scope: Scope) -> Iterator[Row]:
    """compute-sanitizer over one small script: every way in which programs of a launch work together."""
    script = [sys.executable, str(HERE / "sanitized.py")]
    if scope.dry:
        done = _run(script, scope)
        yield Row("the script alone", ok=done.returncode == 0, note=done.stdout[-200:])
        return
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield Row("compute-sanitizer", note="not on PATH")
        return
    for kind in ("memcheck", "racecheck", "synccheck"):
        done = _run([tool, "--tool", kind, "--error-exitcode", "9", *script], scope)
        print(done.stdout)
        told = [
            line
            for line in done.stdout.splitlines()
            if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line
        ]
        yield Row(kind, ok=done.returncode == 0, note=(told or done.stdout.strip().splitlines() or [""])[-1])
        if scope.late:
            return


def tune(scope: Scope) -> Iterator[Row]:
    """The decode kernels' launch rows against their neighbours, until time is up."""
    from gptkern.bench import tune as tuning
    from gptkern.ops import _launch

    if scope.dry:
        found = tuning.places(TUNED[:1], 90)
        yield Row("rows that would be tuned", note=str(len(found)))
        return
    arch = _launch.arch(scope.device)
    for place in tuning.places(TUNED, arch):
        if scope.late:
            return
        row, ratio = tuning.tuned(place, scope.device)
        changed = {name: value for name, value in row.items() if place.row.get(name) != value}
        yield Row(place.name, value=ratio, unit="x the time", note=str(changed or "as it was"))


def drop_in(scope: Scope) -> Iterator[Row]:
    """``generate`` of transformers' GPT-2 124M in bf16, before and after ``gptkern.accelerate``."""
    if importlib.util.find_spec("transformers") is None:
        yield Row("transformers", note="not installed")
        return
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64} if scope.dry else {}
    dtype = torch.float32 if scope.dry else torch.bfloat16
    models = drop_in_models(scope.device, dtype, **sizes)
    seq, new = (4, 2) if scope.dry else (PROMPT, NEW)
    for batch in (1,) if scope.dry else (1, 8):
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(1 if scope.dry else 4):
            for name, model in models.items():
                began = time.perf_counter()
                continued(model, batch, seq, new)
                if scope.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - began)
        best = {name: min(times) for name, times in seconds.items()}
        for name, least in best.items():
            rate = batch * new / least
            yield Row(
                f"generate, batch {batch}, {name}", value=rate, unit="tokens/s", note=f"{least * 1e3:.0f} ms"
            )


def drop_in_models(device: torch.device, dtype: torch.dtype, **sizes: int) -> dict[str, Any]:
    """GPT-2 124M with random weights as transformers', and a copy that is accelerated."""
    import copy

    import transformers

    import gptkern

    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, eos_token_id=None, bos_token_id=None)
    library = transformers.GPT2LMHeadModel(config).eval().to(device, dtype)
    return {"transformers": library, "gptkern": gptkern.accelerate(copy.deepcopy(library))}


def continued(model: Any, batch: int, seq: int, new: int) -> None:
    """``new`` tokens after random prompts of ``seq``."""
    ids = torch.randint(model.config.vocab_size, (batch, seq), device=model.device)
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)


def profile(scope: Scope) -> Iterator[Row]:
    """Where a decode step's time goes, kernel by kernel."""
    from gptkern import backend
    from gptkern.bench.profile import profile as measure
    from gptkern.gpt import GPT

    with backend("reference" if scope.dry else "auto"):
        model = GPT.from_pretrained(device=scope.device, dtype=torch.float32 if scope.dry else torch.bfloat16)
        assert model.tokenizer is not None
        found = measure(model, model.tokenizer.encode("ROMEO:"), 2 if scope.dry else 32, None)
    for operator in found.operators[:12]:
        yield Row(
            operator.name[:52],
            value=operator.seconds * 1e6,
            unit="us",
            note=f"{operator.calls:g} calls a token",
        )


def _run(command: Sequence[str], scope: Scope, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command with the stage's own limit; its output, both streams together."""
    limit = None if scope.deadline == float("inf") else max(1.0, scope.deadline - time.monotonic())
    with tempfile.TemporaryFile("w+") as out:
        try:
            code = subprocess.run(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                timeout=limit,
                check=False,
                env=os.environ | environment,
            )
            returned = code.returncode
        except subprocess.TimeoutExpired:
            returned = 124
        out.seek(0)
        return subprocess.CompletedProcess(list(command), returned, out.read())
