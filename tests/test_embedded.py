"""The model in the package: its size, its held-out bits per byte, and that any prompt works."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gptkern import GPT

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "gptkern" / "assets" / "embedded"
REPORT = json.loads((FOLDER / "report.json").read_text())


@pytest.fixture(scope="module")
def training() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_embedded", ROOT / "examples" / "train_embedded.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def held_out(shared_data: Path) -> torch.Tensor:
    text = (shared_data / "tinyshakespeare.txt").read_bytes()
    return torch.frombuffer(bytearray(text[len(text) * 9 // 10 :]), dtype=torch.uint8).long()


def test_weights_are_small_and_the_model_is_what_the_script_makes(training: ModuleType) -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_000_000
    model = GPT.from_pretrained()
    for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
        assert getattr(model.config, name) == getattr(training.CONFIG, name)
    assert sum(p.numel() for p in model.parameters()) == REPORT["parameters"]
    assert model.dtype == torch.bfloat16


def test_part_of_the_held_out_text(shared_data: Path, training: ModuleType) -> None:
    model = GPT.from_pretrained(dtype=torch.float32)
    assert training.bits_per_byte(model, held_out(shared_data)[:8192]) < 2.35


@pytest.mark.slow
@pytest.mark.ci
def test_the_held_out_text_has_the_bits_that_are_reported(shared_data: Path, training: ModuleType) -> None:
    model = GPT.from_pretrained(dtype=torch.float32)
    found = training.bits_per_byte(model, held_out(shared_data))
    assert found == pytest.approx(REPORT["held_out_bits_per_byte"], abs=2e-3)
    assert found < 2.35
    assert f"{found:.2f} bits per byte" in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.parametrize("prompt", ["ROMEO:", "日本語 😀", "\x00\n", "É" * 200])
def test_any_prompt_works(prompt: str) -> None:
    (completion,) = GPT.from_pretrained().generate_text([prompt], max_new_tokens=8, do_sample=True, seed=1)
    assert len(completion.token_ids) == 8
