"""The time of one token: launches, bytes, their least time on this machine, and each operator's share."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity

from gptkern.bench import ceilings
from gptkern.bench.suites._models import weight_bytes
from gptkern.durable import write_file
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.choose import Executors
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.gpt import GPT
from gptkern.ops import _launch, backend

PROFILED = 7
_WARM_PROFILED = 1
# What a CPU's time holds beside PyTorch's operators.
REST = "outside PyTorch's operators (the extension's decoder, Python)"
_WARM = 3


@dataclass(frozen=True)
class Operator:
    """One operator's or kernel's part of a token: calls, and seconds of its own."""

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class Profile:
    """The time of one token of a sequence, part by part.

    Attributes:
        context: Tokens before the first measured one.
        tokens: Tokens measured.
        prefill: Seconds of the prompt.
        per_token: Median seconds of a token, its choice (the likeliest) included, the host waiting for it.
        bytes_moved: The fewest to read for a token: all weights once, keys and values so far.
        copy: Bytes a second of this machine's copy, read plus written.
        launches: Kernel launches a token by name, as decoding makes them on a GPU.
        operators: By their own time, the slowest first; on a CPU with ``REST``, what is no operator's.
    """

    device: str
    context: int
    tokens: int
    prefill: float
    per_token: float
    bytes_moved: float
    copy: float
    launches: dict[str, int]
    operators: list[Operator]

    @property
    def floor(self) -> float:
        """The least seconds that the bytes take here."""
        return self.bytes_moved / self.copy


@torch.inference_mode()
def profile(model: GPT, ids: list[int], tokens: int, trace: Path | None = None) -> Profile:
    """Decode ``tokens`` tokens after the prompt ``ids``, greedily, one sequence.

    Args:
        trace: Where to write a Chrome trace of a few further tokens.

    Raises:
        ValueError: The prompt and the tokens do not fit into the model's context.
    """
    more = _WARM + _WARM_PROFILED + PROFILED
    needed = len(ids) + tokens + more
    if needed > model.spec.context:
        raise ValueError(
            f"profile: {len(ids)} tokens of prompt, {tokens} measured and {more} more do not fit "
            f"into the model's {model.spec.context}"
        )
    model.eval()
    cache = KVCache.for_config(
        model.config, max_seqs=1, max_len=needed, dtype=model.dtype, device=model.device
    )
    cache.allocate()
    began = time.perf_counter()
    token = model(torch.tensor([ids], device=model.device), cache=cache).logits[:, -1].argmax(-1)
    _wait(model)
    prefill = time.perf_counter() - began
    forward = Executors(model, cache, 1).decode

    def decode() -> None:
        nonlocal token
        token = forward(token).argmax(-1)
        _wait(model)

    for _ in range(_WARM):
        decode()
    times = [_seconds(decode) for _ in range(tokens)]
    operators = _operators(decode, model.device, trace)
    spec = model.spec
    kv_bytes = 2 * len(spec.layers) * spec.kv_width * model.dtype.itemsize * (len(ids) + _WARM + tokens // 2)
    return Profile(
        device=str(model.device),
        context=len(ids) + _WARM,
        tokens=tokens,
        prefill=prefill,
        per_token=median(times),
        bytes_moved=float(weight_bytes(model.config, model.dtype) + kv_bytes),
        copy=ceilings.copy_rate(model.device),
        launches=launches(model),
        operators=operators,
    )


def launches(model: GPT) -> dict[str, int]:
    """Kernel launches of one token by name, recorded on tensors without storage."""
    with torch.device("meta"):
        shape = GPT(model.config).to(torch.bfloat16)
    cache = KVCache.for_config(
        model.config, max_seqs=1, max_len=model.spec.context, dtype=torch.bfloat16, device="meta"
    )
    on_gpu = model.device.type == "cuda"
    arch = _launch.arch(model.device) if on_gpu else 90
    with backend("kernel"), _launch.record(arch) as made, torch.no_grad():
        GraphExecutor(shape, cache, 1).run(1)
    counts: dict[str, int] = {}
    for launch in made:
        counts[launch.name] = counts.get(launch.name, 0) + 1
    return counts


def _wait(model: GPT) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _seconds(decode: Callable[[], None]) -> float:
    began = time.perf_counter()
    decode()
    return time.perf_counter() - began


def _operators(decode: Callable[[], None], device: torch.device, trace: Path | None) -> list[Operator]:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    # The profiler's own beginning falls on the first token, which is left out.
    plan = torch.profiler.schedule(wait=0, warmup=_WARM_PROFILED, active=PROFILED, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=plan) as profiler:
        for _ in range(_WARM_PROFILED + PROFILED):
            with torch.profiler.record_function(REST):
                decode()
            profiler.step()
    if trace is not None:
        with tempfile.TemporaryDirectory() as folder:
            # written by a library that drops errors: whole if it reads back
            profiler.export_chrome_trace(made := str(Path(folder) / "trace.json"))
            data = Path(made).read_bytes()
        json.loads(data)
        write_file(trace, data)
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = [
        Operator(event.key, event.count / PROFILED, getattr(event, own) * 1e-6 / PROFILED)
        for event in profiler.key_averages()
    ]
    return sorted(
        (o for o in found if o.seconds > 0 and not o.name.startswith("ProfilerStep")),
        key=lambda o: -o.seconds,
    )
