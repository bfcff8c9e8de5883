"""The graph executor against the model that it runs."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptkern import GPTConfig, backend
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.graph import GraphExecutor, Graphs, Pass
from gptkern.engine.pages import CacheFullError
from gptkern.gpt import GPT
from gptkern.ops import _launch
from gptkern.ops._counters import Pool, counters, counters_from


def make_model(dtype: torch.dtype = torch.float64, **changes: Any) -> GPT:
    config = GPTConfig(
        **{"vocab_size": 37, "n_positions": 64, "n_layer": 3, "n_head": 2, "n_embd": 24, **changes}
    )
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # norms and biases that matter
    return model.to(dtype).eval()


def prefilled(
    model: GPT, prompts: list[list[int]], *, page_size: int = 64, max_seqs: int | None = None
) -> KVCache:
    cache = KVCache.for_config(
        model.config,
        max_seqs=len(prompts) if max_seqs is None else max_seqs,
        max_len=40,
        page_size=page_size,
        dtype=model.dtype,
        device=model.device,
    )
    with torch.no_grad(), backend("reference"):
        for prompt in prompts:
            (sequence,) = cache.allocate()
            step = cache.extend([len(prompt)], [sequence])
            model.transformer(torch.tensor(prompt), step.positions, step)
            step.commit()
    return cache


PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8]]


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("page_size", [64, 4])
def test_agrees_with_the_model(model_type: str, bias: bool, page_size: int) -> None:
    by_layer = bias and model_type == "gpt2"
    model = make_model(model_type=model_type, bias=bias, scale_attn_by_inverse_layer_idx=by_layer)
    cache = prefilled(model, PROMPTS, page_size=page_size, max_seqs=5)
    step = GraphExecutor(model, cache)
    texts = [list(prompt) for prompt in PROMPTS]
    for _ in range(6):
        tokens = torch.randint(37, (3,))
        logits = step(tokens)
        for row, token in enumerate(tokens.tolist()):
            texts[row].append(token)
            with torch.no_grad():
                expected = model(torch.tensor([texts[row]])).logits[0, -1]
            torch.testing.assert_close(logits[row], expected)
    assert cache.lengths == [13, 7, 10]


def test_weights_stay_live() -> None:
    model = make_model()
    cache = prefilled(model, PROMPTS)
    step = GraphExecutor(model, cache)
    step(torch.tensor([1, 2, 3]))
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    logits = step(torch.tensor([4, 5, 6]))
    fresh = GraphExecutor(model, cache)
    for sequence in cache.sequences:
        cache.truncate(sequence, cache.lengths[cache.sequences.index(sequence)] - 1)
    assert torch.equal(fresh(torch.tensor([4, 5, 6])), logits)


def test_sequences_come_and_go() -> None:
    model = make_model()
    cache = prefilled(model, PROMPTS, page_size=4, max_seqs=4)
    step = GraphExecutor(model, cache)
    step(torch.tensor([1, 2, 3]))
    cache.free(cache.sequences[1])
    cache.fork(cache.sequences[0])
    logits = step(torch.tensor([7, 8, 9]))
    texts = [[*PROMPTS[0], 1, 7], [*PROMPTS[2], 3, 8], [*PROMPTS[0], 1, 9]]
    for row, text in enumerate(texts):
        with torch.no_grad():
            torch.testing.assert_close(logits[row], model(torch.tensor([text])).logits[0, -1])


def test_failures_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    cache = prefilled(model, PROMPTS)
    step = GraphExecutor(model, cache)
    monkeypatch.setattr(Pass, "_linear", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(torch.tensor([1, 2, 3]))
    assert cache.lengths == [7, 1, 4]
    monkeypatch.undo()
    expected = GraphExecutor(model, prefilled(model, PROMPTS))(torch.tensor([1, 2, 3]))
    assert torch.equal(step(torch.tensor([1, 2, 3])), expected)


def test_bad_arguments_are_named() -> None:
    model = make_model()
    cache = prefilled(model, PROMPTS)
    step = GraphExecutor(model, cache)
    with pytest.raises(ValueError, match=r"tokens has shape \(2,\); \(3,\), one a sequence"):
        step(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"tokens are torch.float32; whole numbers"):
        step(torch.ones(3))
    with pytest.raises(ValueError, match="the cache has 3 layers of 2 x 12, the model 2 of"):
        GraphExecutor(make_model(n_layer=2), cache)
    with pytest.raises(ValueError, match=r"the cache is torch.float64, the model torch.float32"):
        GraphExecutor(make_model(torch.float32), cache)
    cache.clear()
    with pytest.raises(ValueError, match=r"\(0,\), one a sequence of the cache, is needed"):
        step(torch.tensor([1]))


def test_the_end_of_the_context_and_of_the_cache() -> None:
    model = make_model(n_positions=8)
    step = GraphExecutor(model, prefilled(model, PROMPTS))
    step(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="9 tokens are longer than the model's context of 8"):
        step(torch.tensor([1, 2, 3]))
    model = make_model()
    cache = prefilled(model, [[1] * 40], page_size=40)
    with pytest.raises(CacheFullError):
        GraphExecutor(model, cache)(torch.tensor([1]))
    assert cache.lengths == [40]


@pytest.mark.kernels
@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_kernels_agree_with_the_references(model_type: str) -> None:
    model = make_model(torch.float32, model_type=model_type, n_layer=2)
    tokens = torch.tensor([7, 8, 9])
    with backend("reference"):
        expected = GraphExecutor(model, prefilled(model, PROMPTS))(tokens)
    cache = prefilled(model, PROMPTS, page_size=4)
    logits = GraphExecutor(model, cache)(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert cache.lengths == [8, 2, 5]


@pytest.mark.kernels
@pytest.mark.usefixtures("on_device")
def test_five_launches_a_layer() -> None:
    model = make_model(torch.float32, n_layer=2)
    step = GraphExecutor(model, prefilled(model, PROMPTS))
    names: list[str] = []

    def note(launch: _launch.Launch) -> bool:
        names.append(launch.name)
        return True

    # The step itself: on a GPU a call is the replay of a graph.
    with _launch.observe(note), torch.no_grad():
        step.run(3)
    layer = ["decode_linear_kernel", "decode_attention_kernel", *["decode_linear_kernel"] * 3]
    assert names == ["decode_embed_kernel", *layer, *layer, "decode_linear_kernel"]
    assert Counter(names).total() == 2 + 5 * 2


@pytest.mark.kernels
@pytest.mark.usefixtures("on_device")
def test_a_sequence_is_bitwise_the_same_alone_in_a_batch_and_in_other_pages() -> None:
    model = make_model(torch.float32, n_layer=1)
    together = GraphExecutor(model, prefilled(model, PROMPTS, page_size=4))(torch.tensor([7, 8, 9]))
    for row, token in enumerate((7, 8, 9)):
        alone = GraphExecutor(model, prefilled(model, [PROMPTS[row]]))(torch.tensor([token]))
        assert torch.equal(alone[0], together[row])


@pytest.mark.kernels
@pytest.mark.usefixtures("on_device")
def test_padding_of_a_bucket_writes_nothing() -> None:
    model = make_model(torch.float32, n_layer=1)
    cache = prefilled(model, PROMPTS, page_size=4, max_seqs=4)
    step = GraphExecutor(model, cache)
    held = prefilled(model, PROMPTS, page_size=4, max_seqs=4)
    logits = GraphExecutor(model, held)(torch.tensor([7, 8, 9]))
    cache.reserve([1, 1, 1])
    step._table.lay(
        [(cache.pages(i), length) for i, length in zip(cache.sequences, cache.lengths, strict=True)]
    )
    step._tokens[:3] = torch.tensor([7, 8, 9])
    step._live.fill_(3)
    with torch.no_grad():
        padded = step.run(4)
    assert torch.equal(padded[:3], logits)
    assert padded[3].isfinite().all()
    assert step._table.lengths.tolist()[:4] == [8, 2, 5, 0]
    assert torch.equal(cache.k, held.k)
    assert torch.equal(cache.v, held.v)


class _Recorded:
    """Stands for what PyTorch has of CUDA, and remembers how it was used."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, name: str, result: Any = None) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, arguments, named))
            return result if result is not None else nullcontext()

        return call

    def arguments(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(arguments, named) for called, arguments, named in self.calls if called == name]


def test_graphs_are_of_the_models_device_and_leave_others_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = _Recorded()
    stream = SimpleNamespace(wait_stream=recorded("wait"))
    pools = iter(range(9))
    monkeypatch.setattr(torch.cuda, "Stream", recorded("Stream", stream))
    monkeypatch.setattr(torch.cuda, "current_stream", recorded("current_stream", stream))
    monkeypatch.setattr(torch.cuda, "stream", recorded("stream"))
    monkeypatch.setattr(torch.cuda, "graph", recorded("graph"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=recorded("replay")))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    model = make_model()
    step = GraphExecutor(model, prefilled(model, PROMPTS))
    elsewhere = torch.device("cuda:1")
    step._cache = SimpleNamespace(device=elsewhere)  # type: ignore[assignment]
    monkeypatch.setattr(step, "run", lambda rows: torch.zeros(rows))
    graphs = Graphs(step)
    graphs.replay(3)
    assert recorded.arguments("Stream") == [((elsewhere,), {})]
    assert {arguments for arguments, _ in recorded.arguments("current_stream")} == {(elsewhere,)}
    ((_, named),) = recorded.arguments("graph")
    assert named["capture_error_mode"] == "thread_local"
    # A pool whose graphs are all gone takes no new ones.
    graphs.clear()
    graphs.replay(3)
    first, second = (named["pool"] for _, named in recorded.arguments("graph"))
    assert first != second


def test_counters_of_a_pool_are_its_own_and_stay() -> None:
    cpu = torch.device("cpu")
    shared = counters(cpu, 8)
    pool: Pool = {}
    with counters_from(pool):
        own, more = counters(cpu, 8), counters(cpu, 1 << 20)
        assert counters(cpu, 9) is own
        assert counters(cpu, 1 << 20) is more
    assert counters(cpu, 8) is shared
    assert len({tensor.data_ptr() for tensor in (shared, own, more)}) == 3
    assert {tensor.data_ptr() for tensor in pool.values()} == {own.data_ptr(), more.data_ptr()}
