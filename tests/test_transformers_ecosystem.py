"""What people do with transformers around the model: Trainer, pipelines, adapters, the tutorial."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import gptkern
import gptkern.transformers as drop_in

EXAMPLE = Path(__file__).parent.parent / "examples" / "transformers_drop_in.py"


def build(**changes: Any) -> Any:
    torch.manual_seed(5)
    options = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    tokens = {"bos_token_id": 63, "eos_token_id": 63}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(options | dropout | tokens | changes)))


def trained(model: Any, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of 30 steps of the library's Trainer, and the weights after them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 63, (16, 12), generator=generator)
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=30,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_trainer_gives_the_same_losses(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = build()
    accelerated = gptkern.accelerate(copy.deepcopy(model))
    expected, weights = trained(model, tmp_path / "theirs")
    found, ours = trained(accelerated, tmp_path / "ours")
    assert len(found) == 30
    assert found == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0]
    for name, weight in weights.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-3, rtol=1e-3)


def test_pipeline_output_is_equal(shared_data: Path) -> None:
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    model = build(vocab_size=50257, bos_token_id=50256, eos_token_id=50256).eval()
    texts = []
    for _ in range(2):
        generator = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        found = generator(["Once upon a time", "The"], max_new_tokens=8, do_sample=False, pad_token_id=50256)
        texts.append([entry[0]["generated_text"] for entry in found])
        gptkern.accelerate(model)
    assert texts[0] == texts[1]


def test_lora_trains_and_merges() -> None:
    peft = pytest.importorskip("peft")
    ids = torch.randint(0, 63, (2, 10))
    results = []
    for accelerated in (False, True):
        model = build().eval()
        if accelerated:
            gptkern.accelerate(model)
        torch.manual_seed(2)
        config = peft.LoraConfig(
            r=4, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
        )
        adapted = peft.get_peft_model(model, config)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(4):
            loss = adapted(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        with pytest.warns(drop_in.FallbackWarning) if accelerated else _quiet():
            tokens = adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        merged = adapted.merge_and_unload()
        assert gptkern.explain(merged)[4].route == ("engine" if accelerated else "library")
        results.append(
            (losses, tokens, merged.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
        )
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-4)
    assert results[0][0][-1] < results[0][0][0]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])


def _quiet() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_the_tutorial_runs_with_its_import_line_changed(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    model = build(vocab_size=50257, n_positions=64, bos_token_id=50256, eos_token_id=50256)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path)])
    printed = []
    for source in ("gptkern.transformers", "transformers"):
        script = tmp_path / f"{source}.py"
        script.write_text(
            EXAMPLE.read_text().replace("from gptkern.transformers import", f"from {source} import")
        )
        torch.manual_seed(0)
        capsys.readouterr()
        found = runpy.run_path(str(script))
        printed.append(capsys.readouterr().out)
        assert found["output"].shape[1] <= 50
        assert type(found["model"]).__module__.startswith(source)
    assert printed[0] == printed[1]
    assert printed[0].startswith("Once upon a time")


@pytest.mark.slow
def test_compiled_it_computes_the_same() -> None:
    model = build().eval()
    ids = torch.randint(0, 63, (2, 8))
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(gptkern.accelerate(model), backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
