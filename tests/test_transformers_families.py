"""accelerate on transformers' models of every family but the first two GPTs: the same numbers, in place."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from families import CONFIGS as OTHERS
from family_models import TINY, library_model
from safetensors.torch import load_file
from transformers import LlamaConfig, SmolLM3Config

import gptkern
from gptkern import ops
from gptkern.transformers.families import FAMILIES
from gptkern.transformers.modules import SWAPS

CONFIGS = {
    "llama": LlamaConfig(**TINY, num_key_value_heads=2),
    "llama, biases, tied": LlamaConfig(
        **TINY, num_key_value_heads=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "smollm3": SmolLM3Config(**TINY, num_key_value_heads=2, no_rope_layer_interval=2),
    "smollm3, windows": SmolLM3Config(
        **TINY, num_key_value_heads=3, no_rope_layer_interval=3, use_sliding_window=True, sliding_window=5
    ),
    **OTHERS,
}
SEQ = 11
FIRST = list({config.model_type: name for name, config in reversed(CONFIGS.items())}.values())[::-1]
SLOW = pytest.mark.slow

# Of each kind of block, one is not slow: the others differ in names.
KINDS = ("llama", "gemma3", "gpt_neox", "gptj", "opt", "gpt_bigcode")
FIRST_OF_ALL = [pytest.param(name, marks=() if name in KINDS else SLOW) for name in FIRST]


def each(*cases: str) -> list[Any]:
    """(configuration, case) for all; all but the last case of each family's first are slow."""
    quick = [(name, cases[-1]) for name in FIRST]
    pairs = [(name, case) for name in CONFIGS for case in cases]
    return [pytest.param(*p, marks=() if p in quick else SLOW, id="-".join(p)) for p in pairs]


def pair(name: str) -> tuple[Any, Any]:
    """A model, and its accelerated copy."""
    model = library_model(CONFIGS[name])
    model.set_attn_implementation("sdpa")
    return model, gptkern.accelerate(copy.deepcopy(model))


def inputs(padding: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(2, 67, (2, SEQ))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :4] = 0
    elif padding == "right":
        mask[0, -4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def forward_backward(model: Any, given: dict[str, torch.Tensor]) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**given)
    output.loss.backward()
    real = output.logits[given["attention_mask"].bool()]
    return real, output.loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "padding"), each("none", "right", "left"))
def test_logits_loss_and_gradients_are_the_librarys(name: str, padding: str) -> None:
    theirs, ours = pair(name)
    given = inputs(padding)
    logits, loss, gradients = forward_backward(theirs, given)
    found_logits, found_loss, found = forward_backward(ours, given)
    torch.testing.assert_close(found_logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found_loss, loss, atol=1e-5, rtol=0)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        # The gradient of a key's bias is nothing but rounding where keys are not rotated.
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key


@pytest.mark.parametrize("name", FIRST)
def test_restore_gives_back_the_modules_and_the_bits(name: str) -> None:
    model = library_model(CONFIGS[name])
    given = inputs("left")
    expected = model(**given).logits
    before = {key: (type(m), set(m.__dict__)) for key, m in model.named_modules()}
    attention, written = model.config._attn_implementation, model.config.to_dict()
    pointers = {key: p.data_ptr() for key, p in model.state_dict().items()}
    assert gptkern.accelerate(model) is model
    assert any(type(m) in SWAPS.values() for m in model.modules())
    model(**given)
    assert {key: p.data_ptr() for key, p in model.state_dict().items()} == pointers
    assert gptkern.restore(model) is model
    assert {key: (type(m), set(m.__dict__)) for key, m in model.named_modules()} == before
    assert model.config._attn_implementation == attention
    assert model.config.to_dict() == written
    assert torch.equal(model(**given).logits, expected)


GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 0}


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that leaves the engine fails."""
    monkeypatch.setenv("GPTKERN_STRICT", "1")


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("name", "rows"), each("alone", "batched", "padded"))
def test_generate_makes_the_librarys_tokens_on_the_engine(name: str, rows: str) -> None:
    if "longrope" in name:
        pytest.skip("the library's frequencies change within a text: see the test of refusals")
    theirs, ours = pair(name)
    assert gptkern.explain(ours)[-1].route == "engine"
    given = inputs("left" if rows == "padded" else "none")
    count = 1 if rows == "alone" else 2
    ids, mask = given["input_ids"][:count], given["attention_mask"][:count]
    expected = theirs.generate(ids, attention_mask=mask, **GREEDY)
    assert expected.shape[1] == SEQ + 64
    assert torch.equal(ours.generate(ids, attention_mask=mask, **GREEDY), expected)


@pytest.mark.parametrize("name", FIRST_OF_ALL)
def test_a_model_that_generated_is_still_the_librarys(name: str, tmp_path: Path) -> None:
    """The engine moves weights that it reads as one tensor into one memory."""
    theirs, ours = pair(name)
    given, greedy = inputs("none"), GREEDY | {"max_new_tokens": 8}
    ids, mask = given["input_ids"], given["attention_mask"]
    ours.generate(ids, attention_mask=mask, **greedy)
    names = []
    for model in (theirs, ours):
        model.save_pretrained(tmp_path)
        names.append(sorted(load_file(tmp_path / "model.safetensors")))
    assert names[1] == names[0]
    again = type(theirs).from_pretrained(tmp_path)
    assert type(again) is type(theirs)
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        forward_backward(model, given)
        optimizer.step()
    expected = theirs.generate(ids, attention_mask=mask, **greedy)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **greedy), expected)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)
    twin = pickle.loads(pickle.dumps(ours))
    assert torch.equal(twin(ids).logits, ours(ids).logits)
    gptkern.restore(ours)
    assert type(ours) is type(theirs)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


HEADS = [(kind, cls) for kind, family in FAMILIES.items() for cls in family.models[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("kind", "cls"), HEADS, ids=lambda value: getattr(value, "__name__", value))
def test_other_heads(kind: str, cls: type[Any], padding: str) -> None:
    config = copy.deepcopy(next(c for c in CONFIGS.values() if c.model_type == kind))
    config.num_labels, config.pad_token_id = 2 if "Question" in cls.__name__ else 3, 0
    torch.manual_seed(0)
    theirs = cls(config).eval()
    ours = gptkern.accelerate(copy.deepcopy(theirs))
    given = inputs(padding)
    mask = given["attention_mask"].bool()
    given["input_ids"] *= mask
    labels = given.pop("labels")
    if "SequenceClassification" in cls.__name__:
        given["labels"] = torch.tensor([0, 2])
    elif "TokenClassification" in cls.__name__:
        given["labels"] = (labels % 3).masked_fill(~mask, -100)
    elif "QuestionAnswering" in cls.__name__ and padding == "right":
        given |= {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([2, 5])}
    expected, found = theirs(**given), ours(**given)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            real = mask if value.shape[:2] == mask.shape else ...
            torch.testing.assert_close(found[key][real], value[real], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gptj", "opt", "gpt_bigcode", "starcoder2"])
def test_dropout_in_training_draws_the_librarys_share(name: str) -> None:
    config = copy.deepcopy(CONFIGS[name])
    for rate in ("resid_pdrop", "hidden_dropout", "dropout", "residual_dropout"):
        if hasattr(config, rate):
            setattr(config, rate, 0.5)
    for rate in ("attn_pdrop", "attention_dropout"):
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    theirs = library_model(config).train()
    # eager attention draws even where it drops nothing
    theirs.set_attn_implementation("sdpa")
    ours, ids = gptkern.accelerate(copy.deepcopy(theirs)), inputs("none")["input_ids"]
    logits = []
    for model in (theirs, ours):
        torch.manual_seed(7)
        logits.append(model(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
    assert not torch.allclose(theirs.eval()(ids).logits, logits[0], atol=0.1)


@pytest.mark.filterwarnings("ignore::gptkern.FallbackWarning")
@pytest.mark.parametrize(("name", "rate"), [("llama", "attention_dropout"), ("opt", "dropout")])
def test_generate_in_training_mode_draws_dropout(name: str, rate: str) -> None:
    config = copy.deepcopy(CONFIGS[name])
    setattr(config, rate, 0.5)
    theirs = library_model(config).train()
    ours, ids, texts = gptkern.accelerate(copy.deepcopy(theirs)), inputs("none")["input_ids"], []
    for model in (theirs, ours):
        torch.manual_seed(7)
        texts.append(model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0))
    assert torch.equal(*texts)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FIRST)
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    theirs, ours = pair(name)
    for module in (*theirs.modules(), *ours.modules()):
        for dropout in ("p", "dropout", "attn_dropout", "attention_dropout"):
            if isinstance(getattr(module, dropout, None), float):
                setattr(module, dropout, 0.0)
    given = inputs("left")
    _, loss, gradients = forward_backward(theirs.train(), given)
    ours.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, found_loss, found = forward_backward(ours, given)
    torch.testing.assert_close(found_loss, loss, atol=1e-5, rtol=0)
    for key, gradient in gradients.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gptkern.FallbackWarning")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "opt"])
def test_lora_trains_and_merges(name: str) -> None:
    peft = pytest.importorskip("peft")
    given, results = inputs("none"), []
    ids, mask = given["input_ids"], given["attention_mask"]
    greedy = GREEDY | {"attention_mask": mask, "max_new_tokens": 6}
    for model in pair(name):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(3):
            loss = adapted(**given).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        tokens = adapted.generate(input_ids=ids, **greedy)
        merged = adapted.merge_and_unload()
        results.append((losses, tokens, merged.generate(ids, **greedy)))
    assert gptkern.explain(merged)[4].route == "engine"
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-4)
    assert all(map(torch.equal, results[0][1:], results[1][1:]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::gptkern.FallbackWarning")
@pytest.mark.parametrize("name", FIRST_OF_ALL)
def test_the_cache_under_both_of_its_names(name: str) -> None:
    theirs, ours = pair(name)
    ids = inputs("none")["input_ids"]
    for key in ("past_key_values", "cache"):
        if key == "cache" and key not in inspect.signature(theirs.forward).parameters:
            continue
        logits, tokens = [], []
        for model in (theirs, ours):
            first = model(ids[:, :6], use_cache=True)
            past = {key: getattr(first, key)}
            logits.append(model(ids[:, 6:10], **past).logits)
            tokens.append(model.generate(ids, **GREEDY | {"max_new_tokens": 8}, **past))
        torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
        assert torch.equal(*tokens)


@pytest.mark.parametrize("name", FIRST_OF_ALL)
def test_a_hooked_part_is_called(name: str) -> None:
    """Each module that the library calls in a layer is called, or its output would be left out."""
    theirs, ours = pair(name)
    ids = inputs("none")["input_ids"]
    body = FAMILIES[theirs.config.model_type].body
    layers = f"{body}.layers.1" if hasattr(theirs.get_submodule(body), "layers") else f"{body}.h.1"
    parts = [f"{layers}.{n}" for n, m in theirs.get_submodule(layers).named_modules() if n and n != "mlp.act"]
    for part in parts:
        calls: list[list[int]] = [[], []]
        for model, seen in zip((theirs, ours), calls, strict=True):
            hook = model.get_submodule(part).register_forward_hook(
                lambda m, a, out, seen=seen: seen.append(1)
            )
            with torch.no_grad():
                model(ids)
            # Some activations are one module of all models.
            hook.remove()
        assert calls[1] == calls[0], part
    assert len(parts) > 5


def test_what_is_not_served_says_why() -> None:
    model = gptkern.accelerate(library_model(CONFIGS["phi3, longrope"]))
    route = gptkern.explain(model)[-1]
    assert (route.route, route.reason) == (
        "fallback",
        "longrope: the library's frequencies change within a text",
    )
    config = copy.deepcopy(CONFIGS["gemma3"])
    config.use_bidirectional_attention = True
    theirs = library_model(config)
    model = gptkern.accelerate(copy.deepcopy(theirs))
    assert "use_bidirectional_attention" in gptkern.explain(model)[-1].reason
    ids = inputs("none")["input_ids"]
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_every_family_has_configurations() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "rotations", "normed"),
    [
        *(("llama", 3, 0), ("smollm3", 2, 0), ("qwen3", 3, 3), ("phi3, partial", 3, 0), ("olmo2", 3, 0)),
        *(("gemma3", 7, 7), ("gpt_neox", 3, 0), ("gptj", 3, 0), ("opt", 0, 0)),
    ],
)
def test_rotation_and_norm_of_heads_are_one_op(
    name: str, rotations: int, normed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    real = ops.rotary

    def spied(*args: Any, **options: Any) -> Any:
        calls.append(options["norm"])
        return real(*args, **options)

    monkeypatch.setattr(ops, "rotary", spied)
    _, ours = pair(name)
    ours(inputs("none")["input_ids"])
    assert (len(calls), sum(norm is not None for norm in calls)) == (rotations, normed)
    calls.clear()
    ours.set_attn_implementation("eager")
    ours(inputs("none")["input_ids"])
    assert not calls


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_writes_through_data_are_seen_by_the_next_call(name: str) -> None:
    """GPT-NeoX's queries, keys and values are copies in the engine."""
    theirs, ours = pair(name)
    ids, greedy = inputs("none")["input_ids"], GREEDY | {"max_new_tokens": 8}
    unchanged = ours.generate(ids, **greedy)
    for model in (theirs, ours):
        for key, parameter in model.named_parameters():
            if "query_key_value" in key or "_proj" in key:
                parameter.data.neg_()
    expected = theirs.generate(ids, **greedy)
    assert not torch.equal(expected, unchanged)
    assert torch.equal(ours.generate(ids, **greedy), expected)
