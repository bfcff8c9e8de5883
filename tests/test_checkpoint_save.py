"""Saving: transformers opens it, the bytes come back, and no kill leaves less than a whole model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, OpenAIGPTLMHeadModel

from gptkern import GPTConfig
from gptkern.checkpoint import CheckpointError
from gptkern.model import GPT
from gptkern.tokenizer import Tokenizer

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
        "import sys; from gptkern.model import GPT\n"
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
