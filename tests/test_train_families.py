"""Training models of other families: from scratch, from a checkpoint, by LoRA, resumed, by two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS
from family_models import library_model
from test_train_processes import assert_equal_runs, run_settings, run_together
from transformers import AutoModelForCausalLM, LlamaConfig

from gptkern import GPT
from gptkern.model.families import FAMILIES
from gptkern.train import Settings, SettingsError, Trainer, train
from gptkern.train.processes import processes
from gptkern.train.shape import fresh_config

LLAMAS = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
GPTS = {"n_embd": 24, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
FOURS = {name: value for name, value in LLAMAS.items() if name != "num_key_value_heads"}
SHAPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("llama", "smollm3", "mistral", "qwen2", "phi3", "granite", "olmo2", "starcoder2"), LLAMAS
    ),
    **dict.fromkeys(("qwen3", "gemma3_text"), LLAMAS | {"head_dim": 8}),
    "gpt_neox": FOURS | {"rotary_pct": 0.67},
    "gptj": GPTS | {"rotary_dim": 4},
    "opt": {name: value for name, value in FOURS.items() if name != "intermediate_size"} | {"ffn_dim": 40},
    "gpt_bigcode": GPTS,
    "starcoder2": LLAMAS,
}
# One configuration of each family, of those that are compared with transformers.
ONE_OF_EACH = {name.partition(",")[0]: config for name, config in reversed(CONFIGS.items())}
ONE_OF_EACH["llama"] = LlamaConfig(
    vocab_size=67,
    hidden_size=48,
    intermediate_size=88,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
    tie_word_embeddings=True,
)


def settings_for(folder: Path, family: str, **tables: dict[str, Any]) -> dict[str, Any]:
    model = {"family": family, **SHAPES[family], **tables.pop("model", {})}
    return {**run_settings(folder, **tables), "model": model}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return GPT.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_model_is_trained_and_transformers_opens_it(family: str, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, family, train={"steps": 12}, optimizer={"lr": 1e-2})
    result = train(Settings.from_dict(settings), tmp_path / "run")
    assert result.metrics["val_loss"] < 4.6  # a fresh model's: log 256 = 5.55
    ours = GPT.from_pretrained(tmp_path / "run" / "model")
    assert (ours.spec.context, ours.spec.vocab_size) == (16, 256)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", attn_implementation="eager")
    ids = torch.tensor([list(b"To be, or not to")])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_fine_tuning_ends_at_the_weights_that_transformers_ends_at(name: str, tmp_path: Path) -> None:
    theirs = library_model(ONE_OF_EACH[name])
    theirs.save_pretrained(tmp_path / "start")
    data = tmp_path / "shard.bin"
    data.write_bytes(
        torch.randint(67, (800,), generator=torch.Generator().manual_seed(5)).short().numpy().tobytes()
    )
    settings = Settings.from_dict(
        {
            "model": {"from": str(tmp_path / "start"), "dropout": 0.0},
            "data": {"kind": "bin", "path": str(data), "val_path": str(data), "context": 16},
            "train": {"steps": 3, "batch_size": 4, "device": "cpu", "grad_clip": 0.0},
            "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 0.1, "momentum": 0.0},
            "schedule": {"name": "constant"},
            "checkpoint": {"every": 0},
        }
    )
    train(settings, tmp_path / "run")
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    with processes("cpu") as group:
        source = Trainer(settings, tmp_path / "again", group).source
    for step in range(3):
        batch = source.training_batch(step, 4)
        logits = theirs(batch.ids).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch.targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "expected")
    found, expected, start = (saved(tmp_path / part) for part in ("run/model", "expected", "start"))
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        moved = (weight - start[key]).norm()
        assert moved > 0, key
        assert (found[key] - weight).norm() <= 1e-3 * moved, key


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_that_of_all_rates_of_the_family(family: str) -> None:
    spec = fresh_config({"family": family, **SHAPES[family], "dropout": 0.3, "vocab_size": 9}, 16, None).spec
    residual = family in ("gptj", "opt", "gpt_neox", "gpt_bigcode", "phi3", "starcoder2")
    embedding = family in ("gptj", "gpt_neox", "gpt_bigcode", "starcoder2")
    rates = (spec.attention_dropout, spec.residual_dropout, spec.embedding_dropout)
    assert rates == (0.3, 0.3 * residual, 0.3 * embedding)


def test_a_rate_that_is_given_by_itself_stays() -> None:
    model = {"family": "opt", **SHAPES["opt"], "vocab_size": 9}
    spec = fresh_config({**model, "dropout": 0.3, "attention_dropout": 0.1}, 16, None).spec
    assert (spec.residual_dropout, spec.attention_dropout) == (0.3, 0.1)
    # Without a wish a family's own default, as transformers has it
    assert fresh_config(model, 16, None).spec.residual_dropout == 0.1


def test_dropout_of_a_checkpoint_is_changed_by_its_familys_names(tmp_path: Path) -> None:
    library_model(ONE_OF_EACH["opt"]).save_pretrained(tmp_path / "start")
    settings = settings_for(tmp_path, "opt", data={"tokenizer": "char"}, train={"steps": 1})
    settings["model"] = {"from": str(tmp_path / "start"), "dropout": 0.25}
    train(Settings.from_dict(settings), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["dropout"], config["attention_dropout"]) == (0.25, 0.25)


def test_special_tokens_are_the_tokenizers_and_defaults_beyond_the_vocabulary_are_not_taken() -> None:
    model = {"family": "smollm3", **SHAPES["smollm3"]}
    config = fresh_config({**model, "vocab_size": 9, "eos_token_id": 3}, 16, None)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (3,), None)
    with pytest.raises(SettingsError, match="vocab_size is needed"):
        fresh_config(model, 16, None)


_QWEN = {"family": "qwen2", **SHAPES["qwen2"]}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"family": "lama"}, r"\[model\] family is 'lama'; known are llama, smollm3"),
        ({"family": 3}, r"\[model\] family is 3; the name of a family"),
        ({"family": "llama"}, r"\[model\] hidden_size, intermediate_size, num_hidden_layers, num_attention_"),
        ({"family": "gptj", "n_embd": 8}, r"\[model\] n_layer, n_head of a gptj are needed"),
        ({**_QWEN, "n_embd": 8}, r"\[model\] n_embd is not a field that a qwen2 of this shape goes by"),
        ({**_QWEN, "num_kv_heads": 8}, "num_kv_heads .*did you mean 'num_key_value_heads'"),
        ({**_QWEN, "sliding_window": 4}, "sliding_window .*did you mean 'use_sliding_window'"),
        (
            {**_QWEN, "num_key_value_heads": 3},
            r"\[model\] qwen2: num_key_value_heads is 3; a divisor of the 4",
        ),
        ({**_QWEN, "hidden_act": "tanh"}, r"\[model\] qwen2: hidden_act is 'tanh'; accepted are"),
        (
            {**_QWEN, "rope_parameters": {"rope_type": "su"}},
            r"\[model\] qwen2: rope_parameters has rope_type",
        ),
        ({**_QWEN, "num_experts": 4}, r"\[model\] config: num_experts is 4: mixtures of experts"),
        ({**_QWEN, "from": "x"}, r"\[model\] from is given, so the shape is the checkpoint's: remove family"),
    ],
)
def test_shapes_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_dict({"model": model})


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_lora_changes_its_targets_alone(name: str, tmp_path: Path) -> None:
    library_model(ONE_OF_EACH[name]).save_pretrained(tmp_path / "start")
    settings = settings_for(tmp_path, "llama", data={"tokenizer": "char"}, train={"steps": 2})
    targets = ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"]
    settings |= {"model": {"from": str(tmp_path / "start")}, "lora": {"rank": 2, "targets": targets}}
    train(Settings.from_dict(settings), tmp_path / "run")
    before, after = saved(tmp_path / "start"), saved(tmp_path / "run" / "model")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.removesuffix(".weight").endswith(tuple(targets))}


@pytest.mark.parametrize("family", ["qwen3", "gptj"])
def test_a_resumed_run_ends_at_the_same_bits(family: str, tmp_path: Path) -> None:
    dropout = {"dropout": 0.1}
    settings = settings_for(tmp_path, family, model=dropout, train={"steps": 8}, checkpoint={"every": 4})
    train(Settings.from_dict(settings), tmp_path / "whole")
    half = Settings.from_dict(settings)
    steps = []

    def stop(trainer: Trainer) -> None:
        step = trainer.step

        def counted(at: int, *rest: Any) -> Any:
            steps.append(at)
            return step(at, *rest, at == 4)  # type: ignore[call-arg]

        trainer.step = lambda at, batch, stop=False: counted(at, batch)  # type: ignore[method-assign]

    assert not train(half, tmp_path / "broken", started=stop).finished
    assert steps == [0, 1, 2, 3, 4]
    assert train(half, tmp_path / "broken", resume=True).finished
    whole, broken = (saved(tmp_path / part / "model") for part in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


def two_equal_one(family: str, strategy: str, folder: Path) -> None:
    together = {"steps": 6, "strategy": strategy, "micro_batch_size": 1}
    # A softmax does not see the bias of keys that are not rotated: its gradient is rounding alone, and AdamW
    # would follow it with the usual 1e-8.
    optimizer = {"lr": 1e-3, "eps": 1e-6}
    settings = settings_for(folder, family, model={"dropout": 0.0}, train=together, optimizer=optimizer)
    run_together(settings, folder / "two", 2)
    train(Settings.from_dict(settings), folder / "one")
    assert_equal_runs(folder / "one", folder / "two")


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_equal_one(tmp_path: Path) -> None:
    two_equal_one("qwen3", "fsdp", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_equal_one_in_every_family(family: str, strategy: str, tmp_path: Path) -> None:
    two_equal_one(family, strategy, tmp_path)
