"""Each executor says what it serves, or why not; strict mode refuses every reason by its words."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import gptkern
from gptkern import GPT, GPTConfig, _native, environment
from gptkern.cli import doctor
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.base import Executor
from gptkern.engine.executors.choose import EXECUTORS, Executors, choose
from gptkern.engine.executors.cpu import CpuExecutor
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.executors.persistent import PersistentExecutor
from gptkern.engine.executors.torch import TorchExecutor
from gptkern.ops import _dispatch
from gptkern.ops._types import FP8

CONFIG = GPTConfig(vocab_size=61, n_positions=64, n_layer=2, n_head=2, n_embd=64)
Change = Callable[[GPT], Any]


@pytest.fixture(autouse=True)
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_past_warnings", set())


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).eval()


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def replaced(model: GPT) -> None:
    model.transformer.h[0].mlp.c_fc = Doubled(64, 256)


def other_forward(model: GPT) -> None:
    model.forward = lambda *args, **kwargs: None  # type: ignore[method-assign]


def strided(model: GPT) -> None:
    model.lm_head.weight = nn.Parameter(torch.randn(122, 128)[::2, ::2])


def turned_embeddings(model: GPT) -> None:
    model.transformer.wpe.weight = nn.Parameter(torch.randn(64, 64).t())


# Whatever an executor that reads weights alone cannot serve.
CHANGED: dict[str, tuple[Change, str]] = {
    "a hook": (lambda m: m.transformer.h[1].register_forward_hook(lambda *a: None), "h.1 is hooked"),
    "a layer put in": (replaced, "is a Doubled that was put in"),
    "a number": (lambda m: setattr(m.transformer.h[0].ln_1, "eps", 0.5), "has eps 0.5"),
    "a forward": (other_forward, "has a forward of its own"),
}
CPU: dict[str, tuple[Change, str]] = CHANGED | {
    "float16": (lambda m: m.half(), "takes float32 and bfloat16; the weights are torch.float16"),
    "float64": (lambda m: m.double(), "takes float32 and bfloat16; the weights are torch.float64"),
    "two dtypes": (lambda m: m.transformer.ln_f.bfloat16(), "of several dtypes"),
    "strides": (strided, "matrices whose rows or columns are contiguous"),
    "embeddings": (turned_embeddings, "embeddings whose rows are contiguous"),
}
GRAPH: dict[str, tuple[Change, str]] = CHANGED | {
    "two dtypes": (lambda m: m.transformer.ln_f.bfloat16(), "of several dtypes"),
}


def cache_of(model: GPT, dtype: torch.dtype | None = None) -> KVCache:
    return KVCache.for_config(model.config, max_seqs=2, max_len=64, dtype=dtype or model.dtype)


def check(
    kind: type[Executor],
    reason: str,
    model: GPT,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype | None = None,
) -> None:
    """It gives the reason, the layers run with a warning, and strict mode refuses them."""
    cache = cache_of(model, dtype)
    assert reason in (kind.serves(model, cache.dtype) or "")
    chosen, passed = choose(model, cache.dtype)
    assert chosen is TorchExecutor
    assert [reason in other.reason for other in passed if other.executor is kind] == [True]
    with pytest.warns(gptkern.FallbackWarning, match="decoding runs on the model's layers one by one"):
        assert type(Executors(model, cache, 4).decode) is TorchExecutor
    told = {route.part: route for route in gptkern.explain(model)}
    assert told["decode"].route == "fallback" or dtype is not None
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    with pytest.raises(RuntimeError, match="GPTKERN_STRICT=1 makes this an error") as raised:
        Executors(model, cache, 4)
    assert reason in str(raised.value)


@pytest.mark.parametrize("name", CPU)
def test_reasons_of_the_cpu_executor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    model, (change, reason) = make_model(), CPU[name]
    change(model)
    check(CpuExecutor, reason, model, monkeypatch)


def test_reasons_of_the_cpu_executor_that_lie_outside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    with monkeypatch.context() as patched:
        reason = "keys and values in the weights' torch.float32"
        check(CpuExecutor, reason, make_model(), patched, torch.bfloat16)
    with monkeypatch.context() as patched, torch.autocast("cpu", torch.bfloat16):
        check(CpuExecutor, "autocast is on", make_model(), patched)
    with monkeypatch.context() as patched:
        patched.setattr(_native, "extension", SimpleNamespace(has_decoder=False))
        check(CpuExecutor, "needs AVX2", make_model(), patched)
    with monkeypatch.context() as patched:
        patched.setattr(_native, "extension", None)
        check(CpuExecutor, "gptkern._C is not built", make_model(), patched)


@pytest.mark.parametrize("name", GRAPH)
def test_reasons_of_the_graph_executor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (change, reason) = make_model(), GRAPH[name]
    change(model)
    with gptkern.backend("kernel"):
        assert "on cpu" in (CpuExecutor.serves(model, model.dtype) or "") or name in CHANGED
        check(GraphExecutor, reason, model, monkeypatch)
        assert reason in (PersistentExecutor.serves(model, model.dtype) or "")


def test_reasons_of_the_graph_executor_that_lie_outside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with gptkern.backend("reference"):
        assert "run on CUDA devices" in (GraphExecutor.serves(make_model(), torch.float32) or "")
    with gptkern.backend("kernel"):
        assert GraphExecutor.serves(make_model(), torch.float32) is None
        assert GraphExecutor.serves(make_model(), FP8) is None
        with monkeypatch.context() as patched:
            check(GraphExecutor, "not torch.bfloat16", make_model(), patched, torch.bfloat16)
        with monkeypatch.context() as patched, torch.autocast("cpu", torch.bfloat16):
            check(GraphExecutor, "autocast is on", make_model(), patched)


def test_the_persistent_executor_is_taken_on_request_alone() -> None:
    with gptkern.backend("kernel"):
        chosen, passed = choose(make_model(), torch.float32)
        assert chosen is GraphExecutor
        assert [(p.executor, p.reason, p.is_fallback) for p in passed] == [
            (PersistentExecutor, "it is taken only on request", False)
        ]


def test_the_last_executor_serves_everything() -> None:
    model = make_model().half()
    replaced(model)
    assert EXECUTORS[-1] is TorchExecutor
    assert TorchExecutor.serves(model, torch.float64) is None


def test_the_choice_is_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    model = make_model()
    with caplog.at_level(logging.DEBUG, logger="gptkern"):
        Executors(model, cache_of(model), 4)
    assert "the graph executor is passed over: the decode kernels run on CUDA devices" in caplog.text
    assert "decoding: the cpu executor runs" in caplog.text


def test_doctor_names_the_executor_and_why_not_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    found = {finding.subject: finding for finding in doctor.examine()}["executor"]
    assert found.verdict == "ok"
    assert found.text == "cpu (persistent and graph need a CUDA device)"
    monkeypatch.setattr(_native, "extension", SimpleNamespace(has_decoder=False))
    (found,) = doctor._executor()
    assert found.verdict == "fallback"
    assert found.text.startswith("torch (persistent and graph need a CUDA device); ")
    assert "not cpu: the CPU's decode step needs AVX2" in found.text
