"""``gptkern chat`` with a model that has a chat template, and the commands within a conversation."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gptkern.cli
from gptkern.config import GPTConfig
from gptkern.engine.engine import Engine
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}\n"
    "{% if m.role == 'system' and 'forbidden' in m.content %}{{ raise_exception('no such system') }}"
    "{% endif %}\n"
    "[{{ m.role[0] }}]{{ m.content }}\n{% endfor %}\n{% if add_generation_prompt %}[a]{% endif %}"
)

Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model over bytes whose end-of-text token is the byte of a line break."""
    torch.manual_seed(1)
    model = GPT(
        GPTConfig(
            vocab_size=256,
            n_positions=128,
            n_layer=1,
            n_head=2,
            n_embd=32,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=10,
        )
    )
    model.tokenizer = Tokenizer(Tokenizer.bytes()._backend, chat_template=TEMPLATE)
    path = tmp_path_factory.mktemp("models") / "chat"
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def chat(folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chat:
    def run(stdin: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = gptkern.cli.run(["chat", folder, "-n", "6", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that models are given, as text."""
    seen: list[str] = []
    real = GPT.stream

    def stream(self: GPT, prompt: list[int], **options: Any) -> Any:
        assert "stop_strings" not in options, "the end-of-text token ends an answer"
        seen.append(bytes(prompt).decode(errors="replace"))
        return real(self, prompt, **options)

    monkeypatch.setattr(GPT, "stream", stream)
    return seen


def test_the_template_makes_the_prompt(chat: Chat, prompts: list[str]) -> None:
    code, out, err = chat("one\ntwo\n/reset\nthree\n", "--greedy", "--system", "Be kind.")
    assert (code, "no chat template" in err) == (0, False)
    assert prompts[0] == "[s]Be kind.\n[u]one\n[a]"
    assert prompts[1].startswith("[s]Be kind.\n[u]one\n[a]") and prompts[1].endswith("\n[u]two\n[a]")
    assert prompts[2] == "[s]Be kind.\n[u]three\n[a]"
    answers = [line.removeprefix("Bot: ") for line in out.splitlines() if line.startswith("Bot: ")]
    assert f"[a]{answers[0].strip()}\n" in prompts[1]


def test_a_turn_computes_only_what_is_new(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []
    real = Engine.__init__

    def noted(self: Engine, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        engines.append(self)

    monkeypatch.setattr(Engine, "__init__", noted)
    assert chat("x" * 80 + "\n/regen\n", "--greedy")[0] == 0
    assert engines[-1].load.prefix_hits >= 64, "a page of the prompt was found"


def test_regen_asks_again(chat: Chat, prompts: list[str]) -> None:
    code, _, err = chat("one\n/regen\n/regen\n", "--seed", "1")
    assert (code, prompts) == (0, ["[u]one\n[a]"] * 3)
    assert "stays the same" not in err
    code, out, err = chat("one\n/regen\n", "--greedy")
    assert "the answer stays the same" in err
    assert len(set(out.strip().split("Bot: ")[1:])) <= 2
    code, _, err = chat("/regen\n")
    assert (code, "nothing was answered yet" in err) == (1, True)


def test_regen_draws_another_answer(chat: Chat) -> None:
    _, out, _ = chat("one\n/regen\n", "--seed", "1", "--temperature", "5", "--top-k", "0", "--top-p", "1")
    first, second = out.split("Bot: ")[1:]
    assert first != second


def test_save_writes_messages_and_replaces_no_other_file(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    code, _, err = chat(f"hello\n/save {file}\nmore\n/save {file}\n", "--greedy", "--system", "Ünder")
    assert code == 0, err
    messages = json.loads(file.read_text(encoding="utf-8"))
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 2]
    assert messages[:2] == [{"role": "system", "content": "Ünder"}, {"role": "user", "content": "hello"}]
    before = file.read_bytes()
    code, _, err = chat(f"other\n/save {file}\n", "--greedy")
    assert (code, "exists: name another file" in err, file.read_bytes()) == (1, True, before)
    code, _, err = chat(f"other\n/save {tmp_path}/no/folder.json\n", "--greedy")
    assert (code, "No such file" in err) == (1, True)


def test_what_the_template_refuses_is_told_before_anybody_types(chat: Chat, prompts: list[str]) -> None:
    code, out, err = chat("never read\n", "--system", "forbidden")
    assert (code, out, prompts) == (1, "", [])
    assert "chat template, line 2 (" in err and "no such system" in err


def test_a_model_without_a_template_says_so(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT.from_pretrained(folder)
    model.tokenizer = Tokenizer.bytes()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi\n")))
    assert gptkern.cli.run(["chat", str(tmp_path), "-n", "3", "--greedy"]) == 0
    assert "the model has no chat template" in capsys.readouterr().err


def test_one_model_is_named_once(chat: Chat) -> None:
    code, _, err = chat("", "--model", "gpt2")
    assert (code, "MODEL and --model: give one of them" in err) == (2, True)


def test_help_lists_the_commands(chat: Chat) -> None:
    code, _, err = chat("/help\n/unknown\n/save\n")
    assert code == 0
    for command in ("/regen", "/reset", "/save FILE", "/help", "/exit"):
        assert err.count(command) == 3
