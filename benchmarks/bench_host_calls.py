"""The host's time of whole calls, without a GPU: ops from the first check to the driver's call, and a prompt.

    pytest benchmarks/bench_host_calls.py --benchmark-enable -n 0 -s

Tensors on the CPU take the way that an H100's take, with inference's settings: checks, the launch row,
results, tensor maps, and machine code of a pack, which is launched on a stand-in for the driver that does
nothing. Checks of values and zeros that the host writes, which CPUs alone have, are left out. In a prompt,
products and embeddings of PyTorch's library are results without numbers. On a GPU there is more to do: those
products' own launches and those that write zeros, the choice of device and stream, and the driver's work.
The figures are the least processor time of many rounds.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import fake_driver

from gptkern import ops
from gptkern.bench.suites import _models as models
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.torch import TorchExecutor
from gptkern.engine.rows import Rows
from gptkern.model.decoder import Transformer
from gptkern.ops import _launch
from gptkern.ops.decode_attention import checks as decode_checks
from gptkern.ops.decode_embed import checks as embed_checks
from gptkern.ops.flash_attention import checks as flash_checks
from gptkern.ops.pack import build, signature
from gptkern.ops.pack.bare import bare

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ARCH, ROUNDS, TOKENS = 90, 100, 1024
CPU, HALF = torch.device("cpu"), torch.bfloat16
Call = Callable[[], object]


class Packs:
    """The machine code of some launches in the loader's place, on the stand-in driver."""

    def __init__(self, launches: list[_launch.Launch]) -> None:
        kernels = {signature.name_of(launch.kernel): launch.kernel for launch in launches}
        self._packed: dict[int, Any] = {}
        unique = build.unique(map(bare, launches))
        for name, binaries in build.binaries(unique, ARCH).items():
            packed = self._packed[id(kernels[name])] = signature.empty(kernels[name])
            for binary in binaries:
                packed.add(binary.key, binary.image, binary.facts)

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """As the loader's."""
        found: bool = self._packed[id(kernel)].launch(grid, args, kwargs, 0, 0)
        return found


@contextmanager
def _replaced(*names: tuple[Any, str, Any]) -> Iterator[None]:
    before = [getattr(owner, name) for owner, name, _ in names]
    for owner, name, value in names:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(names, before, strict=True):
            setattr(owner, name, value)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _embedded(transformer: Transformer, ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    weight = transformer.wte.weight
    return weight.new_empty(*ids.shape, weight.shape[1])


def _unchecked(*_: object) -> None: ...


@contextmanager
def launching(call: Call) -> Iterator[tuple[Packs, list[_launch.Launch]]]:
    """Let ``call`` launch on the stand-in driver within the block; with it, the launches of one call."""
    with _replaced(
        (F, "linear", _linear),
        (Transformer, "_embedded", _embedded),
        (torch, "zeros", torch.empty),
        (flash_checks, "check_offsets", _unchecked),
        (decode_checks, "check_slot_values", _unchecked),
        (decode_checks, "check_sequence_values", _unchecked),
        (embed_checks, "check_values", _unchecked),
    ):
        with _launch.record(ARCH) as launches:
            call()
        packs = Packs(launches)
        assert all(packs.launch(x.kernel, x.grid, x.args, x.kwargs) for x in launches)
        on_stand_in = (_launch, "_recorded_arch", ARCH), (_launch, "loader", lambda: packs)
        with _replaced(*on_stand_in):
            yield packs, launches


def least(call: Call, calls: int) -> float:
    """Microseconds of the processor that one call takes: the least of many rounds of ``calls``."""
    times = []
    for _ in range(ROUNDS):
        began = time.process_time_ns()
        for _ in range(calls):
            call()
        times.append(time.process_time_ns() - began)
    return min(times) / calls / 1e3


def _tensor(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=HALF)


def _norm(rows: int) -> Call:
    x, residual, weight, bias = _tensor(rows, 768), _tensor(rows, 768), _tensor(768), _tensor(768)
    return lambda: ops.add_layer_norm(x, residual, weight, bias)


def _product(rows: int) -> Call:
    x, weight, bias = _tensor(rows, 768), _tensor(3072, 768), _tensor(3072)
    return lambda: ops.linear_act(x, weight, bias)


def _perceptron(rows: int) -> Call:
    x, w_fc, b_fc = _tensor(rows, 768), _tensor(3072, 768), _tensor(3072)
    w_proj, b_proj = _tensor(768, 3072), _tensor(768)
    return lambda: ops.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj)


def _attention(rows: int) -> Call:
    q, k, v = _tensor(1, rows, 3 * 768).unflatten(-1, (36, 64)).split(12, dim=2)
    return lambda: ops.flash_attention(q, k, v)


def _append(rows: int) -> Call:
    k, v = _tensor(rows, 2 * 768).unflatten(-1, (24, 64)).split(12, dim=1)
    k_cache, v_cache = _tensor(64, 64, 12, 64), _tensor(64, 64, 12, 64)
    slots = torch.arange(rows)
    return lambda: ops.append_kv(k, v, k_cache, v_cache, slots)


def _decode(rows: int) -> Call:
    x, weight, bias = _tensor(rows, 768), _tensor(3072, 768), _tensor(3072)
    norm_weight, norm_bias = _tensor(768), _tensor(768)
    return lambda: ops.decode_linear(x, weight, bias, norm=(norm_weight, norm_bias, 1e-5))


def _cache(rows: int) -> tuple[torch.Tensor, ...]:
    """(keys, values, slots, page table, lengths) of ``rows`` sequences."""
    table = torch.arange(16 * rows, dtype=torch.int32).view(rows, 16)
    k_cache, v_cache = _tensor(16 * rows, 64, 12, 64), _tensor(16 * rows, 64, 12, 64)
    return k_cache, v_cache, torch.arange(rows), table, torch.full((rows,), 1000, dtype=torch.int32)


def _decode_qkv(rows: int) -> Call:
    x, weight, bias, norm = _tensor(rows, 768), _tensor(3 * 768, 768), _tensor(3 * 768), _tensor(768)
    norm_bias, (k_cache, v_cache, slots, *_) = _tensor(768), _cache(rows)
    return lambda: ops.decode_qkv(x, weight, bias, k_cache, v_cache, slots, norm=(norm, norm_bias, 1e-5))


def _decode_attention(rows: int) -> Call:
    q, (k_cache, v_cache, _, table, lens) = _tensor(rows, 12, 64), _cache(rows)
    return lambda: ops.decode_attention(q, k_cache, v_cache, table, lens)


def _decode_embed(rows: int) -> Call:
    ids, live = torch.zeros(rows, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    words, positions, (*_, table, lens) = _tensor(50257, 768), _tensor(1024, 768), _cache(rows)
    return lambda: ops.decode_embed(ids, live, words, positions, table, lens, 64)


def _rotary(rows: int) -> Call:
    q, k = _tensor(1, rows, 12, 64), _tensor(1, rows, 12, 64)
    cos, sin = torch.empty(rows, 32), torch.empty(rows, 32)
    return lambda: ops.rotary(q, k, cos, sin)


def _gated(rows: int) -> Call:
    x, w_fc, w_proj = _tensor(rows, 768), _tensor(4096, 768), _tensor(768, 2048)
    return lambda: ops.gated_mlp(x, w_fc, None, w_proj, None)


def _rms_norm(rows: int) -> Call:
    x, residual, weight = _tensor(rows, 768), _tensor(rows, 768), _tensor(768)
    return lambda: ops.add_rms_norm(x, residual, weight)


def _prompt(rows: int) -> Call:
    """GPT-2 124M without a cache: the prefill that ``gptkern bench`` times."""
    model, ids = models.ours(models.GPT2, HALF, CPU), torch.zeros(1, rows, dtype=torch.int64)
    return lambda: model(ids, logits_to_keep=1)


def _cached_prompt(rows: int) -> Call:
    """GPT-2 124M through the cache in one pass, as the engine's executor of a model's layers runs it."""
    model, ids = models.ours(models.GPT2, HALF, CPU), torch.zeros(rows, dtype=torch.int64)
    cache = KVCache.for_config(model.config, max_seqs=1, max_len=rows, dtype=HALF)
    (sequence,) = cache.allocate(1)
    layers = TorchExecutor(model, cache)

    def call() -> None:
        layers.forward(Rows([sequence], [rows], ids, [1]))
        cache.truncate(sequence, 0)

    return call


# What is called, its rows, and calls of a round.
CALLS: dict[str, tuple[Callable[[int], Call], int, int]] = {
    "add_layer_norm": (_norm, TOKENS, 200),
    "linear_act on Hopper's kernel": (_product, 2 * TOKENS, 200),
    "gelu_mlp": (_perceptron, TOKENS, 100),
    "flash_attention": (_attention, TOKENS, 200),
    "append_kv": (_append, TOKENS, 200),
    "decode_linear": (_decode, 1, 200),
    "decode_qkv": (_decode_qkv, 1, 200),
    "decode_attention": (_decode_attention, 1, 200),
    "decode_embed": (_decode_embed, 1, 200),
    "rotary": (_rotary, TOKENS, 200),
    "gated_mlp": (_gated, 2 * TOKENS, 100),
    "add_rms_norm": (_rms_norm, TOKENS, 200),
    "prompt of GPT-2 124M": (_prompt, TOKENS, 1),
    "prompt of GPT-2 124M, cached": (_cached_prompt, TOKENS, 1),
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> fake_driver.FakeDriver:
    """A driver that does nothing, and memory that stays with the process, as PyTorch keeps a GPU's."""
    libc = ctypes.CDLL(None)
    trim, mapped = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
    libc.mallopt(trim, 1 << 30)
    libc.mallopt(mapped, 1 << 30)
    made = fake_driver.FakeDriver(fake_driver.build(tmp_path_factory.mktemp("driver")))
    made.silence()
    return made


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("name", CALLS)
def test_host(benchmark: BenchmarkFixture, name: str) -> None:
    make, rows, calls = CALLS[name]
    with torch.inference_mode():
        call = make(rows)
        with launching(call) as (packs, launches):

            def launch_alone() -> None:
                for x in launches:
                    packs.launch(x.kernel, x.grid, x.args, x.kwargs)

            whole, alone = least(call, calls), least(launch_alone, calls)
            benchmark.pedantic(call, rounds=1)
    benchmark.extra_info.update(microseconds=whole, launching=alone, launches=len(launches))
    print(f"\n{name}, {rows} rows: {whole:.1f} us, of which {len(launches)} launches {alone:.1f}")
