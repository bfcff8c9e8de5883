"""Steering vectors: the model with them against hooks on its modules, and requests of an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import CONFIGS
from family_models import library_model, our_model

from gptkern import GPT, Engine, GPTConfig, Request, Tokenizer
from gptkern.engine.executors.choose import EXECUTORS, choose

IDS = torch.randint(67, (3, 11), generator=torch.Generator().manual_seed(1))


def small(model_type: str = "gpt2") -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 67, "n_positions": 96, "n_layer": 3, "n_head": 4, "n_embd": 48}
    activation = {"activation_function": "gelu_new", "initializer_range": 0.3, "eos_token_id": None}
    return GPT(GPTConfig(**shape, **activation, model_type=model_type, bos_token_id=None)).eval()


def models() -> dict[str, Any]:
    names = ("qwen3", "gpt_neox", "gptj", "olmo2", "gemma3, cap", "granite")
    families = {name: lambda name=name: our_model(library_model(CONFIGS[name])) for name in names}
    return {"gpt2": small, "openai-gpt": lambda: small("openai-gpt"), **families}


MODELS = models()


def vectors(model: GPT, *layers: int, seed: int = 0) -> dict[int, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(model.spec.width, generator=draw) for layer in layers}


@contextmanager
def hooked(model: GPT, steering: dict[int, torch.Tensor]) -> Iterator[None]:
    """The same additions by hooks before the modules that read the hidden states."""
    blocks, handles = model.transformer.h, []
    for layer, vector in steering.items():
        if layer < len(blocks):

            def before(_: Any, inputs: tuple[Any, ...], vector: torch.Tensor = vector) -> tuple[Any, ...]:
                return inputs[0] + vector, *inputs[1:]

            handles.append(blocks[layer].register_forward_pre_hook(before))
        else:
            assert model.transformer.ln_f is not None

            def whole(_: Any, inputs: tuple[Any, ...], vector: torch.Tensor = vector) -> torch.Tensor:
                return inputs[0] + vector

            handles.append(model.transformer.ln_f.register_forward_pre_hook(whole))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", MODELS)
def test_the_model_adds_what_hooks_would_add(name: str) -> None:
    model = MODELS[name]()
    last = len(model.spec.layers) - (name == "openai-gpt")
    steering = vectors(model, 0, 2, last)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    for given in (None, mask):
        with hooked(model, steering), torch.no_grad():
            expected = model(IDS, attention_mask=given).logits
        with torch.no_grad():
            plain = model(IDS, attention_mask=given).logits
            found = model(IDS, attention_mask=given, steering=steering)
        torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-4)
        assert (found.logits - plain).abs().max() > 0.1


def test_each_row_may_have_its_own_and_gradients_reach_it() -> None:
    model = MODELS["qwen3"]()
    rows = torch.randn(3, model.spec.width, requires_grad=True)
    mask = torch.ones_like(IDS)
    mask[2, 8:] = 0
    for given in (None, mask):
        found = model(IDS, attention_mask=given, steering={1: rows}).logits
        for row in range(3):
            end = 8 if row == 2 and given is not None else 11
            alone = model(IDS[row : row + 1, :end], steering={1: rows[row]}).logits
            torch.testing.assert_close(found[row, :end], alone[0], rtol=0, atol=1e-4)
        (gradient,) = torch.autograd.grad(found.square().sum(), rows)
        assert gradient.abs().amax(1).min() > 0
    states = model(IDS, hidden_states=[1, 2], stop_at_layer=2, steering={1: rows}).hidden_states
    plain = model(IDS, hidden_states=[1], stop_at_layer=2).hidden_states
    torch.testing.assert_close(states[1], plain[1] + rows[:, None], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({4: torch.zeros(48)}, "steering has layer 4; layers from 0 to 3"),
        ({-1: torch.zeros(48)}, "steering has layer -1"),
        ({1: torch.zeros(2, 48)}, r"steering of layer 1 is \(2, 48\); .* \(48,\) or \(3, 48\)"),
        ({1: [0.0] * 48}, "steering of layer 1 is list; a tensor of shape"),
    ],
)
def test_bad_vectors_are_refused_by_the_model(steering: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(IDS, steering=steering)


def run(engine: Engine, *requests: Request) -> list[list[tuple[int, float]]]:
    """(token, log-probability) of each request's first copy."""
    numbers = [engine.add(request) for request in requests]
    found: dict[int, list[tuple[int, float]]] = {number: [] for number in numbers}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None and event.token is not None and event.logprob is not None
            if event.copy == 0:
                found[event.request].append((event.token, event.logprob))
    return [found[number] for number in numbers]


def asked(steering: dict[int, torch.Tensor] | None, row: int = 0, new: int = 12, **options: Any) -> Request:
    prompt = IDS[row].repeat(7).tolist()
    return Request(prompt=prompt, options={"max_new_tokens": new, **options}, logprobs=0, steering=steering)


def greedy(model: GPT, request: Request, new: int = 12) -> list[tuple[int, float]]:
    """By whole passes of the hooked model."""
    ids = torch.tensor([request.prompt])
    found = []
    for _ in range(new):
        with hooked(model, dict(request.steering or {})), torch.no_grad():
            logprobs = model(ids).logits[0, -1].log_softmax(-1)
        token = int(logprobs.argmax())
        found.append((token, float(logprobs[token])))
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return found


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_requests_are_steered_each_by_its_own(name: str) -> None:
    model = MODELS[name]()
    requests = [
        asked(vectors(model, 1, 3)),
        asked(None),
        asked(vectors(model, 1, 3, seed=2)),
        asked(vectors(model, 0), row=1),
        asked({2: -vectors(model, 2)[2]}),
    ]
    engine = Engine(model, steering=True, page_size=8, prefill_chunk=16, max_seqs=3)
    together = run(engine, *requests)
    # The prompts are in the prefix cache by now, steered in one way and another.
    again = run(engine, *reversed(requests))[::-1]
    assert again == together
    assert engine.load.prefix_hits > 0
    for request, tokens in zip(requests, together, strict=True):
        assert run(Engine(model, steering=True, prefix_cache=False), request) == [tokens]
        expected = greedy(model, request)
        assert [token for token, _ in tokens] == [token for token, _ in expected]
        for (_, mine), (_, wanted) in zip(tokens, expected, strict=True):
            assert mine == pytest.approx(wanted, abs=1e-4)
    assert len({tuple(tokens) for tokens in together}) == 5


def test_copies_beams_and_the_prompts_own_tokens_are_steered() -> None:
    model = small()
    steering = vectors(model, 2)
    engine = Engine(model, steering=True)
    request = asked(steering, num_return_sequences=3, do_sample=True, seed=4)
    assert run(engine, request) == run(Engine(model, steering=True), request)
    beams = Request(prompt=IDS[0].tolist(), options={"num_beams": 3, "max_new_tokens": 6}, steering=steering)
    engine.add(beams)
    found = [event.token for _ in range(30) for event in engine.step()]
    with hooked(model, steering):
        expected = model.generate(IDS[:1], num_beams=3, max_new_tokens=6)[0, 11:].tolist()
    assert found == expected
    prompt, options = IDS[0].tolist(), {"max_new_tokens": 1}
    engine.add(Request(prompt=prompt, options=options, prompt_logprobs=0, steering=steering))
    (event,) = engine.step()
    with hooked(model, steering), torch.no_grad():
        logprobs = model(IDS[:1]).logits[0, :-1].log_softmax(-1)
    wanted = logprobs.gather(1, IDS[0, 1:, None])[:, 0]
    assert event.prompt_logprobs is not None
    own = torch.tensor([logprob for logprob, _ in event.prompt_logprobs])
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-4)


def test_generate_steers_all_rows_or_each_by_its_own() -> None:
    model = small()
    whole, own = vectors(model, 1, 3), torch.stack([vectors(model, 2, seed=s)[2] for s in range(3)])
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    options = {"max_new_tokens": 8, "pad_token_id": 0, "return_dict_in_generate": True}
    together = model.generate(IDS, mask, steering={**whole, 2: own}, output_logprobs=True, **options)
    for row in range(3):
        prompt = IDS[row][mask[row].bool()].tolist()
        request = Request(prompt=prompt, steering={**whole, 2: own[row]})
        expected = greedy(model, request, new=8)
        assert together.sequences[row, 11:].tolist() == [token for token, _ in expected]
        for mine, (_, wanted) in zip(together.logprobs[row].tolist(), expected, strict=True):
            assert mine == pytest.approx(wanted, abs=1e-4)
    plain = model.generate(IDS, mask, output_logprobs=True, **options)
    assert not torch.equal(plain.sequences, together.sequences)
    # The engine of a steered call is not taken for a call without vectors, nor the other way round.
    assert torch.equal(model.generate(IDS, mask, steering={}, **options).sequences, plain.sequences)
    again = model.generate(IDS, mask, steering={**whole, 2: own}, **options)
    assert torch.equal(again.sequences, together.sequences)


def test_texts_streams_copies_and_beams_are_steered() -> None:
    torch.manual_seed(0)
    shape = {"n_positions": 96, "n_layer": 3, "n_head": 4, "n_embd": 48, "initializer_range": 0.3}
    model = GPT(GPTConfig(vocab_size=257, eos_token_id=None, bos_token_id=None, **shape)).eval()
    model.tokenizer = Tokenizer.bytes()
    steering, draw = vectors(model, 2), {"do_sample": True, "seed": 3, "max_new_tokens": 10}
    two = torch.stack([steering[2], -steering[2]])
    texts = model.generate_text(["ab", "cd"], steering={2: two}, **draw)
    for completion, prompt, sign in zip(texts, ("ab", "cd"), (1, -1), strict=True):
        own = {2: sign * steering[2]}
        (alone,) = model.generate_text(prompt, steering=own, **draw)
        assert alone == completion
        stream = model.stream(prompt, steering=own, **draw)
        assert "".join(stream) == completion.text
        assert completion != model.generate_text(prompt, **draw)[0]
    ids = torch.tensor([[97, 98]])
    copies = model.generate(ids, steering=steering, num_return_sequences=2, **draw)
    assert copies[0, 2:].tolist() == texts[0].token_ids and not torch.equal(copies[0], copies[1])
    beams = {"num_beams": 3, "max_new_tokens": 6}
    with hooked(model, steering):
        expected = model.generate(ids, **beams)
    assert torch.equal(model.generate(ids, steering=steering, **beams), expected)


@pytest.mark.parametrize(
    ("steering", "error", "message"),
    [
        ([torch.zeros(48)], TypeError, "generate: steering is list; a mapping"),
        ({"1": torch.zeros(48)}, TypeError, "generate: steering's layer is '1'; a whole number"),
        ({1: [0.0] * 48}, TypeError, "generate: steering of layer 1 is list; a tensor of floats"),
        ({1: torch.zeros(2, 48)}, ValueError, "layer 1 has 2 rows; one for each of 3 prompts"),
        ({1: torch.zeros(3, 47)}, ValueError, r"layer 1 has shape \(47,\); the model's width, \(48,\)"),
        ({1: torch.zeros(1, 3, 48)}, ValueError, r"layer 1 has shape \(1, 3, 48\)"),
        ({4: torch.zeros(48)}, ValueError, "generate: steering of layer 4; layers from 0 to 3"),
        ({1: torch.full((3, 48), torch.nan)}, ValueError, "layer 1 is not finite"),
    ],
)
def test_bad_vectors_are_refused_by_generate(steering: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small().generate(IDS, steering=steering, pad_token_id=0)


def test_the_callers_vectors_may_change_afterwards() -> None:
    model = small()
    steering = vectors(model, 1)
    expected = run(Engine(model, steering=True), asked(steering))
    engine = Engine(model, steering=True)
    request = asked(steering)
    number = engine.add(request)
    steering[1].zero_()
    tokens = []
    while engine.has_work:
        tokens += [(e.token, e.logprob) for e in engine.step() if e.request == number]
    assert [tokens] == expected


def test_executors_without_layers_are_passed_over_by_name() -> None:
    model = small()
    kind, passed = choose(model, torch.float32, steering=True)
    assert kind is EXECUTORS[-1]
    assert [other.executor for other in passed] == list(EXECUTORS[:-1])
    for other in passed:
        assert "steering vectors are added between the model's layers" in other.reason
        assert not other.is_fallback
    assert Engine(model, steering=True).executors.decode.name == "torch"


@pytest.mark.parametrize(
    ("steering", "error", "message"),
    [
        (
            {1: torch.zeros(47)},
            ValueError,
            r"layer 1 has shape \(47,\); the model's width, \(48,\)",
        ),
        ({4: torch.zeros(48)}, ValueError, "steering of layer 4; layers from 0 to 3 are needed"),
        ({1: torch.zeros(48, dtype=torch.int64)}, TypeError, "layer 1 is torch.int64; a tensor of floats"),
        ({1: [0.0] * 48}, TypeError, "layer 1 is list; a tensor of floats"),
        ({1: torch.full((48,), torch.inf)}, ValueError, "layer 1 is not finite"),
        ({"1": torch.zeros(48)}, TypeError, "steering's layer is '1'; a whole number"),
        ([torch.zeros(48)], TypeError, "steering is list; a mapping"),
    ],
)
def test_bad_requests_are_refused(steering: Any, error: type[Exception], message: str) -> None:
    engine = Engine(small(), steering=True)
    with pytest.raises(error, match=message):
        engine.add(Request(prompt=[1, 2], steering=steering))
    assert not engine.has_work


def test_an_engine_that_is_not_made_for_them_says_so() -> None:
    engine = Engine(small())
    with pytest.raises(ValueError, match=r"made for the cpu executor: make it with Engine\(steering=True\)"):
        engine.add(Request(prompt=[1, 2], steering={1: torch.zeros(48)}))
    with pytest.raises(TypeError, match="steering is 1; True or False"):
        Engine(small(), steering=1)  # type: ignore[arg-type]
