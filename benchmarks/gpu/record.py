"""What the kernel tests, the sessions' stages and ``generate`` would launch on a GPU, without one.

    python benchmarks/gpu/record.py OUT      # OUT/*.jsonl, one different launch a line

Tests and checks run interpreted. Stages at the sizes of real models, which an interpreter would take hours
for, launch nothing: they run on meta tensors, or on a CPU where a launch leaves its small results zero.
``pytest -p record`` with ``GPTKERN_LAUNCHES=OUT`` records whatever tests it runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402
from launches import line  # noqa: E402

from gptkern import backend  # noqa: E402
from gptkern.ops import _launch  # noqa: E402

if TYPE_CHECKING:
    import pytest

ARCH = 90
# Stages on meta tensors, and on the CPU without results.
ON_META = ("decode_times", "attention_times", "other_times", "backward_times")
WITHOUT_RESULTS = ("steps", "generation", "step_times", "profile")
# Tensors of these dtypes and up to this size are made zero where a launch did not compute them: numbers, and
# slots of the cache, that whoever reads them next can live with.
_ZEROED, _ZEROED_DTYPES = 1 << 23, (torch.float32, torch.float16, torch.bfloat16, torch.int64)

Seen = dict[str, None]


def noted(seen: Seen, launch: _launch.Launch, *, interpreted: bool) -> None:
    """Keep the launch's line."""
    seen.setdefault(line(launch.kernel, launch.args, launch.kwargs, interpreted=interpreted))


@contextmanager
def watched(seen: Seen, *, execute: bool) -> Iterator[None]:
    """Lines of the interpreted launches inside, which take place or not."""

    def observer(launch: _launch.Launch) -> bool:
        noted(seen, launch, interpreted=True)
        if not execute:
            tensors = [value for value in launch.args if isinstance(value, torch.Tensor)]
            for tensor in tensors:
                if tensor.dtype in _ZEROED_DTYPES and tensor.numel() <= _ZEROED:
                    tensor.detach().zero_()
        return execute

    with _launch.observe(observer):
        yield


def _stage(name: str, device: str) -> None:
    """Run a session's stage for what it launches; whether it finds results right is not asked."""
    from plan import STAGES
    from stages import Scope

    module, function = STAGES[name][0].split(":")
    for row in getattr(importlib.import_module(module), function)(Scope(torch.device(device), dry=False)):
        print(f"    {row.name}: {row.note}", file=sys.stderr)


def on_meta(seen: Seen) -> None:
    """Stages of single ops at real sizes."""
    for name in ON_META:
        with _launch.record(ARCH) as launches:
            _stage(name, "meta")
        for launch in launches:
            noted(seen, launch, interpreted=False)


def without_results(seen: Seen) -> None:
    """Stages that need numbers on the host: steps, generation, what the sanitizers see, transformers."""
    import commands
    import sanitized
    import soak_persistent

    cpu = torch.device("cpu")
    with backend("kernel"), watched(seen, execute=False), torch.no_grad():
        for name in WITHOUT_RESULTS:
            _stage(name, "cpu")
        sanitized.steps(dry=False)
        for batch in (1, 8):
            soak_persistent.soak(soak_persistent.CONFIG, cpu, torch.bfloat16, batch=batch, steps=2)
        ours = commands.drop_in_models(cpu, torch.bfloat16)["gptkern"]
        for batch in (1, 8):
            commands.continued(ours, batch, commands.PROMPT, commands.NEW)


def executed(seen: Seen) -> None:
    """Every op's small calls, values and gradients."""
    with watched(seen, execute=True):
        _stage("ops", "cpu")


def generation(seen: Seen) -> None:
    """``generate`` on GPT-2 124M's shapes: short and long prompts, one and eight, sampled and greedy."""
    from gptkern.bench.suites import _models as models

    model = models.ours(models.GPT2, torch.bfloat16, torch.device("cpu"))
    with backend("kernel"), watched(seen, execute=False):
        for batch in (1, 8):
            for prompt in (8, 100, 960):
                ids = torch.randint(models.GPT2.vocab_size, (batch, prompt))
                for options in ({}, {"do_sample": True, "top_k": 50, "top_p": 0.9, "seed": 0}):
                    model.generate(ids, max_new_tokens=20, eos_token_id=None, **options)  # type: ignore[arg-type]


def launch_costs(seen: Seen) -> None:
    """The kernels of ``bench_launch_costs``, whose stage needs a GPU."""
    import launch_cost_kernels as kernels

    counters, x = torch.zeros(64, dtype=torch.int32), torch.zeros(1)
    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        *((kernels.barriers_kernel, (counters, n), {"launch_cooperative_grid": True}) for n in (1, 101)),
        (kernels.empty_kernel, (x,), {"PDL": False}),
        (kernels.empty_kernel, (x,), {"PDL": True, "launch_pdl": True}),
    ]
    for kernel, args, options in launched:
        launch = _launch.Launch(kernel, (1,), args, {"num_warps": 4, **options})
        noted(seen, launch, interpreted=False)


def tuning(seen: Seen) -> None:
    """The rows that are tuned first and their neighbours: where a row stays, that is all the search tries."""
    import commands

    from gptkern.bench import tune
    from gptkern.ops import _cases

    for place in tune.places(commands.TUNED[:1], ARCH):
        for row in (place.row, *tune.neighbours(place.row)):
            with _launch.replaced_row(ARCH, place.kernel, place.index, row):
                for typed in place.cases:
                    # What a size refuses is no candidate there either.
                    with suppress(ValueError):
                        for launch in _cases.record_case(typed.case, typed.dtype, ARCH):
                            noted(seen, launch, interpreted=False)


SOURCES: tuple[Callable[[Seen], None], ...] = (
    *(launch_costs, on_meta, without_results, generation, executed),
    tuning,
)


def main() -> None:
    """The command."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[2:]
    for source in SOURCES:
        if wanted and source.__name__ not in wanted:
            continue
        seen: Seen = {}
        source(seen)
        if not seen:
            raise SystemExit(f"{source.__name__}: no kernel was launched")
        (out / f"{source.__name__}.jsonl").write_text("".join(f"{text}\n" for text in seen))
        print(f"{source.__name__}: {len(seen)} different launches", flush=True)


_of_tests: Seen = {}
_watching = ExitStack()


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Watch from the first test on; tests that watch launches themselves see theirs."""
    if _launch._observer is None:
        _watching.enter_context(watched(_of_tests, execute=True))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Write what was seen by this process."""
    if _of_tests:
        out = Path(os.environ["GPTKERN_LAUNCHES"])
        out.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{found}\n" for found in _of_tests)
        (out / f"tests_{os.getpid()}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
