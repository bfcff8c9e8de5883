"""An accelerated model that is hooked, changed or overridden computes what the library computes with it."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize

transformers = pytest.importorskip("transformers")
from test_transformers_generate import build
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.pytorch_utils import Conv1D

import gptkern
from gptkern import environment
from gptkern.transformers import refusals

IDS = torch.tensor([[5, 9, 33, 12, 7]])
WAVE = 3 * torch.arange(32.0).sin()
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 59, "eos_token_id": None}
SCORES = {"return_dict_in_generate": True, "output_logits": True}
BLOCK = "transformer.h.1"
HOOKED = ("", "transformer", "transformer.wte", "transformer.wpe", "transformer.drop", "lm_head", BLOCK)
INNER = ("ln_1", "attn", "attn.c_attn", "attn.c_proj", "attn.resid_dropout", "ln_2", "mlp")
INNER += ("mlp.c_fc", "mlp.act", "mlp.c_proj", "mlp.dropout")
PLACES = (*HOOKED, *(f"{BLOCK}.{name}" for name in INNER), "transformer.ln_f")
GPT1_PLACES = [p.replace("wte", "tokens_embed").replace("wpe", "positions_embed") for p in PLACES[:-1]]

pytestmark = pytest.mark.filterwarnings("ignore::gptkern.FallbackWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings that were given before do not count."""
    monkeypatch.setattr(environment, "_past_warnings", set())


def logits(model: Any) -> torch.Tensor:
    """Logits of every token that ``generate`` makes, and of a forward pass."""
    with torch.no_grad():
        made = model.generate(IDS, **GREEDY, **SCORES)
        return torch.cat([*made.logits, model(IDS).logits[0]])


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, atol=2e-4, rtol=1e-4)


def check(change: Callable[[Any], Any], kind: str = "gpt2", *, has_effect: bool = True) -> None:
    """The same change before acceleration, after it and without it gives the same logits and tokens."""
    plain = build(kind)
    before, after = gptkern.accelerate(copy.deepcopy(plain)), gptkern.accelerate(copy.deepcopy(plain))
    unchanged = logits(plain)
    gptkern.restore(before)
    handles = [change(before), change(after), change(plain)]
    gptkern.accelerate(before)
    try:
        expected = logits(plain)
        assert has_effect != close(expected, unchanged)
        for model in (before, after):
            assert close(logits(model), expected)
            assert torch.equal(model.generate(IDS, **GREEDY), plain.generate(IDS, **GREEDY))
            route = gptkern.explain(model)[-1]
            assert (route.part, route.route) == ("generate", "fallback"), route
    finally:
        for handle in handles:
            if hasattr(handle, "remove"):
                handle.remove()


@pytest.mark.parametrize(
    ("kind", "name"), [*(("gpt2", n) for n in PLACES), *(("gpt1", n) for n in GPT1_PLACES)]
)
def test_every_hook_is_called_as_the_library_calls_it(kind: str, name: str) -> None:
    """Of every pass of ``generate`` and of ``forward``."""
    theirs = build(kind)
    ours = gptkern.accelerate(copy.deepcopy(theirs))
    calls: list[list[Any]] = [[], []]
    for model, seen in zip((theirs, ours), calls, strict=True):
        module = model.get_submodule(name)
        after = module.register_forward_hook(
            lambda m, a, k, o, seen=seen: seen.append("after"), with_kwargs=True
        )
        before = module.register_forward_pre_hook(lambda m, a, seen=seen: seen.append("before"))
        with torch.no_grad():
            model.generate(IDS, **GREEDY)
            model(IDS)
        # All models of the GPT of 2018 share the library's one activation module.
        after.remove()
        before.remove()
    assert calls[0]
    assert calls[1] == calls[0]


def hook(name: str) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        def louder(module: Any, args: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return (out[0] + WAVE, *out[1:])
            return out + 3 * torch.arange(float(out.shape[-1])).sin()

        return model.get_submodule(name).register_forward_hook(louder)

    return change


@pytest.mark.parametrize(
    "name", [f"{BLOCK}{part}" for part in ("", ".attn", ".mlp", ".mlp.act", ".mlp.dropout")]
)
def test_what_a_hook_returns_is_taken(name: str) -> None:
    check(hook(name))


def relu(model: Any) -> None:
    for block in model.transformer.h:
        block.mlp.act = nn.ReLU()


def scaling(model: Any) -> None:
    model.transformer.h[1].attn.scaling = 3.0


def eps(model: Any) -> None:
    for name in ("h.0.ln_1", "h.1.ln_2", "ln_f"):
        model.transformer.get_submodule(name).eps = 2.0


def rms(model: Any) -> None:
    model.transformer.h[1].ln_2 = nn.RMSNorm(32)


def perceptron(model: Any) -> None:
    model.transformer.h[0].mlp = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU())
    nn.init.eye_(model.transformer.h[0].mlp[0].weight)


def forward_of_a_layer(model: Any) -> None:
    layer = model.transformer.h[1].mlp.c_proj
    layer.forward = lambda x: Conv1D.forward(layer, x) + WAVE


def normalised_weight(model: Any) -> None:
    layer = parametrizations.weight_norm(model.transformer.h[1].mlp.c_fc)
    layer.parametrizations.weight.original0.data.mul_(-2)


def parametrised(model: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    parametrize.register_parametrization(model.transformer.h[1].attn.c_attn, "weight", Doubled())


def all_modules(model: Any) -> Any:
    def louder(module: Any, args: Any, out: Any) -> Any:
        return out + WAVE if module is model.transformer.h[1].mlp else None

    return register_module_forward_hook(louder)


def bias_of_the_head(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.arange(61.0).sin())


def dropout_of_one_layer(model: Any) -> None:
    class Always(nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0.5

    model.transformer.h[0].mlp.dropout = Always()


def config_alone(model: Any) -> None:
    model.config.layer_norm_epsilon = 2.0


CHANGES = [relu, scaling, eps, rms, perceptron, forward_of_a_layer, normalised_weight, parametrised]
CHANGES += [all_modules, bias_of_the_head, dropout_of_one_layer]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_parts_are_the_librarys(change: Callable[[Any], Any]) -> None:
    check(change)


@pytest.mark.parametrize("change", [relu, eps, perceptron, dropout_of_one_layer])
def test_changed_parts_of_the_gpt_of_2018(change: Callable[[Any], Any]) -> None:
    if change is eps:
        check(lambda m: setattr(m.transformer.h[1].ln_2, "eps", 2.0), "gpt1")
    else:
        check(change, "gpt1")


def test_a_config_that_was_changed_afterwards_changes_nothing() -> None:
    check(config_alone, has_effect=False)


def test_a_librarys_class_with_another_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = build()
    ours = gptkern.accelerate(copy.deepcopy(theirs))
    before, own = logits(theirs), gpt2.GPT2MLP.forward
    monkeypatch.setattr(gpt2.GPT2MLP, "forward", lambda self, x: own(self, x) + WAVE)
    expected = logits(theirs)
    assert not close(expected, before)
    assert close(logits(ours), expected)


def test_an_attention_of_somebodys_own() -> None:
    def uniform(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen = value.cumsum(2) / torch.arange(1, value.shape[2] + 1)[:, None]
        return seen[:, :, -query.shape[2] :].transpose(1, 2), None

    transformers.AttentionInterface.register("uniform", uniform)
    check(lambda model: model.set_attn_implementation("uniform"))


def test_dropout_of_one_part_in_training_mode_is_drawn() -> None:
    theirs = build()
    ours = gptkern.accelerate(copy.deepcopy(theirs))
    found = []
    for model in (theirs, ours):
        model.transformer.h[1].mlp.dropout.p = 0.5
        model.transformer.h[1].mlp.dropout.train()
        torch.manual_seed(1)
        found.append(logits(model))
    assert close(*found)


@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_pruned_or_reordered_after_acceleration(reverse: bool) -> None:
    theirs = build(n_layer=3)
    ours = gptkern.accelerate(copy.deepcopy(theirs))
    for model in (theirs, ours):
        blocks = model.transformer.h
        model.transformer.h = nn.ModuleList(reversed(blocks)) if reverse else blocks[:2]
    assert close(logits(ours), logits(theirs))
    # The first blocks are a smaller model, which the engine takes.
    assert gptkern.explain(ours)[-1].route == ("fallback" if reverse else "engine")


def test_embeddings_resized_after_acceleration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    theirs = build()
    ours = gptkern.accelerate(copy.deepcopy(theirs))
    for model in (theirs, ours):
        logits(model)
        torch.manual_seed(3)
        model.resize_token_embeddings(70)
    assert close(logits(ours), logits(theirs))
    assert ours.generate(IDS, **GREEDY, output_logits=True, return_dict_in_generate=True).logits[0].shape == (
        1,
        70,
    )


def test_caches_continued_cropped_and_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    theirs = build()
    ours = gptkern.accelerate(copy.deepcopy(theirs))
    results = []
    for model in (theirs, ours):
        past = transformers.DynamicCache(config=model.config)
        first = model.generate(IDS, past_key_values=past, **GREEDY)
        copied = copy.deepcopy(past)
        second = model.generate(torch.cat([first, IDS], 1), past_key_values=past, **GREEDY)
        copied.crop(-3)
        again = model.generate(torch.cat([first[:, :-3], IDS], 1), past_key_values=copied, **GREEDY)
        results.append((second.tolist(), again.tolist(), past.get_seq_length(), copied.get_seq_length()))
    assert results[0] == results[1]


def test_a_hook_in_the_middle_of_a_generation_is_refused_by_name() -> None:
    ours = gptkern.accelerate(build())

    def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if ids.shape[1] == 7:
            ours.transformer.h[1].register_forward_hook(lambda *a: None)
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(RuntimeError, match=r"transformer\.h\.1 is hooked, since this generation began"):
        ours.generate(IDS, stopping_criteria=[stop], **GREEDY)


def test_a_changed_model_says_so_once_and_strict_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = gptkern.accelerate(build())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.generate(IDS, **GREEDY)
    relu(ours)
    told = r"generate runs on transformers' own code: transformer\.h\.0\.mlp\.act is a ReLU that was put in"
    with pytest.warns(gptkern.FallbackWarning, match=told):
        ours.generate(IDS, **GREEDY)
    assert {r.part: r.route for r in gptkern.explain(ours)} == {
        "attention": "reference",
        "norm": "reference",
        "mlp": "reference",
        "loss": "library",
        "generate": "fallback",
    }
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    with pytest.raises(RuntimeError, match="act is a ReLU"):
        ours.generate(IDS, **GREEDY)


def test_recorders_of_the_librarys_own_are_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    ours = gptkern.accelerate(build())
    ours(IDS, output_hidden_states=True)
    assert any(m._forward_hooks for m in ours.modules())
    ours.generate(IDS, **GREEDY)
    assert refusals.changed(ours) is None


def negated(output: Any) -> Any:
    output.logits = -output.logits
    return output


class OwnForward(transformers.GPT2LMHeadModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return negated(super().forward(*args, **kwargs))


class OwnInputs(transformers.GPT2LMHeadModel):
    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:
        made = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return made | {"position_ids": made["position_ids"] + 3}


class OwnSample(transformers.GPT2LMHeadModel):
    def _sample(self, input_ids: Any, **kwargs: Any) -> Any:
        return super()._sample(input_ids.flip(1), **kwargs)


class OwnUpdate(transformers.GPT2LMHeadModel):
    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, **kwargs: Any) -> Any:
        made = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        outputs.logits = -outputs.logits
        return made


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}])
@pytest.mark.parametrize("kind", [OwnForward, OwnInputs, OwnSample, OwnUpdate])
def test_methods_of_a_subclass_are_honoured(kind: Any, options: dict[str, Any]) -> None:
    if kind is OwnSample and "num_beams" in options:
        pytest.skip("beams do not sample")
    base = build()
    theirs = kind(base.config).eval()
    theirs.load_state_dict(base.state_dict())
    models = [theirs, *(gptkern.accelerate(copy.deepcopy(theirs), rng=rng) for rng in ("torch", "philox"))]
    # A subclass of the classes that gptkern gives is one of the library's too.
    found = []
    for model in [*models, base]:
        torch.manual_seed(4)
        found.append(model.generate(IDS, **GREEDY | options).tolist())
    assert found[1] == found[2] == found[0]
    assert found[3] != found[0]


def test_a_subclass_of_gptkerns_class() -> None:
    class Mine(gptkern.transformers.GPT2LMHeadModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return negated(super().forward(*args, **kwargs))

    theirs = OwnForward(build().config).eval()
    ours = Mine(copy.deepcopy(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.generate(IDS, **GREEDY), theirs.generate(IDS, **GREEDY))


def test_a_forward_of_an_instance_is_honoured() -> None:
    def change(model: Any) -> None:
        own = type(model).forward
        model.forward = types.MethodType(lambda self, *a, **k: negated(own(self, *a, **k)), model)

    check(change)


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 16}),
    "lora": (
        "LoraConfig",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False},
    ),
    "dora": ("LoraConfig", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": ["c_attn", "c_fc"], "feedforward_modules": ["c_fc"]}),
}
DECODING = [{}, {"do_sample": True, "top_k": 9}, {"num_beams": 3}]


@pytest.mark.parametrize("method", PEFT)
@pytest.mark.parametrize("after", [False, True], ids=["accelerated first", "accelerated last"])
def test_adapters_and_soft_prompts(method: str, after: bool) -> None:
    peft = pytest.importorskip("peft")
    name, options = PEFT[method]
    kind, found = getattr(peft, name), []
    base = build().generate(IDS, **GREEDY).tolist()
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = build()
        if accelerated and not after:
            gptkern.accelerate(model)
        adapted = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **options)).eval()
        if accelerated and after:
            gptkern.accelerate(model)
        torch.manual_seed(1)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.5)
        made = []
        for decoding in DECODING:
            torch.manual_seed(2)
            made.append(adapted.generate(input_ids=IDS, **GREEDY | decoding).tolist())
        with torch.no_grad():
            found.append((made, adapted(IDS).logits))
    assert found[0][0][0] != base
    assert found[1][0] == found[0][0]
    torch.testing.assert_close(found[1][1], found[0][1], atol=2e-4, rtol=1e-4)
    model = adapted.get_base_model()
    if method in PEFT and "Prefix" not in name and "Prompt" not in name:
        merged = adapted.merge_and_unload()
        assert gptkern.explain(merged)[-1].route == "engine"
    else:
        # The method that PEFT lends the model for a call is put back after it.
        assert gptkern.explain(model)[-1].route == "engine"
