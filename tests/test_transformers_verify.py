"""gptkern verify: a checkpoint passes, a wrong computation does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

transformers = pytest.importorskip("transformers")
from families import CONFIGS
from family_models import library_model

import gptkern
from gptkern import cli
from gptkern.engine.sampling import Sampler
from gptkern.transformers import verify


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=53, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_verified(
    tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["verify", str(checkpoint(tmp_path, dtype)), "--cases", "3", "--no-speed"]) == 0
    told = capsys.readouterr().out
    assert "9 of 9 comparisons agree" in told
    assert "engine" in told


def test_a_wrong_forward_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = verify.load(str(checkpoint(tmp_path)), dtype=None, device=torch.device("cpu"))
    verification = verify.Verification(model)
    with torch.no_grad():
        verification.gptkern.transformer.h[0].mlp.c_fc.bias.add_(0.05)
    failed = {check.what for check in verification.checks(2) if not check.ok}
    assert {"logits", "gradients"} <= failed


# (seed, batch, tokens, padding) of texts with which single layers of a Gemma 3 are beyond twice the library's
# error; in the last one a token sees itself alone, and gradients of queries and keys are nothing.
SHORT = [(6, 3, 3, 1), (9, 2, 20, 4), (10, 3, 2, 0), (19, 3, 2, 0), (22, 1, 8, 7)]


def gradient_errors(found: verify.Verification, text: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """A text's (error, allowed) of each parameter over all layers, by the reference."""
    seed, batch, seq, padding = text
    ids = torch.randint(67, (batch, seq), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    with gptkern.backend("reference"):
        gradients = [
            verify._forward_backward(model, ids, mask)[1]
            for model in (found.gptkern, found.library, found.exact)
        ]
    ulp = torch.finfo(found.library.dtype).eps
    errors = verify._gradient_errors(*gradients, ulp)
    return {name: (mine, 2 * its + ulp) for name, (mine, its) in errors.items()}


def test_gradients_of_few_roundings_are_measured_over_all_layers() -> None:
    found = verify.Verification(library_model(CONFIGS["gemma3"]).bfloat16())
    for text in SHORT:
        for name, (error, allowed) in gradient_errors(found, text).items():
            assert error <= allowed, (text, name)
    # A fault of one layer among seven, in the gradient with the largest errors, is no rounding.
    weight = found.gptkern.model.layers[6].self_attn.k_norm.weight
    weight.register_hook(lambda gradient: 1.2 * gradient)
    error, allowed = gradient_errors(found, SHORT[1])["model.layers.self_attn.k_norm.weight"]
    assert error > allowed


def test_wrong_tokens_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = verify.load(str(checkpoint(tmp_path)), dtype=None, device=torch.device("cpu"))
    right = Sampler.draw

    def wrong(self: Sampler, rows: Any, logits: torch.Tensor, *drafts: Any) -> Any:
        return right(self, rows, logits.flip(-1), *drafts)

    monkeypatch.setattr(Sampler, "draw", wrong)
    failed = {check.what for check in verify.Verification(model).checks(2) if not check.ok}
    assert failed == {"tokens"}


def test_speed_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.ceilings, "measure", lambda device: verify.ceilings.Ceilings(1e9, {}))
    model = verify.load(str(checkpoint(tmp_path)), dtype=None, device=torch.device("cpu"))
    found = verify.Verification(model).speed()
    assert found.library > 0
    assert found.gptkern > 0
    assert found.floor == pytest.approx(sum(p.numel() * 4 for p in model.parameters()) / 1e9)


def test_the_embedded_model_is_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", "embedded", "--cases", "1", "--no-speed"]) == 0
    assert "3 of 3 comparisons agree" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_quantised_checkpoints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers gives random weights for one, which agree with themselves."""
    gptkern.GPT.from_pretrained(checkpoint(tmp_path / "dense"), weights="int8").save_pretrained(
        tmp_path / "int8"
    )
    assert cli.run(["verify", str(tmp_path / "int8"), "--cases", "1", "--no-speed"]) == 1
    told = "was quantised by gptkern, which transformers does not read"
    assert told in capsys.readouterr().err
    with pytest.raises(ValueError, match=told):
        gptkern.transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "int8")
    random = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match=told):
        gptkern.accelerate(random)


def test_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ckpt.pt").touch()
    assert cli.run(["verify", str(tmp_path / "ckpt.pt")]) == 1
    assert "is a file; verify takes a folder that transformers opens" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_neox"])
def test_other_families_are_verified(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library_model(CONFIGS[name]).save_pretrained(tmp_path)
    assert cli.run(["verify", str(tmp_path), "--cases", "2", "--no-speed"]) == 0
    assert "6 of 6 comparisons agree" in capsys.readouterr().out


def test_other_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**shape, intermediate_size=8, num_key_value_heads=1)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert cli.run(["verify", str(tmp_path)]) == 1
    assert "mixtures of experts are not served" in capsys.readouterr().err


def test_weights_that_are_not_there_are_no_agreement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers draws what it does not find; the two models would be the same random ones."""
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    config.save_pretrained(tmp_path)
    save_file({"something.else": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert cli.run(["verify", str(tmp_path), "--no-speed"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "1 layers expected, 0 found" in told.err
