"""Fine-tuning: low-rank adaptation, classification, the examples, the commands."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptkern.config import GPTConfig
from gptkern.model import GPT
from gptkern.tokenizer import Tokenizer
from gptkern.train import Settings, SettingsError, add_lora, merge_lora, train
from gptkern.train.find import find_batch, find_lr
from gptkern.train.objective import Classification
from gptkern.train.plot import plot_run

ROOT = Path(__file__).parent.parent
TEXT = "To be, or not to be: that is the question.\n" * 60


def small_model() -> GPT:
    config = GPTConfig(
        vocab_size=256, n_positions=64, n_layer=2, n_head=2, n_embd=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT(config)
    model.tokenizer = Tokenizer.bytes()
    return model


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    small_model().save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def tuning(model: Path, path: Path, kind: str, **tables: dict[str, Any]) -> Settings:
    base: dict[str, dict[str, Any]] = {
        "model": {"from": str(model)},
        "data": {"kind": kind, "path": str(path), "context": 32, "val_fraction": 0.2},
        "train": {"steps": 20, "batch_size": 8, "device": "cpu"},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 0},
    }
    return Settings.from_dict({name: base.get(name, {}) | tables.get(name, {}) for name in base | tables})


def test_lora_changes_nothing_at_first_and_merges() -> None:
    model = small_model().eval()
    ids = torch.randint(256, (2, 10))
    before = model(ids).logits
    names = add_lora(model, 4, 8.0, ["c_attn", "mlp.c_fc"])
    assert len(names) == 4
    assert torch.equal(model(ids).logits, before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all(name.endswith((".a", ".b")) for name in trained)
    attention = model.transformer.h[0].attn.c_attn
    update = attention.parametrizations.weight[0]
    torch.nn.init.normal_(update.b)
    expected = attention.parametrizations.weight.original + 2.0 * update.b @ update.a
    torch.testing.assert_close(attention.weight, expected)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, before)
    merge_lora(model)
    torch.testing.assert_close(model(ids).logits, adapted)
    assert set(model.state_dict()) == set(small_model().state_dict())


def test_lora_refusals() -> None:
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(small_model(), 0, 1.0, ["c_attn"])
    with pytest.raises(ValueError, match="ends in 'attn_c'"):
        add_lora(small_model(), 2, 1.0, ["attn_c"])


def test_lora_run_is_merged_saved_and_resumed(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}", "answer": "yes"}) + "\n" for i in range(40)))
    lora = {"rank": 4, "alpha": 8.0, "targets": ["c_attn", "c_proj"]}
    settings = tuning(model_folder, data, "pairs", lora=lora)
    whole = train(settings, tmp_path / "whole")
    half = settings.replace("train", steps=20)
    train(half.replace("checkpoint", every=10), tmp_path / "again")
    assert whole.metrics["val_loss"] < 5.4  # the fresh model's: log 256 = 5.55
    tuned = GPT.from_pretrained(tmp_path / "whole" / "model").state_dict()
    start = GPT.from_pretrained(model_folder).state_dict()
    changed = {name for name in start if not torch.equal(start[name], tuned[name])}
    assert changed == {n for n in start if n.endswith(("c_attn.weight", "c_proj.weight"))}
    newest = tmp_path / "again" / "checkpoints" / "step-00000020"
    for path in newest.iterdir():
        path.unlink() if path.is_file() else [p.unlink() for p in path.iterdir()] and path.rmdir()
    newest.rmdir()
    train(half.replace("checkpoint", every=10), tmp_path / "again", resume=True)
    resumed = GPT.from_pretrained(tmp_path / "again" / "model").state_dict()
    assert all(torch.equal(tuned[name], resumed[name]) for name in tuned)


def test_classification(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "classes.jsonl"
    rows = [{"text": f"it is {w} {i}", "label": w} for i in range(20) for w in ("good", "bad", "odd")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = tuning(model_folder, data, "classes", train={"steps": 60})
    result = train(settings, tmp_path / "run")
    assert result.metrics["accuracy"] > 0.9
    classifier = Classification.from_pretrained(tmp_path / "run" / "model")
    assert classifier.classify(["it is odd 3", "it is good 7"]) == ["odd", "good"]


def test_a_context_beyond_the_models_is_refused(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    with pytest.raises(SettingsError, match="context is 100; the model's is 64"):
        train(tuning(model_folder, data, "text", data={"context": 100}), tmp_path / "run")


def test_find_lr_and_batch(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    settings = tuning(model_folder, data, "text")
    found = find_lr(settings, tmp_path / "a", tries=40)
    assert 1e-5 < found.suggestion < 0.5
    assert len(found.rates) == len(found.losses)
    batch = find_batch(settings, tmp_path / "b", largest=4)
    assert {1, 2, 4} <= batch.speeds.keys()
    assert batch.suggestion in batch.speeds


def test_plot(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 3.0 / s, "lr": 0.1, "grad_norm": 1.0, "val_loss": 3.1 / s} for s in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_run(tmp_path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SettingsError, match="no log of a run"):
        plot_run(tmp_path / "nothing", tmp_path / "plot.png")


def test_plot_of_odd_logs_and_names(tmp_path: Path) -> None:
    folder = tmp_path / r"a$\bad$"
    folder.mkdir()
    log = folder / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0, "lr": "high"}\n{"step": 2, "lo')
    plot_run(folder, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for line in ("3", '["step"]', "null", '{"loss": 1}', '{"step": "x"}', "words"):
        log.write_text('{"step": 1, "loss": 2.0}\n' + line + '\n{"step": 2}\n')
        with pytest.raises(SettingsError, match=r"log\.jsonl, line 2: not a line of a run's log"):
            plot_run(folder, tmp_path / "plot.png")


def run_example(name: str, *arguments: object) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_example_pretrain(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 3)
    out = run_example("pretrain.py", tmp_path / "text.txt", "--out", tmp_path / "run", "--steps", 20)
    assert "held-out loss" in out


def test_example_train_embedded_saves_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = runpy.run_path(str(ROOT / "examples" / "train_embedded.py"))
    inner = names["main"].__globals__
    monkeypatch.setitem(inner, "bits_per_byte", lambda *data: 1.0)
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "text.txt"), "--out", str(tmp_path / "model")])
    model = small_model()
    model.tokenizer = None
    monkeypatch.setitem(inner, "train", lambda *data: model)
    names["main"]()
    assert len(GPT.from_pretrained(tmp_path / "model").generate_text("RO", max_new_tokens=2)) == 1


def test_example_sentiment(model_folder: Path, tmp_path: Path) -> None:
    out = run_example("finetune_sentiment.py", "--out", tmp_path, "--model", model_folder)
    assert "held-out accuracy" in out


def test_example_qa(model_folder: Path, tmp_path: Path) -> None:
    out = run_example("finetune_qa.py", "--out", tmp_path, "--model", model_folder, "--steps", 20)
    assert "held-out loss" in out


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gptkern.cli import run

    (tmp_path / "text.txt").write_text(TEXT)
    config = tmp_path / "config.toml"
    config.write_text(
        '[model]\nn_layer = 1\nn_head = 2\nn_embd = 16\n[data]\ntokenizer = "char"\ncontext = 16\n'
        "[train]\nsteps = 4\nbatch_size = 2\n[eval]\nevery = 2\n"
    )
    out = tmp_path / "run"
    command = [
        "train",
        str(config),
        "--data",
        str(tmp_path / "text.txt"),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    assert run(command) == 0
    assert run(["plot", str(out)]) == 0
    assert (out / "plot.png").exists()
    assert run(command) == 1
    assert "holds a run at step 4" in capsys.readouterr().err
    assert run([*command, "--resume"]) == 0
    config.write_text("[trian]\n")
    assert run(command) == 1
    assert "did you mean 'train'" in capsys.readouterr().err


def test_classifying_has_no_dropout_whatever_the_mode() -> None:
    drops = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    shape = {"vocab_size": 256, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**shape, **drops, initializer_range=0.5))
    model.tokenizer = Tokenizer.bytes()
    classifier = Classification(model, ["a", "b", "c"])
    texts = [f"text {number}" for number in range(30)]
    assert classifier.training
    assert classifier.classify(texts) == classifier.classify(texts) == classifier.eval().classify(texts)
    assert len(set(classifier.classify(texts))) > 1
