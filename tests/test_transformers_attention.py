"""attn_implementation="gptkern" in models of the library that gptkern has no code for."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache

import gptkern
from gptkern import ops
from gptkern.transformers import FallbackWarning, attention

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 67}
SEQ = 11


def _model(name: str) -> Any:
    torch.manual_seed(1)
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=67,
            n_positions=64,
            scale_attn_by_inverse_layer_idx=True,
        )
    elif name == "opt":
        config = transformers.OPTConfig(
            **SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64
        )
    elif name == "neox":
        config = transformers.GPTNeoXConfig(**SMALL, intermediate_size=64, max_position_embeddings=64)
    elif name == "bigcode":
        config = transformers.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=67, n_positions=64)
    elif name == "llama":
        config = transformers.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2)
    else:
        config = transformers.MistralConfig(
            **SMALL, intermediate_size=64, num_key_value_heads=2, sliding_window=5
        )
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, None)
    config._attn_implementation = "eager"
    for dropout in (
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "dropout",
        "attention_dropout",
        "hidden_dropout",
    ):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


NAMES = ("gpt2", "opt", "neox", "bigcode", "llama", "mistral")
MASKS = ("none", "ones", "left", "right")


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model on eager attention, and its copy on gptkern's."""
    reference = _model(request.param)
    model = copy.deepcopy(reference)
    model.set_attn_implementation("gptkern")
    assert model.config._attn_implementation == "gptkern"
    assert reference.config._attn_implementation == "eager"
    return reference, model


def _mask(kind: str, batch: int, seq: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(batch, seq, dtype=torch.long)
    if kind == "left":
        mask[0, :4] = 0
    if kind == "right":
        mask[0, -4:] = 0
    return mask


def _ids(batch: int, seq: int) -> torch.Tensor:
    return torch.randint(0, 67, (batch, seq))


@pytest.mark.parametrize("kind", MASKS)
def test_logits_and_gradients_are_those_of_eager(pair: tuple[Any, Any], kind: str) -> None:
    reference, model = pair
    ids, mask = _ids(2, SEQ), _mask(kind, 2, SEQ)
    real = torch.ones(2, SEQ, dtype=torch.bool) if mask is None else mask.bool()
    grads = []
    for which in (reference, model):
        logits = which(ids, attention_mask=mask).logits[real]
        logits.square().mean().backward()
        grads.append((logits, {name: p.grad for name, p in which.named_parameters()}))
    torch.testing.assert_close(grads[1][0], grads[0][0], atol=1e-5, rtol=1e-5)
    for name, grad in grads[0][1].items():
        torch.testing.assert_close(
            grads[1][1][name], grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_it_is_called(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = ops.flash_attention
    monkeypatch.setattr(ops, "flash_attention", lambda *a, **k: calls.append(k) or real(*a, **k))
    pair[1](_ids(1, 5))
    assert len(calls) == 2
    assert all(k["causal"] for k in calls)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["ones", "left"])
def test_generate_is_that_of_eager(pair: tuple[Any, Any], kind: str, cache: str) -> None:
    ids, mask = _ids(2, SEQ), _mask(kind, 2, SEQ)
    new = [
        which.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,
        )
        for which in pair
    ]
    assert torch.equal(*new)


@pytest.mark.parametrize("kind", MASKS[:3])
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_every_step_of_a_cache_gives_eagers_logits(pair: tuple[Any, Any], cache: type, kind: str) -> None:
    """A static cache hands over more keys than there are: aligned to their end, a kernel would be wrong."""
    ids, mask = _ids(2, SEQ), _mask(kind, 2, SEQ)
    found = []
    for which in pair:
        past = (
            cache(config=which.config)
            if cache is DynamicCache
            else cache(config=which.config, max_cache_len=20)
        )
        parts, start = [], 0
        for end in (6, 7, 10, SEQ):
            step = which(
                ids[:, start:end],
                attention_mask=None if mask is None else mask[:, :end],
                past_key_values=past,
            )
            parts.append(step.logits)
            start = end
        found.append(torch.cat(parts, 1))
    real = torch.ones(2, SEQ, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[1][real], found[0][real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [7, 9, 10])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_mask_that_ends_elsewhere_than_the_queries_is_taken_as_the_library_takes_it(
    width: int, queries: int
) -> None:
    """PEFT's soft prompts hand such masks over: narrower than the keys in one case, wider in another."""
    model = _model("gpt2")
    tokens = torch.randint(67, (2, 8 + queries))
    mask = torch.ones(2, width + queries - 1, dtype=torch.int64)
    mask[0, 3:5] = 0
    outputs = []
    for implementation in ("sdpa", "gptkern"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            past = model(tokens[:, :8], use_cache=True).past_key_values
            outputs.append(model(tokens[:, 8:], attention_mask=mask, past_key_values=past).logits)
    torch.testing.assert_close(outputs[1], outputs[0])


def test_packed_sequences_stay_apart() -> None:
    reference = _model("llama")
    model = copy.deepcopy(reference)
    model.set_attn_implementation("gptkern")
    ids = _ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    torch.testing.assert_close(
        model(ids, position_ids=positions, use_cache=False).logits,
        reference(ids, position_ids=positions, use_cache=False).logits,
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("kind", MASKS)
def test_asked_for_attentions_it_gives_them(pair: tuple[Any, Any], kind: str) -> None:
    reference, model = pair
    ids, mask = _ids(2, SEQ), _mask(kind, 2, SEQ)
    real = torch.ones(2, SEQ, dtype=torch.bool) if mask is None else mask.bool()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        found = model(ids, attention_mask=mask, output_attentions=True).attentions
    expected = reference(ids, attention_mask=mask, output_attentions=True).attentions
    assert len(found) == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], atol=1e-5, rtol=1e-5
        )


def test_strict_makes_the_fallback_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("gpt2")
    model.set_attn_implementation("gptkern")
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    with pytest.raises(RuntimeError, match="GPTKERN_STRICT"):
        model(_ids(1, 4), output_attentions=True)
    assert model(_ids(1, 4)).logits.shape == (1, 4, 67)


def test_sinks_are_refused() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="s_aux"):
        attention.attention_forward(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(2))


def test_softcap_and_scaling_arrive() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, 8) for heads in (4, 2, 2))
    module = torch.nn.Module()
    flash, none = attention.attention_forward(module, q, k, v, None, scaling=0.3, softcap=2.0)
    eager, weights = attention.attention_forward(
        module.eval(), q, k, v, None, scaling=0.3, softcap=2.0, output_attentions=True
    )
    assert none is None
    torch.testing.assert_close(flash, eager, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["none", "left", "right"])
def test_the_kernels_compute_it(kind: str, device: torch.device) -> None:
    reference = _model("mistral").to(device)
    model = copy.deepcopy(reference)
    model.set_attn_implementation("gptkern")
    ids, mask = _ids(2, 7).to(device), _mask(kind, 2, 7)
    mask = None if mask is None else mask.to(device)
    real = torch.ones(2, 7, dtype=torch.bool) if mask is None else mask.bool()
    found = model(ids, attention_mask=mask).logits[real]
    torch.testing.assert_close(found, reference(ids, attention_mask=mask).logits[real], atol=1e-4, rtol=1e-4)
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:The `paged.` prefix is no longer needed:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_continuous_batching_runs_on_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = attention.ops.flash_attention_varlen
    monkeypatch.setattr(
        attention.ops,
        "flash_attention_varlen",
        lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs),
    )
    model = _model(name)
    model.set_attn_implementation("paged|gptkern")
    assert model.config._attn_implementation in ("paged|gptkern", "gptkern")
    prompts = [_ids(1, n)[0].tolist() for n in (5, 9, 3)]
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = []
    eager = _model(name)
    for prompt in prompts:
        expected.append(
            eager.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        )
    found = model.generate_batch(prompts, generation_config=config)
    by_prompt = {tuple(out.prompt_ids): out.generated_tokens for out in found.values()}
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert by_prompt[tuple(prompt)] == tokens.tolist()
    assert calls


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "accelerated gpt2"])
def test_a_compiled_static_cache_takes_one_graph_for_all_tokens(name: str) -> None:
    """As the library's ``test_generate_compile_model_forward_fullgraph``, with the graphs counted."""
    reference = _model(name.split()[-1])
    reference.generation_config.pad_token_id = 0
    model = copy.deepcopy(reference)
    if name.startswith("accelerated"):
        gptkern.accelerate(model, generation="library")
    else:
        model.set_attn_implementation("gptkern")
    compiled = transformers.CompileConfig(backend="eager", fullgraph=True, dynamic=False, mode=None)
    compiled._compile_all_devices = True
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    ids, mask = _ids(2, 6), _mask("left", 2, 6)
    expected = reference.generate(ids, attention_mask=mask, **options, disable_compile=True)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            found = model.generate(ids, attention_mask=mask, **options, compile_config=compiled)
        assert torch.equal(found, expected)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
    finally:
        torch._dynamo.reset()


LLAMA = """
config = transformers.LlamaConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=8)
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="gptkern")
assert "gptkern.transformers" not in sys.modules
logits = model(torch.tensor([[1, 2, 3]])).logits
assert "gptkern.transformers.attention" in sys.modules
model.set_attn_implementation("eager")
torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])).logits, logits, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import gptkern; assert not {'torch', 'transformers'} & set(sys.modules); import transformers, torch",
        "import transformers, torch; from transformers import LlamaForCausalLM; import gptkern",
    ],
)
def test_importing_gptkern_is_enough_whichever_is_first(first: str) -> None:
    subprocess.run([sys.executable, "-c", f"import sys; {first}\n{LLAMA}"], check=True)


def test_probing_for_the_librarys_module_does_not_lose_it() -> None:
    probed = "import gptkern, importlib.util; assert importlib.util.find_spec('transformers.modeling_utils')"
    code = f"import sys; {probed}\nimport transformers, torch\n{LLAMA}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_explain_of_models_that_take_the_attention_alone() -> None:
    for name in ("llama", "gpt2"):
        model = _model(name)
        assert {r.route for r in gptkern.explain(model)} == {"library"}
        assert gptkern.explain(model)[0].reason == "attn_implementation is 'eager'"
        model.set_attn_implementation("gptkern")
        routes = {r.part: r for r in gptkern.explain(model)}
        assert routes.pop("attention").route == "reference"
        assert {r.route for r in routes.values()} == {"library"}
    assert "not accelerated" in routes["generate"].reason
    with pytest.raises(TypeError, match="model is int"):
        gptkern.explain(3)
