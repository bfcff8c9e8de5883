"""Fine-tuning: low-rank adaptation, classification, the examples, the commands."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gptkern.cli
from gptkern.checkpoint import CheckpointError
from gptkern.config import GPTConfig
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer
from gptkern.train import Settings, SettingsError, Trainer, add_lora, merge_lora, train
from gptkern.train.find import _search, find_batch, find_lr, suggest
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


def test_classification(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "classes.jsonl"
    rows = [{"text": f"it is {w} {i}", "label": w} for i in range(20) for w in ("good", "bad", "odd")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = tuning(model_folder, data, "classes", train={"steps": 60})
    result = train(settings, tmp_path / "run")
    assert result.metrics["accuracy"] > 0.9
    classifier = Classification.from_pretrained(tmp_path / "run" / "model")
    assert classifier.classify(["it is odd 3", "it is good 7"]) == ["odd", "good"]
    assert gptkern.cli.run(["generate", "it", "-n", "2", "-m", str(tmp_path / "run")]) == 0
    assert "is a classifier, and its language model alone writes this" in capsys.readouterr().err
    labels = tmp_path / "run" / "model" / "labels.json"
    for content, message in (
        ("{}", "a list of labels is needed, {} found"),
        ("[1, 2, 3]", r"a list of labels is needed, \[1, 2, 3\] found"),
        ("[" * 100_000, "no labels of a classifier"),
        ('["a", "b"]', r"classifier\.safetensors: weight of shape \(2, 16\) is needed"),
    ):
        labels.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            Classification.from_pretrained(labels.parent)
    labels.unlink()
    with pytest.raises(CheckpointError, match=r"labels\.json: no such file"):
        Classification.from_pretrained(labels.parent)


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
    batch = find_batch(settings.replace("train", batch_size=5), tmp_path / "b")
    assert batch.speeds.keys() == {1, 2, 4, 5}
    assert batch.suggestion in batch.speeds
    assert batch.limit == "batch_size"


def test_learning_rate_before_the_first_clear_minimum() -> None:
    """Steepest at 1e-3, a minimum at 1e-2; the lower one that follows at 0.3 is not where to begin."""
    rates = [10 ** (-6 + 0.06 * i) for i in range(101)]

    def curve(rate: float, second: float) -> float:
        place = math.log10(rate)
        first = -1.0 / (1.0 + math.exp(-4.0 * (place + 3.0)))
        return 4.0 + first + 0.4 / (1.0 + math.exp(-20.0 * (place + 1.8))) - second * math.exp(
            -40.0 * (place + 0.5) ** 2
        )  # fmt: skip

    for second in (0.0, 0.3, 0.8):
        losses = [curve(rate, second) + 1e-3 * (-1) ** i for i, rate in enumerate(rates)]
        assert 5e-4 < suggest(rates, losses) < 2e-3
    # no minimum at all: it falls to the end
    falling = [4.0 - 1.0 / (1.0 + math.exp(-4.0 * (math.log10(rate) + 2.0))) for rate in rates]
    assert 5e-3 < suggest(rates, falling) < 2e-2
    with pytest.raises(SettingsError, match="no learning rate lowers the loss"):
        suggest(rates, [3.0 + rate for rate in rates])


@pytest.mark.slow
def test_learning_rate_of_the_shipped_configuration(shared_data: Path, tmp_path: Path) -> None:
    """Its 2e-3 is the best of those that were trained to the end."""
    settings = Settings.from_file(ROOT / "configs" / "shakespeare_char_cpu.toml")
    found = find_lr(settings.replace("data", path=[str(shared_data / "tinyshakespeare.txt")]), tmp_path)
    assert 7e-4 < found.suggestion < 5e-3


@pytest.mark.parametrize(
    ("largest", "fitting", "tried", "limit"),
    [
        (12, 99, [1, 2, 4, 8, 12], "batch_size"),
        (1, 99, [1], "batch_size"),
        (8, 99, [1, 2, 4, 8], "batch_size"),
        (4096, 40, [1, 2, 4, 8, 16, 32, 64, 48, 40, 44], "memory"),
        (12, 10, [1, 2, 4, 8, 12, 10, 11], "memory"),
        (12, 0, [1], "memory"),
    ],
)
def test_search_of_batch_sizes(largest: int, fitting: int, tried: list[int], limit: str) -> None:
    seen: list[int] = []

    def fits(size: int) -> bool:
        seen.append(size)
        return size <= fitting

    assert _search(fits, largest, lambda: False) == limit
    assert seen == tried
    seen.clear()
    assert _search(fits, 4096, lambda: len(seen) == 3) == ("time" if fitting >= 4 else "memory")
    assert len(seen) <= 3


def test_quantised_models_are_not_trained(model_folder: Path, tmp_path: Path) -> None:
    GPT.from_pretrained(model_folder, weights="int8").save_pretrained(tmp_path / "int8")
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    with pytest.raises(SettingsError, match="int8 is quantised to int8, and its matrices cannot be trained"):
        train(tuning(tmp_path / "int8", data, "text"), tmp_path / "run")


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


def run_example(name: str, *arguments: object, code: int = 0) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == code, finished.stderr[-3000:]
    return finished.stderr if code else finished.stdout


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
    again = run_example("finetune_sentiment.py", "--out", tmp_path, "--model", model_folder, code=1)
    assert again.startswith(f"{tmp_path / 'run'} holds a run")
    assert "Traceback" not in again


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
    assert run([*command, "--resume"]) == 1
    assert f"{out}: no checkpoint to go on from" in capsys.readouterr().err
    assert run(command) == 0
    told = capsys.readouterr().err
    assert "parameters, on cpu in float32" in told
    assert "tokens to train on" in told
    assert told.count("val_loss") == 2
    assert f"gptkern generate --model {out / 'best'}" in told
    assert run(["generate", "To", "--model", str(out), "-n", "2"]) == 0, capsys.readouterr().err
    assert run(["plot", str(out)]) == 0
    assert (out / "plot.png").exists()
    assert run(command) == 1
    assert "holds a run, step-00000004" in capsys.readouterr().err
    assert run([*command, "--resume"]) == 0
    assert "is at step 4 of 4: nothing is left to do" in capsys.readouterr().err
    assert run([*command, "--resume", "--steps", "3"]) == 1
    assert "is at step 4 already; [train] steps is 3" in capsys.readouterr().err
    assert run([*command, "--resume", "--steps", "6", "-q"]) == 0
    told = capsys.readouterr().err
    assert told.count("val_loss") == 1
    assert "━" not in told
    assert run([*command[:-1], "gpu"]) == 1
    assert "[train] device is 'gpu'; 'cuda', 'cuda:N', 'cpu' or '' is needed" in capsys.readouterr().err
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_where_it_saved(
    number: int,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gptkern.cli import run

    (tmp_path / "text.txt").write_text(TEXT)
    config = tmp_path / "config.toml"
    config.write_text(
        '[model]\nn_layer = 1\nn_head = 2\nn_embd = 16\n[data]\ntokenizer = "char"\ncontext = 16\n'
        f'path = "{tmp_path / "text.txt"}"\n[train]\nsteps = 9\nbatch_size = 2\ndevice = "cpu"\n'
    )
    step = Trainer.step

    def interrupted(self: Trainer, at: int, *rest: Any) -> Any:
        if at == 2:
            os.kill(os.getpid(), number)
        return step(self, at, *rest)

    monkeypatch.setattr(Trainer, "step", interrupted)
    out = tmp_path / "run"
    assert run(["train", str(config), "--out", str(out), "-q"]) == code
    told = capsys.readouterr().err
    saved = next((out / "checkpoints").iterdir())
    assert f"saved: {saved}" in told
    assert "the same command with --resume" in told
