"""Is it right? The sampler bit by bit, every op against float64, the steps against each other, generate."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from compilations import counting, triton_key
from stages import Row, Scope, guarded, tiny

from gptkern import backend
from gptkern.bench.suites import _models as models
from gptkern.bench.suites.decode_step import filled
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.persistent import PersistentExecutor
from gptkern.gpt import GPT
from gptkern.ops import _cases
from gptkern.ops.decode_step import MOST_ROWS
from gptkern.ops.sample import SamplerState, SamplingParams, sample, sampling_probs
from gptkern.testing import DTYPES, check_values

FILTERS: list[dict[str, float]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 1.0, "typical_p": 0.9},
    {"temperature": 1.0, "epsilon_cutoff": 3e-4},
    {"temperature": 1.0, "eta_cutoff": 3e-4},
    {"temperature": 0.7, "top_k": 20, "n_logprobs": 5},
]
# One row takes a cluster of eight blocks; 17, 33 and 65 rows take four, two and one.
BATCHES = (1, 17, 33, 65)


def cache(scope: Scope) -> Iterator[Row]:
    """Whether kernels come from Triton's cache as they were carried here, or have to be compiled."""
    manifest = Path(triton.knobs.cache.dir) / "manifest.json"
    carried = json.loads(manifest.read_text()) if manifest.exists() else None
    counted: Counter[str] = Counter()
    with counting(counted):
        for op in ("layer_norm", "linear"):
            case = _cases.checks(op)[0]
            check_values(case.op, case.make(scope.device, torch.bfloat16), what=case.name)
    found = f"{counted['found']} kernels found, {counted['compiled']} compiled"
    if carried is None:
        yield Row("Triton's cache", note=f"{found}; nothing was carried here")
        return
    alike = "made by this Triton" if carried["triton_key"] == triton_key() else "made by another Triton"
    yield Row("Triton's cache", note=f"{found}; carried from {carried['commit']}, {alike}")
    yield Row("carried kernels are found", ok=not counted["compiled"], note=found)


def sampler(scope: Scope) -> Iterator[Row]:
    """The CUDA sampler gives the CPU's bits: probabilities, tokens, statuses, counters, log-probabilities."""
    vocabularies = (67,) if scope.dry else (50257, 128256)
    dtypes = (torch.float32,) if scope.dry else (torch.float32, torch.bfloat16, torch.float16)
    for vocab, batch, dtype in itertools.product(vocabularies, BATCHES, dtypes):
        different = sampler_differences(batch, vocab, dtype, scope.device)
        name = f"sampler {batch} x {vocab}, {str(dtype).removeprefix('torch.')}"
        yield Row(name, ok=not different, note=", ".join(map(str, different)))
        if scope.late:
            return


def sampler_differences(
    batch: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> list[dict[str, float]]:
    """The settings under which two calls on ``device`` give other bits than on the CPU."""
    logits = (3 * torch.randn(batch, vocab)).to(dtype)
    return [
        settings
        for settings in FILTERS
        if not _same(_drawn(logits, settings, "cpu"), _drawn(logits, settings, device))
    ]


def _drawn(logits: torch.Tensor, settings: dict[str, float], where: torch.device | str) -> list[torch.Tensor]:
    batch, vocab = logits.shape
    params = SamplingParams.make(batch, vocab, device=where, **settings)  # type: ignore[arg-type]
    state = SamplerState.make(batch, vocab, seed=7, device=where)
    found = [sampling_probs(logits.to(where), params, state=state)]
    for _ in range(2):
        drawn = sample(logits.to(where), params, state=state)
        found += [drawn.tokens, drawn.status]
        if drawn.top_logprobs is not None:
            found += list(drawn.top_logprobs)
    return [tensor.cpu() for tensor in (*found, state.counters)]


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def ops(scope: Scope) -> Iterator[Row]:
    """Every op's small calls, values and gradients, in every dtype against float64."""
    for op in _cases.ops()[: 2 if scope.dry else None]:
        for case in _cases.checks(op)[: 1 if scope.dry else None]:
            for dtype in DTYPES[: 1 if scope.dry else None]:
                name = f"{op}: {case.name}, {str(dtype).removeprefix('torch.')}"

                def checked(case: _cases.Case = case, dtype: torch.dtype = dtype, name: str = name) -> Row:
                    check_values(case.op, case.make(scope.device, dtype), what=case.name)
                    return Row(name, ok=True)

                yield guarded(name, checked)
                if scope.late:
                    return


def steps(scope: Scope) -> Iterator[Row]:
    """The step of one graph against the model, the persistent step against the graph's bits."""
    config = tiny(models.GPT2) if scope.dry else models.GPT2.replace(n_layer=3, n_positions=2048)
    dtype = torch.float32 if scope.dry else torch.bfloat16
    shapes = [(2, 5)] if scope.dry else [(1, 5), (1, 1024), (3, 200), (8, 1000), (17, 130), (64, 64)]
    model = models.ours(config, dtype, scope.device)
    for batch, context in shapes:
        name = f"step of {batch} at {context}"

        def checked(batch: int = batch, context: int = context, name: str = name) -> Row:
            caches = [filled(config, batch, context, dtype, scope.device) for _ in range(3)]
            graph = GraphExecutor(model, caches[0])
            persistent = PersistentExecutor(model, caches[1]) if batch <= MOST_ROWS else None
            worst, same = 0.0, True
            with torch.inference_mode():
                for _ in range(2 if scope.dry else 5):
                    tokens = torch.randint(config.vocab_size, (batch,), device=scope.device)
                    found = graph(tokens)
                    expected = model(tokens[:, None], cache=caches[2]).logits[:, 0]
                    difference = (found.double() - expected.double()).norm() / expected.double().norm()
                    worst = max(worst, difference.item())
                    same &= persistent is None or torch.equal(persistent(tokens), found)
            note = "" if same else "the persistent step's bits differ"
            return Row(name, ok=worst < 2e-2 and same, value=worst, unit="of the model's norm", note=note)

        yield guarded(name, checked)


def generation(scope: Scope) -> Iterator[Row]:
    """``generate`` in fp32 makes the CPU's tokens, sampled and greedy."""
    texts = {}
    # Interpreted, the kernels would take minutes.
    with backend("reference" if scope.dry else "auto"):
        for where in ("cpu", str(scope.device)):
            texts[where] = _generated(where, 8 if scope.dry else 64)
    for index, name in enumerate(("sampled", "greedy")):
        first, second = (texts[where][index] for where in ("cpu", str(scope.device)))
        yield Row(f"generate, {name}, fp32: the CPU's tokens", ok=torch.equal(first, second.cpu()))


def _generated(where: str, new: int) -> list[torch.Tensor]:
    model = GPT.from_pretrained(dtype=torch.float32, device=where)
    assert model.tokenizer is not None
    ids = torch.tensor([model.tokenizer.encode("ROMEO:")], device=where)
    sampled = model.generate(ids, max_new_tokens=new, do_sample=True, seed=3, top_k=40)
    greedy = model.generate(ids, max_new_tokens=new)
    assert isinstance(sampled, torch.Tensor) and isinstance(greedy, torch.Tensor)
    return [sampled, greedy]
