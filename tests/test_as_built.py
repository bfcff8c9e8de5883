"""A GPT whose modules are hooked, replaced or changed: generate calls them, in every pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize

import gptkern
from gptkern import environment
from gptkern.as_built import Watch
from gptkern.config import GPTConfig
from gptkern.engine.executors.changes import changed
from gptkern.gpt import GPT
from gptkern.model.layers import MLP, Block
from gptkern.train.objective import LanguageModelling, hidden_states

NEW = 6
PROMPT = torch.tensor([[5, 9, 33, 12, 7]])
WAVE = 5 * torch.arange(32.0).sin()
CONFIG = GPTConfig(
    n_layer=2,
    n_head=4,
    n_embd=32,
    vocab_size=61,
    n_positions=48,
    bos_token_id=None,
    eos_token_id=None,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    initializer_range=0.4,
)
LAYERS = (
    "transformer.wte",
    "transformer.wpe",
    "transformer.h.1.ln_1",
    "transformer.h.0.ln_1",
    "transformer.h.1.attn.c_attn",
    "transformer.h.1.attn.c_proj",
    "transformer.h.1.ln_2",
    "transformer.h.1.mlp.c_fc",
    "transformer.h.1.mlp.c_proj",
    "transformer.h.1.mlp",
    "transformer.ln_f",
)
CALLED = (*LAYERS, "", "transformer", "transformer.h.1", "transformer.h.1.attn", "lm_head")


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings that were given before do not count."""
    monkeypatch.setattr(environment, "_past_warnings", set())


def model_of(**changes: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG.replace(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def plain(model: GPT) -> torch.Tensor:
    """Log-probabilities of ``NEW`` greedy tokens and the tokens: a pass over the whole sequence for each."""
    ids, scores = PROMPT, []
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(ids).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            scores.append(logits.log_softmax(-1).max())
    return torch.cat([torch.stack(scores), ids[0, PROMPT.shape[1] :].float()])


def generated(model: GPT, **options: Any) -> torch.Tensor:
    """The same by ``generate``."""
    options |= {"output_logprobs": True, "return_dict_in_generate": True}
    out = model.generate(PROMPT, **{"max_new_tokens": NEW} | options)
    assert not isinstance(out, torch.Tensor) and out.logprobs is not None
    return torch.cat([out.logprobs[0], out.sequences[0, PROMPT.shape[1] :].float()])


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("post_norm", [False, True], ids=["gpt2", "gpt1"])
@pytest.mark.parametrize("name", CALLED)
def test_every_hook_is_called_in_every_pass(name: str, post_norm: bool) -> None:
    model = model_of(model_type="openai-gpt") if post_norm else model_of()
    if post_norm and name == "transformer.ln_f":
        return
    calls = []
    handle = model.get_submodule(name).register_forward_hook(lambda *a: calls.append(a))
    with pytest.warns(gptkern.FallbackWarning, match=f"{name or 'the model'} is hooked"):
        generated(model)
    assert len(calls) == NEW
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generated(model)
    assert len(calls) == NEW


@pytest.mark.filterwarnings("ignore::gptkern.FallbackWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_what_a_hook_returns_is_taken(name: str) -> None:
    model = model_of()
    before = plain(model)
    module = model.get_submodule(name)
    width = 128 if name.endswith("c_fc") else 96 if name.endswith("c_attn") else 32
    module.register_forward_hook(lambda m, args, out: out + 3 * torch.arange(float(width)).sin())
    expected = plain(model)
    assert not same(expected, before)
    assert same(generated(model), expected)
    assert same(generated(model, speculate=3), expected)


def relu_in_place_of_the_perceptron(model: GPT) -> None:
    model.transformer.h[1].mlp = nn.Sequential(nn.Linear(32, 32), nn.ReLU())


def forward_of_its_own(model: GPT) -> None:
    block, own = model.transformer.h[0].mlp, MLP.forward
    block.forward = lambda x: own(block, x) + WAVE  # type: ignore[method-assign]


def forward_of_the_model(model: GPT) -> None:
    own = model.forward

    def negated(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = -output.logits
        return output

    model.forward = negated  # type: ignore[method-assign]


def library_norm(model: GPT) -> None:
    model.transformer.h[1].ln_2 = nn.RMSNorm(32)


def another_eps(model: GPT) -> None:
    for name in ("h.0.ln_1", "h.1.ln_2", "ln_f"):
        model.transformer.get_submodule(name).eps = 2.0


def another_scale(model: GPT) -> None:
    model.transformer.h[1].attn.scale = 3.0


def another_activation(model: GPT) -> None:
    model.transformer.h[1].mlp.activation = "relu"


def a_weight_norm(model: GPT) -> None:
    layer = parametrizations.weight_norm(model.transformer.h[1].mlp.c_fc)
    layer.parametrizations.weight.original0.data.mul_(-2)


def a_parametrisation(model: GPT) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    parametrize.register_parametrization(model.transformer.h[1].attn.c_attn, "weight", Doubled())


def fewer_blocks(model: GPT) -> None:
    model.transformer.h = model.transformer.h[:1]


def blocks_in_another_order(model: GPT) -> None:
    model.transformer.h = nn.ModuleList(reversed(model.transformer.h))


def a_bias_of_the_head(model: GPT) -> None:
    model.lm_head.bias = nn.Parameter(torch.arange(61.0).sin() * 20)


def a_frozen_hook_of_all_modules(model: GPT) -> None:
    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return out + WAVE if isinstance(module, MLP) else None

    handle = register_module_forward_hook(hook)
    model._handle = handle


def a_pre_hook_with_keywords(model: GPT) -> None:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0] + WAVE, *args[1:]), kwargs

    model.transformer.h[1].register_forward_pre_hook(hook, with_kwargs=True)


CHANGES: list[Callable[[GPT], None]] = [
    relu_in_place_of_the_perceptron,
    forward_of_its_own,
    forward_of_the_model,
    library_norm,
    another_eps,
    another_scale,
    another_activation,
    a_weight_norm,
    a_parametrisation,
    fewer_blocks,
    blocks_in_another_order,
    a_bias_of_the_head,
    a_frozen_hook_of_all_modules,
    a_pre_hook_with_keywords,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_generates_by_its_own_layers(
    change: Callable[[GPT], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    before = plain(model)
    try:
        change(model)
        expected = plain(model)
        assert not same(expected, before)
        with pytest.warns(gptkern.FallbackWarning, match="decoding runs on the model's layers"):
            assert same(generated(model), expected)
        assert same(generated(model, speculate=3), expected)
        decode = gptkern.explain(model)[-1]
        assert (decode.part, decode.route) == ("decode", "fallback")
        monkeypatch.setenv("GPTKERN_STRICT", "1")
        with pytest.raises(RuntimeError, match="GPTKERN_STRICT=1"):
            generated(model)
    finally:
        if hasattr(model, "_handle"):
            model._handle.remove()


@pytest.mark.filterwarnings("ignore::gptkern.FallbackWarning")
def test_a_class_that_was_given_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    before, own = plain(model), Block.forward

    def louder(self: Block, *args: Any) -> Any:
        x, residual = own(self, *args)
        return x + WAVE, residual

    monkeypatch.setattr(Block, "forward", louder)
    expected = plain(model)
    assert not same(expected, before)
    assert same(generated(model), expected)


@pytest.mark.filterwarnings("ignore::gptkern.FallbackWarning")
def test_a_subclass_with_a_forward_of_its_own() -> None:
    class Mine(GPT):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = -output.logits
            return output

    model, mine = model_of(), Mine(CONFIG).eval()
    mine.load_state_dict(model.state_dict())
    assert same(generated(mine), plain(mine))
    assert not same(plain(mine), plain(model))


def test_what_changes_between_pieces_of_a_stream_counts_from_there_on() -> None:
    def pieces(change: bool, model: GPT, **options: Any) -> list[int]:
        found: list[int] = []

        class Streamer:
            def put(self, value: torch.Tensor) -> None:
                found.extend(value.flatten().tolist())
                if change and len(found) == PROMPT.shape[1] + 2:
                    model.transformer.h[1].register_forward_hook(lambda m, a, out: (out[0] + WAVE, out[1]))

            def end(self) -> None: ...

        model.generate(PROMPT, max_new_tokens=NEW, streamer=Streamer(), **options)
        return found[PROMPT.shape[1] :]

    model = model_of()
    untouched = pieces(False, model)
    with pytest.warns(gptkern.FallbackWarning, match=r"transformer\.h\.1 is hooked"):
        found = pieces(True, model)
    # The two tokens before; the cache's keys and values of them are those of the model as it was.
    assert found[:2] == untouched[:2]
    assert found[2:] != untouched[2:]
    again = model_of()
    with pytest.raises(RuntimeError, match="since generation with speculate began"):
        pieces(True, again, speculate=2)


@pytest.mark.filterwarnings("ignore:.*ackward hook")
def test_training_calls_the_hooks_of_fused_layers() -> None:
    model = model_of().train()
    expected = model(PROMPT, labels=PROMPT).loss
    calls: list[str] = []
    for name in CALLED:
        model.get_submodule(name).register_full_backward_hook(lambda *a, n=name: calls.append(n))
    loss = model(PROMPT, labels=PROMPT).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    # The model's own output is a dataclass, whose tensors PyTorch's backward hooks do not see.
    assert set(calls) >= set(CALLED) - {"", "transformer.h.1", "transformer.wte", "transformer.wpe"}


def test_a_hooked_head_is_called_in_training() -> None:
    objective = LanguageModelling(model_of(), z_loss=1e-3, label_smoothing=0.1).train()
    targets = torch.tensor([[9, 33, -100, 7, 1]])
    fused = objective(PROMPT, targets)
    calls = []
    handle = objective.model.lm_head.register_forward_hook(lambda *a: calls.append(1))
    torch.testing.assert_close(objective(PROMPT, targets), fused)
    assert calls
    handle.remove()
    objective.model.lm_head.register_forward_hook(lambda m, a, out: 2 * out)
    logits = 2 * objective.model.lm_head.forward(hidden_states(objective.model, PROMPT))[0]
    expected = F.cross_entropy(logits, targets[0], reduction="sum", label_smoothing=0.1)
    expected = expected + 1e-3 * logits[targets[0] >= 0].logsumexp(-1).square().sum()
    torch.testing.assert_close(objective(PROMPT, targets), expected)


def test_explain_of_a_model_as_built() -> None:
    model = model_of()
    assert [(r.part, r.route) for r in gptkern.explain(model)] == [
        ("norm", "reference"),
        ("mlp", "reference"),
        ("decode by persistent", "passed over"),
        ("decode by graph", "passed over"),
        ("decode", "engine"),
    ]
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *a: None)
    routes = {route.part: route.route for route in gptkern.explain(model)}
    assert (routes["norm"], routes["mlp"], routes["decode"]) == ("reference", "fallback", "fallback")
    assert routes["decode by cpu"] == "passed over"
    assert "transformer.h.0.mlp.c_fc is hooked" in str(gptkern.explain(model))
    with pytest.raises(TypeError, match="model is Linear; a GPT or a transformers model is needed"):
        gptkern.explain(nn.Linear(1, 1))


def test_the_check_costs_little_and_sees_only_changes() -> None:
    model = model_of()
    assert changed(model) is None
    watch = Watch(model)
    generated(model)
    assert not watch.stirred()
    model.transformer.h[0].mlp = MLP(CONFIG.spec)
    assert watch.stirred() and not watch.stirred()
    assert changed(model) is None
    model.config = CONFIG.replace(layer_norm_epsilon=0.5)
    assert changed(model) == "transformer.h.0.ln_1 has eps 1e-05, where the config gives 0.5"


@pytest.mark.parametrize("place", ["ln_f", "ln_1", "ln_2"])
def test_a_fresh_module_in_a_norms_place_brings_no_dropout(place: str) -> None:
    """A new module is in training mode; dropout is the model's to decide."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    owner = model.transformer if place == "ln_f" else model.transformer.h[1]
    setattr(owner, place, torch.nn.Identity())
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
