"""The public face: one table of names, which ``dir``, ``help``, ``__all__`` and type checkers agree with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gptkern
import gptkern.bench
import gptkern.transformers

ROOT = Path(__file__).parents[1]
# What a user may write, every line checked by mypy --strict.
PROGRAM = """
import gptkern
import torch
from gptkern import GPT, GPTConfig, Tokenizer
from gptkern.ops import flash_attention, layer_norm

model: GPT = GPT(GPTConfig(vocab_size=256, n_positions=8, n_layer=1, n_head=1, n_embd=32))
ids = torch.tensor([[1, 2, 3]])
output: gptkern.GPTOutput = model(ids)
text: str = model.generate_text("a", max_new_tokens=2)[0].text
pieces: list[str] = list(model.stream("a", max_new_tokens=2, temperature=0.5))
tokens: list[int] = Tokenizer.bytes().encode("hi")
total: float = model.score("abc")[0].total
normed: torch.Tensor = layer_norm(torch.ones(2, 4), torch.ones(4))
settings = gptkern.train.Settings()
steps: int = settings.train.steps
gptkern.testing.check(layer_norm, [(torch.ones(2, 4), torch.ones(4))])
with gptkern.backend("reference"):
    attended = flash_attention(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16))
"""
MISTAKE = "gptkern.Tokenizer.bytes().encode(3)\n"


@pytest.mark.parametrize(
    "package", [gptkern, gptkern.bench, gptkern.transformers], ids=lambda package: package.__name__
)
def test_every_public_name_is_reached_and_listed(package: object) -> None:
    homes, listed = package._HOMES, package.__all__  # type: ignore[attr-defined]
    assert sorted(homes) == sorted(listed)
    assert set(listed) <= set(dir(package))
    for name in listed:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_every_package_of_the_tree_is_public_or_named_as_inner() -> None:
    inner = {"assets", "cli", "engine", "eval", "model"}
    packages = {path.parent.name for path in (ROOT / "gptkern").glob("*/__init__.py")}
    assert packages - inner <= set(gptkern.__all__)


def process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, **environment},
    )


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
import pydoc
import gptkern
page = pydoc.plain(pydoc.render_doc(gptkern))
assert "accelerate(model" in page and "class GPT(" in page, page[:500]
for call in (lambda: gptkern.accelerate(None), lambda: gptkern.restore(None),
             lambda: gptkern.transformers.GPT2LMHeadModel):
    try:
        call()
    except ModuleNotFoundError as error:
        assert "pip install 'gptkern[transformers]'" in str(error), error
        assert error.name == "transformers"
    else:
        raise AssertionError("no error")
from gptkern import *
"""


def test_help_and_star_work_without_transformers() -> None:
    done = process(WITHOUT_TRANSFORMERS)
    assert done.returncode == 0, done.stderr


def test_modules_are_reached_from_the_package_alone() -> None:
    done = process(
        "import gptkern; gptkern.testing.check; gptkern.train.Settings; gptkern.quantize.Quantization; "
        "gptkern.generate.stream; gptkern.bench; gptkern.checkpoint.CheckpointError"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.ci
def test_a_users_program_is_type_checked(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(PROGRAM)
    bad.write_text(PROGRAM + MISTAKE)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--cache-dir",
            str(tmp_path / "cache"),
            str(good),
            str(bad),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    assert lines[0].startswith("bad.py") and '"int"; expected "str"' in lines[0]
