"""The command line between pipes, terminals and closed streams."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gptkern.cli
from gptkern.cli import quantize as quantize_command
from gptkern.cli import terminal
from gptkern.config import GPTConfig
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer
from gptkern.train.logs import Log, Progress

ROOT = Path(__file__).parents[1]
HOSTILE = "a\x1b]52;c;aGk=\x07b\x9b2Jc\x7f"  # to the clipboard, clear the screen by C1, delete


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model over bytes, saved."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 256, "n_positions": 64, "n_layer": 1, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**sizes, initializer_range=0.5, bos_token_id=None, eos_token_id=None))
    model.tokenizer = Tokenizer.bytes()
    path = tmp_path_factory.mktemp("models") / "bytes"
    model.save_pretrained(path)
    return str(path)


def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    """``python -m gptkern`` as a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment |= {"PYTHONPATH": str(ROOT)} | more.pop("env", {})
    command = [sys.executable, "-m", "gptkern", *arguments]
    return subprocess.run(command, env=environment, timeout=200, check=False, **more)


def closing(*streams: int) -> Any:
    """What a shell's ``>&-`` does."""

    def close() -> None:
        for stream in streams:
            os.close(stream)

    return close


class Typed(io.TextIOWrapper):
    """Standard input that holds ``text``."""

    def __init__(self, text: str, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(text.encode()), encoding="utf-8")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run_command(*arguments: str, stdin: str = "", person: bool = False) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Typed(stdin, person))
        code = gptkern.cli.run(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def test_a_closed_standard_input_is_an_empty_one() -> None:
    done = run("generate", preexec_fn=closing(0), capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith(b"gptkern: Invalid value: no prompt")
    assert done.stderr.count(b"\n") == 1


def test_a_closed_standard_output_is_told() -> None:
    done = run("--help", preexec_fn=closing(1), stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"gptkern: standard output is closed: there is nowhere to write\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told() -> None:
    with Path("/dev/full").open("wb") as full:
        done = run("--help", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"gptkern: No space left on device\n"


@pytest.mark.parametrize("arguments", [("--help",), ("generate", "To be", "-n", "20", "-m", "{}")])
def test_a_reader_that_goes_is_no_failure(folder: str, arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run(*(a.replace("{}", folder) for a in arguments), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Broken" not in done.stderr


def test_what_an_encoding_lacks_is_replaced_and_messages_never_reach_the_text(folder: str) -> None:
    arguments = ("generate", "é☃", "-m", folder, "-n", "2", "--greedy", "--echo")
    done = run(*arguments, preexec_fn=closing(2), stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.startswith(b"??")
    assert b"tokens/s" not in done.stdout


def test_a_terminal_is_not_commanded(folder: str) -> None:
    shown, ours = pty.openpty()
    done = run("generate", HOSTILE, "-m", folder, "-n", "1", "--echo", stdout=ours, stderr=ours)
    os.close(ours)
    text = os.read(shown, 65536)
    os.close(shown)
    assert done.returncode == 0
    assert b"a\\x1b]52;c;aGk=\\x07b\\x9b2Jc\\x7f" in text
    assert b"\x1b" not in text
    assert "\x9b".encode() not in text


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_are_spelled_out_on_terminals_alone() -> None:
    assert terminal.visible(HOSTILE, _Terminal()) == "a\\x1b]52;c;aGk=\\x07b\\x9b2Jc\\x7f"
    assert terminal.visible("one\n\ttwo é ☃", _Terminal()) == "one\n\ttwo é ☃"
    assert terminal.visible("a\rb", _Terminal()) == "a\\x0db"
    assert terminal.visible(HOSTILE, io.StringIO()) == HOSTILE


def test_messages_and_tables_are_filtered_too(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = _Terminal(), _Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert gptkern.cli.run(["info", str(tmp_path / "\x1b]0;title\x07")]) == 1
    assert "\\x1b]0;title\\x07" in err.getvalue()
    assert "\x1b" not in err.getvalue()


def test_paths_and_samples_of_a_run_are_filtered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = _Terminal(), _Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    run_folder = tmp_path / HOSTILE
    run_folder.mkdir()
    (run_folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert gptkern.cli.run(["plot", str(run_folder)]) == 0
    Progress(0, 1, shown=True, bar=False).say(f"ROMEO: {HOSTILE}")
    for shown in (out.getvalue(), err.getvalue()):
        assert terminal.visible(HOSTILE, _Terminal()) in shown
        assert "]52;c" not in shown.replace("\\x1b]52;c", "")


def test_a_runs_links_have_no_other_file_written(command: Any, tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (folder / "plot.png").symlink_to(other)
    other.write_text("mine")
    code, _, err = command("plot", str(folder))
    assert code == 1
    assert "a link to" in err
    (folder / "log.jsonl").unlink()
    (folder / "log.jsonl").symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="a link to"):
        Log(folder, 0, tensorboard=False)
    assert other.read_text() == "mine"
    assert not (tmp_path / "new").exists()
    assert command("plot", str(folder), "--out", str(tmp_path / "named.png"))[0] == 1  # no log


def test_json_keeps_every_character(command: Any, folder: str) -> None:
    _, out, _ = command("generate", HOSTILE, "-m", folder, "-n", "1", "--json")
    assert json.loads(out)["prompt"] == HOSTILE


def test_the_line_break_that_ends_a_text_is_no_part_of_the_prompt(
    command: Any, folder: str, tmp_path: Path
) -> None:
    common = ("-m", folder, "-n", "3", "--greedy", "--json")

    def prompt(*arguments: str, stdin: str = "") -> str:
        code, out, err = command("generate", *arguments, *common, stdin=stdin)
        assert code == 0, err
        return str(json.loads(out)["prompt"])

    assert prompt("-", stdin="To be\n") == "To be"
    assert prompt(stdin="To be\r\n") == "To be"
    assert prompt(stdin="To be\n\n") == "To be\n"
    assert prompt("To be\n") == "To be\n"
    file = tmp_path / "prompt"
    file.write_bytes(b"\xef\xbb\xbfTo be\n")  # as Windows' editor writes it
    assert prompt("--file", str(file)) == "To be"


def test_text_that_is_not_utf8_is_named_with_its_place(command: Any, folder: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(b"To be \xff or")
    code, _, err = command("generate", "--file", str(file), "-m", folder)
    assert (code, err) == (1, f"gptkern: {file}: not UTF-8 text: byte 0xff at offset 6\n")


@pytest.fixture
def chatting(command: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A chat at a terminal, and the prompts that its model was given."""
    prompts: list[str] = []
    real = GPT.stream

    def stream(self: GPT, prompt: str, **options: Any) -> Any:
        prompts.append(prompt)
        return real(self, prompt, **options)

    monkeypatch.setattr(GPT, "stream", stream)

    def chat(stdin: str, person: bool = True) -> tuple[int, str, list[str]]:
        arguments = ("chat", "-m", folder, "--you", "A", "--bot", "B", "-n", "6", "--greedy")
        code, _, err = command(*arguments, stdin=stdin, person=person)
        return code, err, prompts

    return chat


def test_ctrl_c_stops_the_answer_and_not_the_chat(chatting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = terminal.write

    def interrupted(text: str, end: str = "\n") -> None:
        counted(text, end)
        if end == "":
            monkeypatch.setattr(terminal, "write", counted)
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "write", interrupted)
    code, _, prompts = chatting("one\ntwo\n")
    assert code == 0
    assert len(prompts) == 2
    assert prompts[1].startswith("A: one\nB: ")


def test_ctrl_c_ends_a_chat_that_nobody_types(chatting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(text: str, end: str = "\n") -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "write", interrupted)
    assert chatting("one\ntwo\n", person=False)[0] == 130


def test_ctrl_c_at_the_prompt_keeps_the_chat(chatting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: Iterator[Any] = iter([KeyboardInterrupt(), "one", EOFError()])

    def typed(_: str) -> str:
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr("builtins.input", typed)
    code, err, prompts = chatting("")
    assert (code, len(prompts)) == (0, 1)
    assert err.count("Ctrl-C stops an answer") == 2


def test_a_message_that_is_too_long_is_a_message(chatting: Any) -> None:
    code, err, prompts = chatting("hi\n" + "x" * 80 + "\nshort\n")
    assert code == 0
    assert "the message has 86 tokens with what stands before it; the context is 64" in err
    assert [prompt[-8:] for prompt in prompts] == ["A: hi\nB:", "short\nB:"]
    assert prompts[1].startswith("A: hi\nB: "), "a refused message forgets nothing"


def test_quantize_replaces_no_model_unasked(command: Any, folder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    GPT.from_pretrained(folder).save_pretrained(out)
    before = (out / "config.json").read_bytes()
    arguments = ("quantize", folder, "--weights", "int8", "--out", str(out))
    code, _, err = command(*arguments)
    assert (code, err) == (1, f"gptkern: quantize: {out} holds a model already; --overwrite replaces it\n")
    assert (out / "config.json").read_bytes() == before
    assert command(*arguments, "--overwrite")[0] == 0
    assert GPT.from_pretrained(out).quantization is not None
    code, _, err = command("quantize", folder, "--weights", "int8", "--out", str(out / "config.json"))
    assert (code, "a folder is needed" in err) == (1, True)


def test_quantize_saves_before_it_measures(
    command: Any, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.write_text("to be or not to be, " * 20)
    arguments = ("quantize", folder, "--weights", "int8", "--text", str(text), "--text-tokens", "150")
    code, out, _ = command(*arguments, "--out", str(tmp_path / "a"))
    assert code == 0
    assert "of 150 tokens" in out

    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_command, "_perplexity", interrupted)
    assert command(*arguments, "--out", str(tmp_path / "b"))[0] == 130
    assert GPT.from_pretrained(tmp_path / "b").quantization is not None


def test_quantizes_perplexity_is_that_of_every_token(folder: str) -> None:
    model = GPT.from_pretrained(folder)
    ids = torch.randint(256, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    done: list[int] = []
    found = quantize_command._perplexity(model, ids, done.append)
    logprobs: list[float] = []
    for begin in range(0, 150, 32):
        window = torch.tensor([ids[max(0, begin - 32) : begin + 32]])
        rows = model(window).logits[0, :-1].float().log_softmax(-1)
        chosen = rows.gather(1, window[0, 1:, None])[:, 0]
        logprobs += chosen[-len(ids[begin : begin + 32]) :].tolist()
    assert len(logprobs) == 149
    assert found == pytest.approx(float(torch.tensor(-sum(logprobs) / 149).exp()), rel=1e-5)
    assert sum(done) == 150
