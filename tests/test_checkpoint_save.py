"""Saving: transformers opens it, the bytes come back, and no kill leaves less than a whole model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OpenAIGPTLMHeadModel,
)

from gptkern import GPTConfig
from gptkern.checkpoint import CheckpointError
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer
from gptkern.train.checkpoints import plain_model

HERE = Path(__file__).parent
TINY = GPTConfig(vocab_size=300, n_positions=16, n_layer=2, n_head=2, n_embd=16)
CONFIGS = {
    "gpt2": TINY,
    "untied": TINY.replace(tie_word_embeddings=False),
    "switches": TINY.replace(
        n_inner=40,
        activation_function="relu",
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        layer_norm_epsilon=1e-3,
        eos_token_id=(3, 5),
        bos_token_id=None,
    ),
    "no_biases": TINY.replace(bias=False),
    "gpt1": TINY.replace(model_type="openai-gpt"),
    "gpt1_untied": TINY.replace(
        model_type="openai-gpt", tie_word_embeddings=False, activation_function="silu"
    ),
    "gpt1_no_biases": TINY.replace(model_type="openai-gpt", bias=False),
}
SHARDS = ("5GB", "10KB")
SLOW_SCENARIOS = ("same_shape", "other_shape", "from_shards", "new_folder")


def build(config: GPTConfig, seed: int = 0) -> GPT:
    """Weights of which none is zero or one."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("max_shard_size", SHARDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_opens_it(name: str, max_shard_size: str, tmp_path: Path) -> None:
    model = build(CONFIGS[name])
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is (OpenAIGPTLMHeadModel if model.config.post_norm else GPT2LMHeadModel)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.randint(300, (2, 16))
    with torch.no_grad():
        assert (theirs.eval()(ids).logits - model(ids).logits).abs().max() <= 1e-5
    assert theirs.config.eos_token_id in (model.config.eos_token_id, list(model.config.eos_token_ids))


@pytest.mark.parametrize("max_shard_size", SHARDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_save_load_save_is_byte_identical(
    name: str, dtype: torch.dtype, max_shard_size: str, tmp_path: Path
) -> None:
    model = build(CONFIGS[name]).to(dtype)
    model.tokenizer = Tokenizer.bytes()
    model.save_pretrained(tmp_path / "a", max_shard_size=max_shard_size)
    again = GPT.from_pretrained(tmp_path / "a")
    assert again.config == model.config
    assert again.dtype == dtype
    for (name_a, a), (name_b, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name_a == name_b
        assert torch.equal(a, b)
    again.save_pretrained(tmp_path / "b", max_shard_size=max_shard_size)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    build(TINY).save_pretrained(tmp_path, max_shard_size=12_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert {path.name for path in shards} == set(index["weight_map"].values())
    tensors = [safetensors.torch.load_file(path) for path in shards]
    sizes = [sum(t.numel() * t.element_size() for t in shard.values()) for shard in tensors]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 12_000 or len(shard) == 1 for size, shard in zip(sizes, tensors, strict=True))


def test_what_is_replaced_and_what_stays(tmp_path: Path) -> None:
    build(TINY).save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "events").write_text("log")
    for name in ("README.md", "pytorch_model.bin", "model-final.safetensors", "optimizer.pt"):
        (tmp_path / name).write_text(name)
    kept = tmp_path.stat().st_ino
    model = build(TINY, seed=1)
    model.tokenizer = Tokenizer.bytes()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("runs", "README.md", "pytorch_model.bin", "model-final.safetensors", "optimizer.pt"),
    }
    assert (tmp_path / "runs" / "events").read_text() == "log"
    assert tmp_path.stat().st_ino == kept
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).tokenizer is not None


def test_bad_arguments_change_nothing(tmp_path: Path) -> None:
    model = build(TINY)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: a folder is needed, a file is there"):
        model.save_pretrained(tmp_path / "file")
    for size in ("5 apples", 0, "0GB", -1, "GB"):
        with pytest.raises(CheckpointError, match="max_shard_size is"):
            model.save_pretrained(tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(TINY).save_pretrained(tmp_path)
    before = files(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptkern.checkpoint.save.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        build(TINY, seed=1).save_pretrained(tmp_path)
    assert files(tmp_path) == before


def test_what_was_read_is_written_back(tmp_path: Path) -> None:
    """Everything that transformers kept for this model, and what only its owner knows."""
    kept = {
        "pad_token_id": 7,
        "eos_token_id": [3, 5],
        "id2label": {0: "bad", 1: "good"},
        "label2id": {"bad": 0, "good": 1},
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "summary_first_dropout": 0.25,
        "n_ctx": 16,
        "mine": {"deep": [1, None, "é"]},
    }
    config = GPT2Config(
        vocab_size=300, n_positions=16, n_layer=1, n_head=2, n_embd=16, bos_token_id=1, **kept
    )
    theirs = GPT2LMHeadModel(config)
    theirs.generation_config = GenerationConfig(
        pad_token_id=7, eos_token_id=[3, 5], bos_token_id=1, do_sample=True, top_k=9, mine="too"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    # code of another model, which does not come along
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "own.Config"}}))
    model = GPT.from_pretrained(tmp_path / "theirs")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "ours")
    again = GPT2Config.from_pretrained(tmp_path / "ours")
    for name, value in kept.items():
        assert getattr(again, name) == value, name
    before = GPT2Config.from_pretrained(tmp_path / "theirs").to_dict()
    del before["auto_map"]
    assert again.to_dict() == before | {"dtype": "bfloat16", "bias": True}
    assert str(again.dtype) == "torch.bfloat16"
    assert "auto_map" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    found = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert found.to_diff_dict() == theirs.generation_config.to_diff_dict()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generation_config.top_k == 9
    model = GPT.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "third")
    assert files(tmp_path / "ours") == files(tmp_path / "third")
    assert model.generation_config["mine"] == "too"
    # what a training run saves is such a copy
    plain_model(model).save_pretrained(tmp_path / "third")
    assert files(tmp_path / "ours") == files(tmp_path / "third")


def test_changed_defaults_of_generate_are_saved(tmp_path: Path) -> None:
    model = build(TINY)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    model.generation_config["max_new_tokens"] = 3
    model.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).generation_config["max_new_tokens"] == 3
    # the file belongs to the model that it was saved with
    build(TINY).save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    model.generation_config["max_new_tokens"] = torch.tensor(3)
    with pytest.raises(CheckpointError, match="generation_config cannot be written as JSON"):
        model.save_pretrained(tmp_path)


def test_the_head_stays_tied(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = GPT(TINY)
    with pytest.raises(CheckpointError, match="is on the meta device: it has no values yet"):
        model.save_pretrained(tmp_path / "a")
    model.to_empty(device="cpu")
    assert model.lm_head.weight is model.transformer.wte.weight
    source = build(TINY)
    model.load_state_dict(source.state_dict())
    model.save_pretrained(tmp_path / "a")
    source.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with torch.device("meta"):
        untied = GPT(TINY.replace(tie_word_embeddings=False))
    untied.to_empty(device="cpu")
    assert untied.lm_head.weight is not untied.transformer.wte.weight


def test_a_head_that_came_apart(tmp_path: Path) -> None:
    """Two equal matrices are saved once; two that differ would make a folder that does not load."""
    model = build(TINY)
    model.save_pretrained(tmp_path / "tied")
    model.lm_head.weight = torch.nn.Parameter(model.transformer.wte.weight.detach().clone())
    model.save_pretrained(tmp_path / "equal")
    assert files(tmp_path / "tied") == files(tmp_path / "equal")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and transformer\.wte\.weight differ"):
        model.save_pretrained(tmp_path / "tied")
    assert files(tmp_path / "tied") == files(tmp_path / "equal")
    model.config = model.config.replace(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "untied")
    assert torch.equal(GPT.from_pretrained(tmp_path / "untied").lm_head.weight, model.lm_head.weight)
    # the other way round: one matrix, of a model whose head is its own
    model.lm_head.weight = model.transformer.wte.weight
    model.save_pretrained(tmp_path / "untied")
    found = GPT.from_pretrained(tmp_path / "untied")
    assert torch.equal(found.lm_head.weight, found.transformer.wte.weight)


def test_dtypes_that_no_file_holds(tmp_path: Path) -> None:
    model = build(TINY)
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight.to(torch.complex64))
    with pytest.raises(CheckpointError, match=r"wpe\.weight is torch\.complex64; supported are torch"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "scenario",
    ["to_shards", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_SCENARIOS)],
)
def test_killed_at_every_file_operation(scenario: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "kill_save.py", scenario, tmp_path / "model"],
        env={"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    by_operation, by_size = results[:-7], results[-7:]
    assert set(results) == {"old", "new"}
    # one moment, before which a kill leaves the old model and after which the new one
    assert by_operation == sorted(by_operation, reverse=True)
    assert by_operation.count("old") > 10
    assert by_operation.count("new") > 5
    assert by_size[0] == "old"


@pytest.mark.slow
def test_killed_at_any_time(tmp_path: Path) -> None:
    """By the clock, with files large enough that most kills come in the middle of writing."""
    config = GPTConfig(vocab_size=8000, n_positions=64, n_layer=2, n_head=8, n_embd=512)
    old, new = build(config, seed=1), build(config, seed=2)
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    new.save_pretrained(tmp_path / "model")
    script = (
        "import sys; from gptkern.gpt import GPT\n"
        "models = [GPT.from_pretrained(path) for path in sys.argv[1:3]]\n"
        "print('ready', flush=True)\n"
        "while True:\n    for model in models: model.save_pretrained(sys.argv[3])\n"
    )
    expected = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("old", "new")]
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", script, tmp_path / "old", tmp_path / "new", tmp_path / "model"],
            env={"PYTHONPATH": str(HERE.parent), "PATH": ""},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5 * float(torch.rand((), generator=generator)))
        process.kill()
        process.wait()
        GPT.from_pretrained(tmp_path / "model")
        seen.add(expected.index((tmp_path / "model" / "model.safetensors").read_bytes()))
    assert seen == {0, 1}
