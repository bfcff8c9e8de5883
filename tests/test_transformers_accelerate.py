"""accelerate and restore: the same model, the same results, in place."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import gptkern
import gptkern.transformers as drop_in
from gptkern import environment
from gptkern.transformers.modules import SWAPS

# Other families are in tests/test_transformers_families.py.
NAMES = [name for name in drop_in.SUPPORTED if name.startswith(("GPT2", "OpenAI"))]


def gpt2_config(**changes: Any) -> Any:
    options = {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 48,
        "bos_token_id": 60,
        "eos_token_id": 60,
        "pad_token_id": 59,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "summary_first_dropout": 0.0,
        "classifier_dropout": 0.0,
        "num_labels": 3,
    }
    return transformers.GPT2Config(**(options | changes))


def gpt1_config(**changes: Any) -> Any:
    shape = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "num_labels": 3}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.OpenAIGPTConfig(**(shape | dropout | changes))


def build(name: str, **changes: Any) -> Any:
    torch.manual_seed(3)
    if name.endswith("QuestionAnswering"):
        changes |= {"num_labels": 2}
    config = gpt1_config(**changes) if name.startswith("OpenAI") else gpt2_config(**changes)
    model = getattr(transformers, name)(config)
    with torch.no_grad():  # fresh biases are zero, which would hide one that is not added
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(name: str, padded: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    ids = torch.randint(0, 59, (2, 9))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 6:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if name.endswith("LMHeadModel"):
        given["labels"] = torch.where(mask.bool(), ids, -100)
    elif name.endswith("SequenceClassification"):
        given["input_ids"] = ids.masked_fill(mask == 0, 59)
        given["labels"] = torch.tensor([0, 2])
    elif name.endswith("TokenClassification"):
        given["labels"] = torch.where(mask.bool(), ids % 3, -100)
    elif name.endswith("QuestionAnswering"):
        given |= {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([2, 5])}
    elif name.endswith("DoubleHeadsModel"):
        given = {"input_ids": ids[None], "labels": ids[None], "mc_labels": torch.tensor([1])}
        given["mc_token_ids"] = torch.tensor([[8, 5]])
    return given


def results(
    model: Any, given: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs where there is no padding, and gradients."""
    model.zero_grad()
    output = model(**given)
    found = {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}
    mask = given.get("attention_mask")
    real = {
        k: v[mask.bool()] if mask is not None and v.shape[:2] == mask.shape else v for k, v in found.items()
    }
    loss = found.get("loss")
    loss = found["last_hidden_state"][mask.bool()].square().mean() if loss is None else loss
    loss.backward()
    return real, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(
                ours[key], theirs[key], atol=2e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_stay(name: str, mode: str) -> None:
    model = getattr(build(name), mode)()
    given = inputs(name)
    expected = results(model, given)
    pointers = {key: p.data_ptr() for key, p in model.state_dict().items()}
    assert gptkern.accelerate(model) is model
    assert {key: p.data_ptr() for key, p in model.state_dict().items()} == pointers
    assert_same(results(model, given), expected)


@pytest.mark.parametrize("name", NAMES)
def test_restore_undoes_it_exactly(name: str) -> None:
    model = build(name)
    before = {key: (type(m), set(m.__dict__)) for key, m in model.named_modules()}
    attention = model.config._attn_implementation
    written = model.config.to_dict()
    gptkern.accelerate(model)
    assert any(type(m) in SWAPS.values() for m in model.modules())
    assert gptkern.restore(model) is model
    assert {key: (type(m), set(m.__dict__)) for key, m in model.named_modules()} == before
    assert model.config._attn_implementation == attention
    assert model.config.to_dict() == written
    gptkern.restore(model)


@pytest.mark.parametrize("name", NAMES)
def test_imported_classes_are_accelerated_subclasses(name: str, tmp_path: Any) -> None:
    ours, theirs = getattr(drop_in, name), getattr(transformers, name)
    assert issubclass(ours, theirs)
    assert ours.__name__ == name
    assert not ours.is_custom_code()
    original = build(name).eval()
    original.save_pretrained(tmp_path / "theirs")
    model = ours.from_pretrained(tmp_path / "theirs").eval()
    given = inputs(name)
    assert_same(results(model, given), results(original, given))
    assert {r.route for r in gptkern.explain(model) if r.part in ("attention", "norm", "mlp")} == {
        "reference"
    }
    model.save_pretrained(tmp_path / "ours")
    again = theirs.from_pretrained(tmp_path / "ours")
    assert type(again) is theirs
    assert again.config._attn_implementation == original.config._attn_implementation
    assert_same([again.state_dict()], [original.state_dict()])


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu", "silu"])
def test_activations(activation: str) -> None:
    model = build("GPT2Model", activation_function=activation, n_inner=50).eval()
    given = inputs("GPT2Model")
    expected = results(model, given)
    assert_same(results(gptkern.accelerate(model), given), expected)


def test_dropout_in_training_keeps_its_share() -> None:
    model = gptkern.accelerate(build("GPT2Model", resid_pdrop=0.5, attn_pdrop=0.3, embd_pdrop=0.1)).train()
    ids = torch.randint(0, 59, (1, 8))
    first, second = model(ids).last_hidden_state, model(ids).last_hidden_state
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    theirs = build("GPT2Model", resid_pdrop=0.5).train()
    ours = gptkern.accelerate(copy.deepcopy(theirs))
    torch.manual_seed(7)
    expected = theirs(ids).last_hidden_state
    torch.manual_seed(7)
    torch.testing.assert_close(ours(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = build("GPT2LMHeadModel").train()
    given = inputs("GPT2LMHeadModel")
    expected = results(model, given)
    gptkern.accelerate(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = results(model, given | {"use_cache": False})
    assert_same([{"loss": found[0]["loss"]}, found[1]], [{"loss": expected[0]["loss"]}, expected[1]])


def test_hidden_states_and_attentions_are_recorded() -> None:
    model = build("GPT2LMHeadModel", attn_implementation="eager").eval()
    ids = torch.randint(0, 59, (2, 6))
    expected = model(ids, output_hidden_states=True, output_attentions=True)
    gptkern.accelerate(model)
    found = model(ids, output_hidden_states=True, output_attentions=True)
    for name, count in (("hidden_states", 4), ("attentions", 3)):
        assert len(found[name]) == count
        for ours, theirs in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_autocast_gives_the_librarys_dtypes() -> None:
    model = build("GPT2LMHeadModel").eval()
    ids = torch.randint(0, 59, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        found = gptkern.accelerate(model)(ids).logits
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_inputs_beside_ids() -> None:
    model = build("GPT2LMHeadModel").eval()
    ids = torch.randint(0, 59, (2, 6))
    cases: list[dict[str, Any]] = [
        {"inputs_embeds": torch.randn(2, 6, 32)},
        {"input_ids": ids, "token_type_ids": ids % 2},
        {"input_ids": ids, "position_ids": torch.arange(3, 9)[None]},
        {"input_ids": ids, "logits_to_keep": 2},
    ]
    expected = [model(**case).logits for case in cases]
    gptkern.accelerate(model)
    for case, wanted in zip(cases, expected, strict=True):
        torch.testing.assert_close(model(**case).logits, wanted, atol=1e-5, rtol=1e-5)
    assert isinstance(model(ids, return_dict=False), tuple)


@pytest.mark.kernels
def test_the_kernels_and_the_fused_loss_compute_it(device: torch.device) -> None:
    model = build("GPT2LMHeadModel", n_layer=1).train().to(device)
    given = {name: value.to(device) for name, value in inputs("GPT2LMHeadModel").items()}
    with gptkern.backend("reference"):
        expected = results(model, given)
        counted = model(**given, num_items_in_batch=30).loss
    gptkern.accelerate(model)
    near = {"atol": 1e-4, "rtol": 1e-3}
    found = results(model, given)
    for ours, theirs in zip(found, expected, strict=True):
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], **near)
    torch.testing.assert_close(model(**given, num_items_in_batch=30).loss, counted, **near)
    assert next(r for r in gptkern.explain(model) if r.part == "loss").route == "kernel"


class _Unknown(nn.Module):
    config = None


def test_other_models_are_refused_and_left_alone() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**shape, intermediate_size=8, num_key_value_heads=1)
    mixtral = transformers.MixtralForCausalLM(config)
    before = [type(m) for m in mixtral.modules()]
    for model in (mixtral, _Unknown(), 3):
        with pytest.raises(TypeError, match=r"GPT2LMHeadModel, GPT2Model.*of llama, smollm3"):
            gptkern.accelerate(model)
    assert [type(m) for m in mixtral.modules()] == before
    assert mixtral.config._attn_implementation == "sdpa"
    model = build("GPT2Model", activation_function="tanh")
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="tanh"):
        gptkern.accelerate(model)
    assert [type(m) for m in model.modules()] == before
    with pytest.raises(ValueError, match="'auto' or 'library'"):
        gptkern.accelerate(build("GPT2Model"), generation="fast")
    with pytest.raises(TypeError, match="restore"):
        gptkern.restore(_Unknown())


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("GPT2LMHeadModel")
    before = {key: (type(m), set(m.__dict__)) for key, m in model.named_modules()}

    def fail(cls: type) -> type:
        raise KeyboardInterrupt

    monkeypatch.setattr("gptkern.transformers.swap.accelerated_class", fail)
    with pytest.raises(KeyboardInterrupt):
        gptkern.accelerate(model)
    assert {key: (type(m), set(m.__dict__)) for key, m in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"


def test_a_subclass_of_the_callers_own() -> None:
    class Mine(transformers.GPT2LMHeadModel):
        def forward(self, input_ids: Any = None, flavour: int = 0, **kwargs: Any) -> Any:
            output = super().forward(input_ids, **kwargs)
            output.logits = output.logits + flavour
            return output

    torch.manual_seed(0)
    model = Mine(gpt2_config()).eval()
    ids = torch.randint(0, 59, (1, 5))
    expected = model(ids, flavour=2).logits
    gptkern.accelerate(model)
    assert isinstance(model, Mine)
    torch.testing.assert_close(model(ids, flavour=2).logits, expected, atol=1e-5, rtol=1e-5)
    gptkern.restore(model)
    assert type(model) is Mine


def test_copies_and_moves_stay_accelerated() -> None:
    model = gptkern.accelerate(build("GPT2LMHeadModel")).eval()
    ids = torch.randint(0, 59, (1, 5))
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(ids).logits, expected)
    gptkern.restore(twin)
    torch.testing.assert_close(twin(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert gptkern.explain(model)[0].route == "reference"


def test_a_replaced_or_hooked_layer_is_not_passed_over() -> None:
    model = gptkern.accelerate(build("GPT2LMHeadModel")).eval()
    ids = torch.randint(0, 59, (1, 5))
    plain = model(ids).logits
    for name in ("mlp.c_fc", "mlp.c_proj", "ln_2", "ln_1", "attn.c_proj"):
        handle = model.transformer.h[1].get_submodule(name).register_forward_hook(lambda m, a, out: out * 3)
        assert not torch.allclose(model(ids).logits, plain, atol=1e-3), name
        handle.remove()
    torch.testing.assert_close(model(ids).logits, plain)


def test_explain() -> None:
    model = build("GPT2LMHeadModel")
    assert {r.route for r in gptkern.explain(model)} == {"library"}
    gptkern.accelerate(model)
    routes = {r.part: r for r in gptkern.explain(model)}
    assert list(routes) == ["attention", "norm", "mlp", "loss", "generate"]
    assert routes["generate"].route == "engine"
    refused = gptkern.explain(model, transformers.GenerationConfig(use_cache=False))[-1]
    assert (refused.route, refused.reason) == ("fallback", "use_cache=False")
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *a: None)
    assert {r.part: r.route for r in gptkern.explain(model)}["mlp"] == "fallback"
    assert str(gptkern.explain(model)).splitlines()[0].split() == ["part", "route", "why"]


def test_a_fallback_warns_once_and_strict_makes_it_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_past_warnings", set())
    model = gptkern.accelerate(build("GPT2LMHeadModel")).eval()
    ids = torch.randint(0, 59, (1, 5))
    options = {"max_new_tokens": 3, "use_cache": False, "do_sample": False}
    with pytest.warns(drop_in.FallbackWarning, match="use_cache=False"):
        model.generate(ids, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", drop_in.FallbackWarning)
        model.generate(ids, **options)
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    with pytest.raises(RuntimeError, match="use_cache=False"):
        model.generate(ids, **options)


def test_importing_gptkern_does_not_import_transformers() -> None:
    code = "import sys, gptkern, gptkern.gpt, gptkern.generate; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
