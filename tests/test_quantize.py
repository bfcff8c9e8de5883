"""Models of fewer bits: loading, saving, stepping, and what it costs in perplexity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptkern import cli, ops
from gptkern.checkpoint.errors import CheckpointError
from gptkern.compensate import compensated
from gptkern.config import GPTConfig
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.graph import GraphExecutor
from gptkern.gpt import GPT
from gptkern.ops.decode_linear.formats import quantize, unpack
from gptkern.quantization import Quantization, linear_names
from gptkern.quantize import QuantizedLinear, quantize_model
from gptkern.testing import assert_accurate

CONFIG = GPTConfig(
    n_layer=2,
    n_head=2,
    n_embd=64,
    vocab_size=97,
    n_positions=64,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
    initializer_range=0.2,
)
KINDS: list[dict[str, Any]] = [
    {"weights": "int8"},
    {"weights": "fp8"},
    {"weights": "int4"},
    {"weights": "int4", "group_size": 32, "zero_point": False},
]


def kind_of(options: dict[str, Any]) -> str:
    return " ".join(map(str, options.values()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    GPT(CONFIG).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def same(a: GPT, b: GPT) -> None:
    first, second = ({**m.state_dict()} for m in (a, b))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


@pytest.mark.parametrize("options", KINDS, ids=kind_of)
@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_what_is_saved_is_what_is_loaded(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    GPT(CONFIG.replace(model_type=model_type)).save_pretrained(tmp_path / "plain")
    made = GPT.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16, **options)
    assert sum(isinstance(m, QuantizedLinear) for m in made.modules()) == 4 * CONFIG.n_layer + 1
    assert made.dtype == torch.bfloat16 and made.transformer.wte.weight.dtype == torch.bfloat16
    made.save_pretrained(tmp_path / "small", max_shard_size=20_000)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    again = GPT.from_pretrained(tmp_path / "small", check_finite=True)
    assert again.quantization == made.quantization and again.dtype == torch.bfloat16
    same(made, again)
    ids = torch.arange(9)[None]
    assert torch.equal(made(ids).logits, again(ids).logits)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptkern"
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("zero_point", [False, True])
def test_whole_zeros_of_earlier_checkpoints_are_read(zero_point: bool, folder: Path, tmp_path: Path) -> None:
    """Scales were fp32 then, and a group's zero a whole number."""
    options: dict[str, Any] = {"weights": "int4", "group_size": 32, "zero_point": zero_point}
    made, saved = GPT.from_pretrained(folder, **options), tmp_path / "saved"
    made.save_pretrained(saved)
    tensors, expected = load_file(saved / "model.safetensors"), {}
    for layer in linear_names(CONFIG.n_layer):
        scales = tensors[f"{layer}.scales"] = 0.1 + torch.rand(tensors[f"{layer}.scales"].shape)
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
        if zero_point:
            zeros = tensors[f"{layer}.zeros"] = torch.randint(16, scales.shape, dtype=torch.uint8)
            del tensors[f"{layer}.minimums"]
        codes = unpack(tensors[f"{layer}.values"], 32).unflatten(1, (-1, 32)).float()
        expected[layer] = (codes - zeros[..., None]) * scales[..., None]
    save_file(tensors, saved / "model.safetensors")
    again = GPT.from_pretrained(saved)
    for layer, matrix in expected.items():
        found = again.get_submodule(layer).weight.unflatten(1, (-1, 32))
        steps = tensors[f"{layer}.scales"][..., None]
        assert ((found - matrix).abs() <= steps / 60).all()
    tensors["lm_head.scales"][3, 1] = 7e4
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.(scales|zeros): a number beyond fp16"):
        GPT.from_pretrained(saved)


@pytest.mark.parametrize("options", KINDS, ids=kind_of)
def test_casts_and_moves_leave_the_packed_weights_alone(options: dict[str, Any], folder: Path) -> None:
    made = GPT.from_pretrained(folder, **options)
    before = {name: value.clone() for name, value in made.named_buffers() if not name.endswith("_like")}
    expected = made(torch.arange(9)[None]).logits
    for kind in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        made.to(kind)
        assert made.lm_head.weight.dtype == made.dtype == kind
        for name, value in before.items():
            assert torch.equal(dict(made.named_buffers())[name], value), (kind, name)
    # The embeddings have been through half precision.
    torch.testing.assert_close(made(torch.arange(9)[None]).logits, expected, atol=0.3, rtol=0.1)
    assert made.to("meta").lm_head.weight.device.type == "meta"


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", KINDS, ids=kind_of)
def test_the_decode_step_reads_the_packed_weights(
    options: dict[str, Any],
    dtype: torch.dtype,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    made = GPT.from_pretrained(folder, dtype=dtype, **options).to(device)
    ids = torch.randint(97, (2, 6), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        cache = KVCache.for_config(CONFIG, max_seqs=2, max_len=16, page_size=4, dtype=dtype, device=device)
        made(ids[:, :5], cache=cache)
        step = GraphExecutor(made, cache)
        assert made.lm_head.values.data_ptr() in step._addresses
        with monkeypatch.context() as patched:
            patched.setattr(QuantizedLinear, "weight", property(lambda self: pytest.fail("dequantised")))
            found = step(ids[:, 5])
        with ops.backend("reference"):
            plain = made(ids).logits[:, -1]
            exact = made.double()(ids).logits[:, -1]
    assert_accurate(found, plain, exact)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_generating_agrees_with_the_model_on_a_cpu(weights: str, folder: Path) -> None:
    with ops.backend("reference"):
        made = GPT.from_pretrained(folder, weights=weights, group_size=32 if weights == "int4" else None)
        ids = torch.arange(5)[None]
        found = made.generate(ids, max_new_tokens=6)
        for place in range(5, 11):
            assert found[0, place] == made(found[:, :place]).logits[0, -1].argmax()


def test_bad_input_changes_nothing(folder: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"weights": "int3"}, "weights is 'int3'; accepted are int8, fp8, int4"),
        (
            {"weights": "int4", "group_size": 128},
            "groups of 128 do not divide a width of 64; group_size=64 or 32",
        ),
        ({"weights": "int8", "group_size": 32}, "group_size and zero_point are of int4 alone"),
        ({"group_size": 32}, "group_size and zero_point need weights='int4'"),
    ):
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(folder, **options)
    GPT.from_pretrained(folder, weights="int8").save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="weights is 'fp8', the checkpoint is int8 already"):
        GPT.from_pretrained(tmp_path / "small", weights="fp8")
    config = tmp_path / "small" / "config.json"
    ours = {"quant_method": "gptkern", "format": "int8"}
    for changed in (
        {"quant_method": "awq"},
        {"quant_method": "gptkern", "format": "int2"},
        3,
        ours | {"floats": ["transformer.h.9.mlp.c_fc"]},
        ours | {"floats": "lm_head"},
        ours | {"int8": ["lm_head", 3]},
    ):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": changed}))
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            GPT.from_pretrained(tmp_path / "small")


def test_fp8_needs_a_gpu_that_has_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ValueError, match=r"compute capability 8\.6, 8\.9 or newer is needed: take 'int8'"):
        GPT.from_pretrained(folder, weights="fp8", device="cuda")


def test_the_command_writes_and_tells(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ROMEO:\nBut soft, what light through yonder window breaks?\n" * 20)
    out = tmp_path / "small"
    command = ["quantize", "embedded", "--weights", "int8", "--out", str(out), "--text", str(text)]
    assert cli.run(command) == 0
    printed = capsys.readouterr().out
    size = sum(p.numel() * p.element_size() for p in GPT.from_pretrained().parameters())
    assert f"MB, {size / 1e6:.4g} MB before" in printed and "perplexity" in printed and "%)" in printed
    assert GPT.from_pretrained(out).tokenizer is not None
    assert cli.run(["generate", "ROMEO:", "--model", str(out), "-n", "8", "--seed", "1"]) == 0
    assert cli.run(["generate", "ROMEO:", "--weights", "int4", "-n", "8", "--seed", "1"]) == 0
    capsys.readouterr()
    assert cli.run(["quantize", str(folder), "--weights", "int8", "--out", str(folder)]) == 1
    assert "the original would be lost" in capsys.readouterr().err


def test_the_command_reads_texts_and_leaves_layers_in_8_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "small"
    text.write_text(_TEXT * 4)
    command = ["quantize", "embedded", "--weights", "int4", "--out"]
    more = ["--texts", str(text), "--int8-layer", "lm_head", "--json"]
    assert cli.run([*command, str(out), *more]) == 0
    assert cli.run([*command, str(tmp_path / "alone"), *more[2:]]) == 0
    by_text, plain = (GPT.from_pretrained(tmp_path / name) for name in ("small", "alone"))
    assert by_text.quantization is not None and by_text.quantization.int8 == ("lm_head",)
    assert by_text.quantization == plain.quantization and by_text.lm_head.format == "int8"
    assert not torch.equal(by_text.lm_head.values, plain.lm_head.values)
    capsys.readouterr()
    for wrong, message in (
        (["--int8-layer", "wte"], "int8 is 'wte'; layers' names beside weights='int4'"),
        (["--texts", str(tmp_path / "none.txt")], "none.txt"),
    ):
        assert cli.run([*command, str(tmp_path / "other"), *wrong]) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()


_TEXT = """ROMEO:
But, soft! what light through yonder window breaks?
It is the east, and Juliet is the sun.
Arise, fair sun, and kill the envious moon,
Who is already sick and pale with grief,
That thou her maid art far more fair than she:
Be not her maid, since she is envious;
Her vestal livery is but sick and green
And none but fools do wear it; cast it off.
It is my lady, O, it is my love!
O, that she knew she were!
"""
COMPENSATED: list[dict[str, Any]] = [
    {"format": "int8"},
    {"format": "int4", "group_size": 64, "zero_point": True},
    {"format": "int4", "group_size": 32},
]


@pytest.mark.parametrize("options", COMPENSATED, ids=kind_of)
def test_compensated_rounding_makes_smaller_errors_of_such_inputs(
    options: dict[str, Any],
) -> None:
    draw = torch.Generator().manual_seed(0)
    mix, weight = torch.randn(192, 192, generator=draw), torch.randn(50, 192, generator=draw)
    x, others = (torch.randn(600, 192, generator=draw) @ mix for _ in range(2))
    errors = []
    for made in (quantize(weight, **options), compensated(weight, x, **options)):
        difference = others @ (made.dequantize(torch.float32) - weight).T
        errors.append((difference.norm() / (others @ weight.T).norm()).item())
        assert made.shape == weight.shape
    assert errors[1] < 0.8 * errors[0]


def test_a_text_makes_a_quantised_model_say_more_nearly_the_same() -> None:
    model = GPT.from_pretrained()
    assert model.tokenizer is not None
    ids = torch.tensor([model.tokenizer.encode(_TEXT)])
    half = ids.shape[1] // 2
    expected = model(ids[:, half:]).logits.log_softmax(-1)
    found = []
    for read in (None, ids[:, :half]):
        made = GPT.from_pretrained()
        quantize_model(made, Quantization.make(made.config, "int4"), read)
        assert sum(isinstance(m, QuantizedLinear) for m in made.modules()) == 4 * made.config.n_layer + 1
        logits = made(ids[:, half:]).logits.log_softmax(-1)
        found.append((expected.exp() * (expected - logits)).sum(-1).mean().item())
    assert found[1] < 0.8 * found[0]


def test_texts_that_cannot_be_read_change_nothing(folder: Path) -> None:
    made = GPT.from_pretrained(folder)
    before = made.state_dict()
    ids = torch.zeros(1, 65, dtype=torch.int64)
    for format, read, message in (
        ("int8", ids, r"ids has shape \(1, 65\)"),
        ("int8", ids[0], r"ids has shape \(65,\)"),
        ("fp8", ids[:, :9], "the format is fp8"),
        ("int8", ids[:, :9] + 97, "input_ids holds 97"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_model(made, Quantization.make(CONFIG, format), read)
        assert made.quantization is None and made.state_dict().keys() == before.keys()


@pytest.mark.parametrize("reading", [False, True], ids=["alone", "by a text"])
@pytest.mark.parametrize(
    ("format", "value", "message"),
    [
        ("int8", float("nan"), "is nan; finite numbers"),
        ("int8", float("-inf"), "is inf; finite numbers"),
        ("int4", float("nan"), "is nan; finite numbers"),
        ("int4", 7e4, "is 70000; int4 holds up to 65504: take int8"),
    ],
)
def test_a_weight_that_no_format_holds_is_named_and_nothing_is_changed(
    format: str, value: float, message: str, reading: bool, folder: Path
) -> None:
    """The last layer's: all before it are as they were."""
    model = GPT.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.h[-1].mlp.c_proj.weight[3, 5] = value
    before = dict(model.named_modules())
    ids = torch.zeros(1, 8, dtype=torch.int64) if reading else None
    with pytest.raises(ValueError, match=rf"quantize: a weight of transformer.h.1.mlp.c_proj {message}"):
        quantize_model(model, Quantization.make(model.config, format), ids)
    assert dict(model.named_modules()) == before and model.quantization is None


@pytest.mark.slow
@pytest.mark.ci
def test_perplexity_hardly_changes(shared_data: Path) -> None:
    text = (shared_data / "tinyshakespeare.txt").read_text()
    held_out = text[len(text) * 9 // 10 :][:40_000]

    # fp32: bf16 takes many times as long on a processor without its instructions
    def perplexity(**options: Any) -> float:
        model = GPT.from_pretrained(dtype=torch.float32, **options)
        return model.score(held_out, stride=256)[0].perplexity

    with ops.backend("reference"):
        plain = perplexity()
        changes = {kind_of(options): perplexity(**options) / plain - 1 for options in KINDS}
    print(plain, changes)
    assert abs(changes["int8"]) < 0.005 and abs(changes["fp8"]) < 0.005
    assert abs(changes["int4"]) < 0.03 and abs(changes["int4 32 False"]) < 0.03
