"""generate of an accelerated model: the tokens, types and fields of the library's, before and after."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache

import gptkern
from gptkern.transformers import FallbackWarning
from gptkern.transformers.view import view as view_of

VOCAB = 61


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that leaves the engine fails."""
    monkeypatch.setenv("GPTKERN_STRICT", "1")


def build(kind: str = "gpt2", **changes: Any) -> Any:
    shape = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    if kind == "gpt1":
        config = transformers.OpenAIGPTConfig(**(shape | changes))
        model = transformers.OpenAIGPTLMHeadModel(config)
    else:
        config = transformers.GPT2Config(**(shape | {"bos_token_id": 60, "eos_token_id": 60} | changes))
        model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def prompt(batch: int, seq: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCAB - 1, (batch, seq))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            mask[row, : random.randrange(seq - 1)] = 0
    return ids, mask


def twins(kind: str = "gpt2", **changes: Any) -> tuple[Any, Any]:
    model = build(kind, **changes)
    return model, gptkern.accelerate(copy.deepcopy(model))


def both(pair: tuple[Any, Any], *args: Any, **options: Any) -> tuple[Any, Any]:
    found = []
    for model in pair:
        torch.manual_seed(11)
        found.append(model.generate(*args, **{"pad_token_id": 59} | options))
    return found[0], found[1]


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "penalties": {
        "do_sample": False,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[3], [4, 5]],
        "suppress_tokens": [7],
        "min_new_tokens": 4,
        "forced_eos_token_id": 60,
    },
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "num_return_sequences": 3},
    "warpers": {
        "do_sample": True,
        "typical_p": 0.8,
        "min_p": 0.01,
        "epsilon_cutoff": 1e-4,
        "eta_cutoff": 1e-4,
    },
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7},
    "beam sampling": {"do_sample": True, "num_beams": 3, "early_stopping": True},
}


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_scores_and_cache_are_the_librarys(mode: str, padded: bool) -> None:
    pair = twins()
    ids, mask = prompt(2, 7, padded)
    theirs, ours = both(
        pair,
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **MODES[mode],
    )
    assert type(ours) is type(theirs)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(theirs[name])
        for a, b in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    if "beams" in mode:
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=1e-4, rtol=1e-4)
    assert type(ours.past_key_values) is DynamicCache
    copies = ours.sequences.shape[0] // 2 if "beam" not in mode else MODES[mode]["num_beams"]
    real = mask.repeat_interleave(copies, 0).bool()
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    for a, b in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        for found, expected in ((a.keys, b.keys), (a.values, b.values)):
            length = real.shape[1]
            rows = [t[:, :, :length].transpose(1, 2)[real] for t in (found, expected)]
            torch.testing.assert_close(*rows, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found[:, :, length:], expected[:, :, length:], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
def test_the_gpt_of_2018(mode: str) -> None:
    ids, _ = prompt(2, 6, False)
    theirs, ours = both(twins("gpt1"), ids, max_new_tokens=10, **MODES[mode])
    assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt1"])
def test_ids_of_any_integer_dtype(kind: str, mode: str, dtype: torch.dtype) -> None:
    """The library takes int32 beside int64, and returns int64."""
    theirs, ours = twins(kind)
    ids, _ = prompt(2, 6, False)
    options = MODES[mode] | {"max_new_tokens": 6, "pad_token_id": 59, "repetition_penalty": 1.2}
    torch.manual_seed(11)
    expected = theirs.generate(ids, **options)
    torch.manual_seed(11)
    found = ours.generate(ids.to(dtype), **options)
    assert torch.equal(found, expected)
    if dtype == torch.int32:
        assert found.dtype == theirs.generate(ids.to(dtype), max_new_tokens=2).dtype


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("padded", [False, True])
def test_going_on_from_a_cache(cache: type, padded: bool) -> None:
    pair = twins()
    ids, mask = prompt(2, 8, padded)
    results = []
    for model in pair:
        past = cache(config=model.config, **({} if cache is DynamicCache else {"max_cache_len": 40}))
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 59}
        if cache is StaticCache:
            options |= {"disable_compile": True}
        first = model.generate(ids, attention_mask=mask, past_key_values=past, **options)
        assert int(past.get_seq_length()) == first.shape[1] - 1
        more = torch.cat([first, first[:, :3]], 1)
        longer = torch.cat([mask, mask.new_ones(2, 8)], 1)
        if cache is DynamicCache:
            first = model.generate(more, attention_mask=longer, past_key_values=past, **options)
            assert past.get_seq_length() == first.shape[1] - 1
        results.append(first)
    assert torch.equal(*results)


class RecordingStreamer:
    """A streamer that records the values of ``put`` as lists, and "end"."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


@pytest.mark.usefixtures("strict")
def test_streamers_stopping_criteria_and_eos_lists() -> None:
    pair, (ids, _) = twins(), prompt(1, 5, False)
    streams = []
    for model in pair:
        streamer, lengths = RecordingStreamer(), []

        def stop(
            tokens: torch.Tensor, scores: Any, lengths: list[int] = lengths, **kwargs: Any
        ) -> torch.Tensor:
            lengths.append(tokens.shape[1])
            return torch.full((tokens.shape[0],), tokens.shape[1] >= 12)

        options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
        model.generate(ids, streamer=streamer, stopping_criteria=[stop], **options)
        streams.append((streamer.seen, lengths))
    assert streams[0] == streams[1]
    assert streams[1][1][-1] == 12
    eos = streams[0][0][4]
    theirs, ours = both(pair, ids, do_sample=False, max_new_tokens=20, eos_token_id=[58, *eos], max_time=60.0)
    assert torch.equal(theirs, ours)
    assert ours.shape[1] < 12


FALLBACKS: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "attentions": {"return_dict_in_generate": True, "output_hidden_states": True},
    "token types": {"token_type_ids": torch.zeros(1, 7, dtype=torch.long)},
    "embeddings": {"inputs_embeds": torch.zeros(1, 7, 32)},
    "positions": {"position_ids": torch.arange(7)[None] + 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.filterwarnings("ignore::gptkern.transformers.FallbackWarning")
@pytest.mark.parametrize("case", FALLBACKS)
def test_what_the_engine_leaves_to_the_library(case: str) -> None:
    ids, _ = prompt(1, 7, False)
    theirs, ours = both(twins(), ids, max_new_tokens=8, do_sample=False, **FALLBACKS[case])
    if not isinstance(ours, torch.Tensor):
        theirs, ours = theirs.sequences, ours.sequences
    assert torch.equal(theirs, ours)


def test_training_mode_keeps_its_dropout() -> None:
    ids, _ = prompt(1, 5, False)
    pair = twins()
    for model in pair:
        model.train()
    with pytest.warns(FallbackWarning, match="training mode") if _untold() else warnings.catch_warnings():
        theirs, ours = both(pair, ids, max_new_tokens=6, do_sample=False)
    assert ours.shape == theirs.shape


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["gpt2", "gpt1"])
def test_the_kernels_decode_from_the_librarys_own_weights(kind: str, device: torch.device) -> None:
    plain, ours = (model.to(device) for model in twins(kind, n_layer=1))
    weight, before = ours.transformer.h[0].attn.c_attn.weight, plain.transformer.h[0].attn.c_attn.weight
    ids, mask = (value.to(device) for value in prompt(2, 5, padded=kind == "gpt2"))
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with gptkern.backend("reference"):
        expected = plain.generate(ids, **options)
    assert torch.equal(ours.generate(ids, **options), expected)
    assert ours.transformer.h[0].attn.c_attn.weight is weight
    assert torch.equal(weight, before) and weight.t().is_contiguous()


@pytest.mark.parametrize("kind", ["gpt2", "gpt1"])
def test_matrices_lie_as_the_engine_reads_them_until_restore(kind: str) -> None:
    """The tokens are those of ``GPT.generate`` on rows of (out, in): in bf16 the order of sums shows."""
    _, ours = twins(kind)
    ours.to(torch.bfloat16)
    ids, _ = prompt(2, 5, False)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    before = {name: (p, p.clone(), p.shape) for name, p in ours.named_parameters()}
    found = ours.generate(ids, **options)
    matrices = [p for block in ours.transformer.h for p in block.parameters() if p.dim() == 2]
    assert len(matrices) == 4 * len(ours.transformer.h)
    assert all(p.t().is_contiguous() for p in matrices)
    rows = copy.deepcopy(view_of(ours))
    assert all(p.is_contiguous() for p in rows.parameters())
    assert torch.equal(found, rows.generate(ids, **options))
    gptkern.restore(ours)
    for name, parameter in ours.named_parameters():
        same, value, shape = before[name]
        assert parameter is same and parameter.shape == shape and torch.equal(parameter, value)
        assert parameter.is_contiguous()


def test_matrices_shared_with_other_processes_stay_where_they_are() -> None:
    theirs, ours = twins()
    ours.share_memory()
    places = [p.data_ptr() for p in ours.parameters()]
    ids, _ = prompt(1, 6, False)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    assert [p.data_ptr() for p in ours.parameters()] == places
    assert all(p.is_shared() for p in ours.parameters())


def _untold() -> bool:
    from gptkern import environment

    return not any("training mode" in reason for _, reason in environment._past_warnings)


@pytest.mark.usefixtures("strict")
def test_an_optimizer_step_is_seen_and_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = twins()
    ids, _ = prompt(1, 6, False)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first = ours.generate(ids, **options)
    view = view_of(ours)
    shared = {p.data_ptr() for p in ours.parameters()}
    assert {p.data_ptr() for p in view.parameters()} == shared
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert view_of(ours) is view
    second = ours.generate(ids, **options)
    assert torch.equal(second, theirs.generate(ids, **options))
    assert not torch.equal(first, second)
    monkeypatch.delenv("GPTKERN_STRICT")  # no decode step of the CPU's takes float64
    ours.to(torch.float64)
    assert torch.equal(ours.generate(ids, **options), theirs.to(torch.float64).generate(ids, **options))
    assert view_of(ours).dtype == torch.float64


def random_case(seed: int) -> tuple[tuple[Any, Any], torch.Tensor, dict[str, Any]]:
    """A config, a prompt and generation options, drawn from ``seed``."""
    draw = random.Random(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    heads = draw.choice([1, 2, 4])
    pair = twins(
        n_embd=heads * draw.choice([8, 16]),
        n_layer=draw.randint(1, 3),
        n_head=heads,
        n_inner=draw.choice([None, 24]),
        activation_function=draw.choice(["gelu_new", "gelu", "relu", "silu"]),
        scale_attn_weights=draw.random() < 0.8,
        scale_attn_by_inverse_layer_idx=draw.random() < 0.3,
        tie_word_embeddings=draw.random() < 0.7,
    )
    ids, mask = prompt(draw.randint(1, 3), draw.randint(2, 9), draw.random() < 0.5)
    options: dict[str, Any] = dict(MODES[draw.choice(list(MODES))])
    options |= {"attention_mask": mask, "max_new_tokens": draw.randint(1, 20)}
    if draw.random() < 0.3:
        options["eos_token_id"] = draw.sample(range(VOCAB), 3)
    if draw.random() < 0.3:
        options["repetition_penalty"] = draw.uniform(0.7, 1.6)
    extra = draw.choice(["none", "none", "static", "token types", "embeddings", "chunks", "lookup"])
    if extra == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    elif extra == "token types":
        options["token_type_ids"] = ids % 2
    elif extra == "embeddings" and options.get("num_beams", 1) == 1:
        options["inputs_embeds"] = pair[0].transformer.wte(ids).detach()
    elif extra == "chunks":
        options["prefill_chunk_size"] = 3
    elif extra == "lookup" and "num_beams" not in options and "num_return_sequences" not in options:
        ids, options["attention_mask"] = ids[:1], torch.ones_like(ids[:1])
        options["prompt_lookup_num_tokens"] = 2
    return pair, ids, options


def check_random_case(seed: int) -> None:
    pair, ids, options = random_case(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = both(pair, ids, **options)
    assert torch.equal(theirs, ours), (seed, options)


@pytest.mark.parametrize("seed", range(16))
def test_random_configs_and_options(seed: int) -> None:
    check_random_case(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16, 216))
def test_two_hundred_random_configs_and_options(seed: int) -> None:
    check_random_case(seed)
