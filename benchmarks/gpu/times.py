"""What does it cost? Launches, ceilings, kernels one by one, whole steps: a row a figure.

Small kernels are timed as several calls in one CUDA graph, on inputs in turn, so that neither launch gaps nor
the L2 cache are in the figure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from stages import Row, Scope, guarded, tiny

from gptkern import ops
from gptkern.bench import timing
from gptkern.bench.suites import _models as models
from gptkern.bench.suites.decode_step import filled
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.persistent import PersistentExecutor
from gptkern.ops.decode_linear import decode_linear
from gptkern.ops.linear_cross_entropy import linear_cross_entropy
from gptkern.ops.sample import SamplerState, SamplingParams, sample

Make = Callable[[], Callable[[], object]]
REPLAYS = 20


def microseconds(scope: Scope, make: Make, sets: int) -> float:
    """The median time of one call of ``sets`` different ones."""
    calls = [make() for _ in range(1 if scope.dry else sets)]
    if scope.device.type != "cuda":
        began = time.perf_counter()
        calls[0]()
        found = (time.perf_counter() - began) * 1e6
        _check_repeats(calls[0])
        return found
    for call in calls:
        call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    found = replayed(graph.replay) / len(calls)
    _check_repeats(calls[0])
    return found


def _check_repeats(call: Callable[[], object]) -> None:
    """Refuse a time of a kernel whose result, after all those replays, is not finite or not its own again.

    Raises:
        ArithmeticError: One of the two.
    """
    first, second = (out[0] if isinstance(out, tuple) else out for out in (call(), call()))
    assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
    # A draw, integers, is another one each time; meta tensors have no values.
    if first.is_meta or not first.is_floating_point():
        return
    if not first.isfinite().all():
        raise ArithmeticError("the timed kernel's result is not finite")
    if not torch.equal(first, second):
        raise ArithmeticError("the timed kernel gives other bits at each call")


def replayed(replay: Callable[[], object]) -> float:
    """The median microseconds of a replay."""
    for _ in range(3):
        replay()
    found = []
    for _ in range(REPLAYS):
        # The host's, and at once: not while a replay is running.
        torch.cuda.synchronize()
        timing.reset_persisting_l2()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        replay()
        ended.record()
        ended.synchronize()
        found.append(began.elapsed_time(ended) * 1e3)
    return median(found)


def _row(
    scope: Scope, name: str, make: Make, *, sets: int = 2, flops: float = 0.0, moved: float = 0.0
) -> Row:
    def measured() -> Row:
        found = microseconds(scope, make, sets)
        return _figure(name, found, flops, moved)

    return guarded(name, measured)


def _figure(name: str, found: float, flops: float, moved: float) -> Row:
    """Microseconds, and the rates that they are."""
    rates = [f"{flops / found * 1e-6:.0f} TFLOP/s"] if flops else []
    rates += [f"{moved / found * 1e-6:.2f} TB/s"] if moved else []
    return Row(name, value=found, unit="us", note=", ".join(rates))


class _Sizes:
    """Random tensors on the device; small ones in a dry run."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self.dtype = torch.float32 if scope.dry else torch.bfloat16

    def n(self, size: int) -> int:
        """``size``, or in a dry run a small number that divides as it does."""
        return min(size, 32) if self._scope.dry else size

    def __call__(self, *shape: int, grad: bool = False) -> torch.Tensor:
        shape = tuple(map(self.n, shape))
        return torch.randn(shape, device=self._scope.device, dtype=self.dtype, requires_grad=grad)


def launch_costs(scope: Scope) -> Iterator[Row]:
    """A grid barrier, a node of a graph, a dependent launch: what decides between one launch and many."""
    if scope.dry:
        # A barrier never ends where programs run one after another.
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import bench_launch_costs as costs

    for programs in (1, 2):
        yield guarded(
            "barrier",
            lambda n=programs: Row(
                f"grid barrier, {n} programs a multiprocessor", value=costs.barrier(n), unit="us"
            ),
        )  # type: ignore[misc]
    for dependent in (False, True):
        name = "dependent launch in a graph" if dependent else "graph node"
        yield guarded(name, lambda d=dependent, n=name: Row(n, value=costs.node(d), unit="us"))  # type: ignore[misc]


def ceilings(scope: Scope) -> Iterator[Row]:
    """What the card can do: a copy, a read, a matrix product."""
    size = 1 << (16 if scope.dry else 29)
    big = torch.empty(size, dtype=torch.int8, device=scope.device).random_()
    other = torch.empty_like(big)
    yield _row(scope, "copy", lambda: lambda: other.copy_(big), moved=2 * size)
    yield _row(scope, "read (sum)", lambda: lambda: big.view(torch.int32).sum(), moved=size)
    random = _Sizes(scope)
    a, b, n = random(8192, 8192), random(8192, 8192), random.n(8192)
    yield _row(scope, f"cuBLAS {n} x {n} x {n}", lambda: lambda: a @ b, flops=2.0 * n**3)


def decode(scope: Scope) -> Iterator[Row]:
    """The decode step's linear layers at GPT-2 124M's shapes, and the sampler."""
    random = _Sizes(scope)
    layers = (
        ("QKV", 2304, 768, "norm", "none"),
        ("out", 768, 768, "residual", "none"),
        ("FC", 3072, 768, "norm", "gelu_tanh"),
        ("proj", 768, 3072, "residual", "none"),
        ("head", 50257, 768, "norm", "none"),
    )
    for name, outputs, inputs, what, activation in layers:

        def made(
            n: int = outputs, k: int = inputs, what: str = what, act: str = activation
        ) -> Callable[[], object]:
            x, weight, bias = random(1, k), random(n, k), random(n)
            if what == "norm":
                norm = (random(k), random(k), 1e-5)
                return lambda: decode_linear(x, weight, bias, activation=act, norm=norm)
            residual = random(1, n)
            return lambda: decode_linear(x, weight, bias, activation=act, residual=residual)

        size = 2.0 * random.n(outputs) * random.n(inputs)
        yield _row(scope, f"decode {name}", made, sets=6 if outputs > 9999 else 48, moved=size)
    vocab = 64 if scope.dry else 50257
    for batch in (1, 64):

        def drawn(batch: int = batch) -> Callable[[], object]:
            params = SamplingParams.make(
                batch, vocab, temperature=0.8, top_k=50, top_p=0.9, device=scope.device
            )
            state = SamplerState.make(batch, vocab, seed=0, device=scope.device)
            logits = torch.randn(batch, vocab, device=scope.device, dtype=random.dtype)
            return lambda: sample(logits, params, state=state)

        yield _row(scope, f"sampler {batch} x {vocab}, top-k 50, top-p 0.9", drawn)


def step(scope: Scope) -> Iterator[Row]:
    """A step of GPT-2 124M at 1024 tokens, one sequence and eight: one graph, and one launch."""
    config = tiny(models.GPT2) if scope.dry else models.GPT2.replace(n_positions=2048)
    context = 20 if scope.dry else 1024
    dtype = torch.float32 if scope.dry else torch.bfloat16
    model = models.ours(config, dtype, scope.device)
    for batch in (1,) if scope.dry else (1, 8):
        for persistent in (False, True):
            name = f"decode step, {batch} at {context}, {'persistent' if persistent else 'graph'}"

            def measured(batch: int = batch, persistent: bool = persistent, name: str = name) -> Row:
                kind = PersistentExecutor if persistent else GraphExecutor
                step = kind(model, filled(config, batch, context, dtype, scope.device), batch)
                tokens = torch.zeros(batch, dtype=torch.int64, device=scope.device)
                with torch.inference_mode():
                    began = time.perf_counter()
                    step(tokens)
                    if step.graphs is None:
                        return Row(name, value=(time.perf_counter() - began) * 1e6, unit="us")
                    graph = step.graphs._captured[batch][0]
                    return Row(
                        name, value=replayed(graph.replay), unit="us", note="device, without the sampler"
                    )

            yield guarded(name, measured)


def attention(scope: Scope) -> Iterator[Row]:
    """Causal attention forward, 16k tokens, beside PyTorch's own."""
    random = _Sizes(scope)
    shapes = [(64, t) for t in (1024, 2048, 4096, 8192, 16384)] + [(128, t) for t in (1024, 4096, 8192)]
    for head_dim, seq in shapes[: 1 if scope.dry else None]:
        batch, heads = (1, 2) if scope.dry else (16384 // seq, 16)
        tensors = [random(batch, seq, heads, head_dim) for _ in range(3)]
        heads_first = [t.transpose(1, 2) for t in tensors]
        flops = 2.0 * tensors[0].numel() * tensors[0].shape[1]
        name = f"attention forward, head_dim {head_dim}, {seq} tokens"
        yield _row(scope, name, partial(partial, ops.flash_attention, *tensors, causal=True), flops=flops)
        theirs = partial(partial, F.scaled_dot_product_attention, *heads_first, is_causal=True)
        yield _row(scope, "  PyTorch's", theirs, flops=flops)


def norms_and_products(scope: Scope) -> Iterator[Row]:
    """Layer norm with residual, and the product with GELU beside cuBLAS alone."""
    random = _Sizes(scope)
    for width in (768, 1600):

        def made(width: int = width) -> Callable[[], object]:
            x, residual, weight, bias = (
                random(16384, width),
                random(16384, width),
                random(width),
                random(width),
            )
            return lambda: ops.add_layer_norm(x, residual, weight, bias)

        moved = 8.0 * random.n(16384) * random.n(width)
        yield _row(scope, f"layer norm + residual, 16384 x {width}", made, moved=moved)
    x, weight, bias = random(16384, 768), random(3072, 768), random(3072)
    flops = 2.0 * x.numel() * weight.shape[0]
    yield _row(
        scope,
        "linear + GELU, 16384 x 768 to 3072",
        lambda: lambda: ops.linear_act(x, weight, bias),
        flops=flops,
    )
    yield _row(scope, "  cuBLAS, the product alone", lambda: lambda: x @ weight.t(), flops=flops)


def backward(scope: Scope) -> Iterator[Row]:
    """Attention and layer norm backward, the head with its loss, at 16k tokens."""
    random = _Sizes(scope)
    for head_dim, seq in ((64, 1024), (64, 4096), (128, 1024), (128, 4096))[: 1 if scope.dry else None]:
        batch, heads = (1, 2) if scope.dry else (16384 // seq, 16)
        q, k, v = (random(batch, seq, heads, head_dim, grad=True) for _ in range(3))
        name = f"attention backward, head_dim {head_dim}, {seq} tokens"
        yield _eager(
            scope, name, ops.flash_attention(q, k, v, causal=True), flops=5.0 * q.numel() * q.shape[1]
        )
    x, weight, bias = random(16384, 768, grad=True), random(768, grad=True), random(768, grad=True)
    normed = ops.layer_norm(x, weight, bias)
    yield _eager(scope, "layer norm backward, 16384 x 768", normed, moved=6.0 * x.numel())
    hidden, head = random(16384, 768, grad=True), random(50257, 768, grad=True)
    targets = torch.randint(head.shape[0], (hidden.shape[0],), device=scope.device)
    flops = 6.0 * hidden.numel() * head.shape[0]

    def both() -> object:
        linear_cross_entropy(hidden, head, targets).backward()
        hidden.grad = head.grad = None
        return None

    yield guarded(
        "head and loss", lambda: _timed(scope, "head and loss, forward and backward", both, flops=flops)
    )


def _eager(scope: Scope, name: str, out: torch.Tensor, *, flops: float = 0.0, moved: float = 0.0) -> Row:
    seed = torch.randn_like(out)
    return guarded(
        name,
        lambda: _timed(scope, name, lambda: out.backward(seed, retain_graph=True), flops=flops, moved=moved),
    )


def _timed(
    scope: Scope, name: str, call: Callable[[], object], *, flops: float = 0.0, moved: float = 0.0
) -> Row:
    """A call from the host, by events: at these sizes the device is what it waits for."""
    if scope.device.type != "cuda":
        began = time.perf_counter()
        call()
        found = (time.perf_counter() - began) * 1e6
    else:
        found = replayed(call)
    return _figure(name, found, flops, moved)
