"""Speculation by prompt lookup: every call gives token for token what it gives without."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from generate_support import VOCAB, pair
from scipy import stats

from gptkern import _native, cli, ops
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.choose import Executors
from gptkern.engine.executors.cpu import CpuExecutor
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.engine.lookup import Lookup
from gptkern.engine.rows import Rows
from gptkern.generate.run import GenerateOutput
from gptkern.gpt import GPT
from gptkern.ops import _dispatch

NEW = 24


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a CPU without the interpreter."""
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)


def model() -> GPT:
    return pair("odd width")[1]


@functools.cache
def copying() -> GPT:
    """A model whose branches add little to its embeddings: it repeats itself, though not always."""
    made = copy.deepcopy(model())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "c_proj" in name or "wpe" in name:
                parameter.mul_(0.15 if "c_proj" in name else 0.4)
    return made


def repetitive(seed: int, batch: int = 1, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    motif = torch.randint(2, VOCAB, (batch, 1 + seed % 7), generator=generator)
    return motif.repeat(1, length)[:, :length]


def both(
    ids: torch.Tensor, speculate: int = 4, gpt: GPT | None = None, **options: Any
) -> tuple[GenerateOutput, GenerateOutput]:
    options = {"max_new_tokens": NEW, "pad_token_id": 0, "return_dict_in_generate": True} | options
    gpt = gpt or copying()
    return gpt.generate(ids, **options), gpt.generate(ids, speculate=speculate, **options)


def assert_same(plain: GenerateOutput, drafted: GenerateOutput) -> None:
    assert torch.equal(plain.sequences, drafted.sequences)
    assert plain.finish_reasons == drafted.finish_reasons
    if plain.logprobs is not None:
        assert drafted.logprobs is not None
        assert torch.equal(plain.logprobs, drafted.logprobs)


def test_lookup_takes_the_latest_longest_run_and_goes_on_past_the_end() -> None:
    assert Lookup([1, 2, 3]).draft(4) == []
    assert Lookup([1, 2, 9, 5, 2, 8, 1, 2]).draft(2) == [9, 5]
    assert Lookup([2, 8, 2, 9, 2]).draft(1) == [9]
    assert Lookup([7, 1, 2, 1, 2]).draft(5) == [1, 2, 1, 2, 1]
    assert Lookup([1, 1]).draft(0) == []


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("kind", ["repetitive", "random"])
def test_greedy_is_plain_greedy_on_500_prompts(kind: str) -> None:
    drafted = accepted = 0
    for seed in range(250):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, VOCAB, (1, 1 + seed % 30), generator=generator)
        ids = repetitive(seed) if kind == "repetitive" else ids
        gpt = copying() if seed % 2 else model()
        plain, found = both(ids, eos_token_id=None, speculate=1 + seed % 7, gpt=gpt)
        assert_same(plain, found)
        drafted, accepted = drafted + found.draft_tokens, accepted + found.accepted_tokens
    assert drafted / 5 < accepted < drafted


def _likely_to_be_drafted_right() -> torch.Tensor:
    """A prompt whose likeliest next token is drafted to be followed by what likely follows it."""
    for seed in range(1000):
        ids = repetitive(seed, length=9)
        next_two = (
            copying().generate(ids, max_new_tokens=2, eos_token_id=None, pad_token_id=0)[0, -2:].tolist()
        )
        if Lookup([*ids[0].tolist(), next_two[0]]).draft(1) == next_two[1:]:
            return ids
    raise AssertionError("no such prompt")


@pytest.mark.usefixtures("cpu")
def test_sampled_tokens_are_distributed_as_the_model_has_them() -> None:
    options = {"do_sample": True, "temperature": 0.5, "top_k": 0}
    ids = _likely_to_be_drafted_right()
    counts = torch.zeros(VOCAB, dtype=torch.int64)
    accepted = 0
    for seed in range(400):
        found = copying().generate(
            ids,
            max_new_tokens=3,
            eos_token_id=None,
            pad_token_id=0,
            num_return_sequences=8,
            speculate=1,
            seed=seed,
            return_dict_in_generate=True,
            **options,
        )
        counts += torch.bincount(found.sequences[:, -2], minlength=VOCAB)
        accepted += found.accepted_tokens
    with torch.no_grad():
        first = copying()(ids).logits[0, -1]
        continued = torch.cat([ids.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1)
        second = copying()(continued).logits[:, -1]
    chances = [(logits.double() / 0.5).softmax(-1) for logits in (first, second)]
    expected = 3200 * (chances[0] @ chances[1])
    likely = expected > 5
    seen, wanted = ([*x[likely].tolist(), float(x[~likely].sum())] for x in (counts, expected))
    assert accepted > 100
    assert stats.chisquare(seen, [w * sum(seen) / sum(wanted) for w in wanted]).pvalue > 1e-4


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_any_weights_and_padded_prompts(turned: bool, dtype: torch.dtype) -> None:
    gpt = copy.deepcopy(copying()).to(dtype)
    if turned:
        for layer in gpt.transformer.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t())
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, :7] = mask[2, :13] = 0
    plain, found = both(repetitive(4, 3), gpt=gpt, attention_mask=mask, eos_token_id=None)
    assert_same(plain, found)
    assert found.accepted_tokens


@pytest.mark.usefixtures("cpu")
def test_text_stops_and_streams_alike() -> None:
    gpt = GPT.from_pretrained()
    prompt = "ROMEO:\nI will not go, I will not go, I will not"
    for options in ({}, {"do_sample": True, "seed": 4}, {"stop_strings": [" the", "\n"]}):
        options = {"max_new_tokens": 60, **options}
        plain, found = (gpt.generate_text(prompt, **options, **more) for more in ({}, {"speculate": 5}))
        assert [(c.text, c.finish_reason) for c in plain] == [(c.text, c.finish_reason) for c in found]
        assert list(gpt.stream(prompt, **options)) == list(gpt.stream(prompt, speculate=5, **options))


@pytest.mark.usefixtures("cpu")
def test_the_commands_take_it(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for more in ([], ["--speculate", "4"]):
        assert cli.run(["generate", "ROMEO:", "--seed", "1", "--max-new-tokens", "30", *more]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_greedy_is_plain_greedy_by_the_kernels() -> None:
    gpt = pair("one layer")[1]
    options: dict[str, Any] = {"max_new_tokens": 18, "eos_token_id": None, "pad_token_id": 0}
    ids = repetitive(1, 2, 6)
    plain, found = gpt.generate(ids, **options), gpt.generate(ids, speculate=2, **options)
    assert torch.equal(plain, found)


SAMPLED = {"do_sample": True, "seed": 3, "temperature": 0.6, "eos_token_id": [5, 6, 7, 8, 9]}


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    "options",
    [
        {},
        SAMPLED,
        SAMPLED | {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_new_tokens": 10},
        SAMPLED | {"top_k": 3, "top_p": 0.8, "output_logprobs": True},
        {"presence_penalty": 9.0, "output_logprobs": True},
        {"no_repeat_ngram_size": 2},
        {"max_new_tokens": 76},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_same_tokens_for_every_setting(batch: int, options: dict[str, Any]) -> None:
    for seed in range(3):
        assert_same(*both(repetitive(seed, batch), **options))


@pytest.mark.usefixtures("cpu")
def test_copies_of_a_prompt_draw_apart() -> None:
    plain, found = both(repetitive(1), **SAMPLED, num_return_sequences=4)
    assert_same(plain, found)
    assert len({tuple(row) for row in found.sequences.tolist()}) > 1


@pytest.mark.usefixtures("cpu")
def test_a_streamer_gets_the_same_steps() -> None:
    class Kept:
        def __init__(self) -> None:
            self.values: list[list[Any]] = []

        def put(self, value: torch.Tensor) -> None:
            self.values.append(value.tolist())

        def end(self) -> None:
            self.values.append([])

    plain, found = Kept(), Kept()
    for kept, more in ((plain, {}), (found, {"speculate": 4})):
        model().generate(
            repetitive(2, 3), max_new_tokens=NEW, pad_token_id=0, streamer=kept, **SAMPLED, **more
        )
    assert plain.values == found.values


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=pytest.mark.kernels)])
def test_rows_are_bitwise_the_plain_step_and_rejects_leave_no_trace(
    kernels: bool, device: torch.device
) -> None:
    where = device if kernels else torch.device("cpu")
    gpt = copy.deepcopy(pair("head dim 16, one head")[1]).to(where)
    kind: Any = GraphExecutor if kernels else CpuExecutor
    if not kernels and not _native.extension.has_decoder:
        pytest.skip("this processor has no AVX2")
    tokens = [[5, 9, 5, 9], [7], [3, 4]]
    with torch.inference_mode(), ops.backend("kernel" if kernels else "reference"):

        def cache() -> KVCache:
            made = KVCache.for_config(gpt.config, max_seqs=3, max_len=40, page_size=4, device=where)
            made.allocate(3)
            gpt(torch.tensor([[1, 2, 3]] * 3, device=where), cache=made)
            return made

        held = cache()
        executor = Executors(gpt, held, 64).decode
        assert type(executor) is kind
        counts, before = [len(ids) for ids in tokens], held.lengths
        flat = torch.tensor([token for ids in tokens for token in ids], device=where)
        held.reserve(counts)
        logits = executor.forward(Rows(held.sequences, counts, flat, counts))
        free = held.free_pages
        at = 0
        for row, ids in enumerate(tokens):
            plain = cache()
            step = kind(gpt, plain)
            for token in ids:
                given = torch.tensor([token if r == row else 8 for r in range(3)], device=where)
                assert torch.equal(step(given)[row], logits[at])
                at += 1
        for sequence, length, count in zip(held.sequences, before, [1, 1, 2], strict=True):
            held.truncate(sequence, length + count)
        assert held.lengths == [4, 4, 5]
        assert held.free_pages == free + 1
        again = executor(torch.tensor([6, 7, 8], device=where))
        plain = cache()
        step = kind(gpt, plain)
        step(torch.tensor([5, 7, 3]))
        assert torch.equal(step(torch.tensor([6, 7, 8]))[:2], again[:2])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"speculate": 0}, ValueError, "speculate is 0; 1 or more"),
        ({"speculate": 2.0}, TypeError, "speculate is 2.0; a whole number"),
        ({"speculate": True}, TypeError, "speculate is True"),
        ({"speculate": 96}, ValueError, "speculate is 96; less than the model's context of 96"),
        ({"speculate": 2, "num_beams": 2}, ValueError, "speculate with num_beams 2"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model().generate(repetitive(0), **options)
