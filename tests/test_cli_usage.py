"""What the command line says of itself: help, mistakes, exit codes, JSON, the list of models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import gptkern.cli
from gptkern.cli import terminal
from gptkern.cli.usage import _example

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run_command(*arguments: str) -> tuple[int, str, str]:
        code = gptkern.cli.run(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("generate x -n abc", "'abc' is not a whole number (gptkern generate --help tells more)"),
        ("generate x -n 0", "0 given; 1 or more is needed"),
        ("generate x --dtype fp16", "'--dtype': 'fp16' is not one of 'float32'"),
        ("generate x -t warm", "'warm' is not a number"),
        ("inspect --arch new", "'new' is not a whole number"),
        ("profile", 'as in: gptkern profile "ROMEO:" (gptkern profile --help tells more)'),
        ("quantize embedded", "as in: gptkern quantize gpt2 --weights int8 --out gpt2-int8"),
        ("train", "as in: gptkern train shakespeare_char_cpu --data story.txt --out runs/story"),
        ("verify", "as in: gptkern verify gpt2"),
        ("plot", "as in: gptkern plot runs/shakespeare"),
    ],
)
def test_mistakes_name_the_value_and_what_is_accepted(run: Any, arguments: str, told: str) -> None:
    code, out, err = run(*arguments.split())
    assert (code, out) == (2, "")
    assert told in err
    assert "Value error" not in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            "--greedy --num-samples 2",
            "--num-samples is 2, --num-beams 1: more than one sequence needs samp",
        ),
        ("-n 100000", "--max-new-tokens is 100000, the prompt has 1 tokens"),
        ("--top-k -2", "--top-k is -2; 0 or more is needed"),
        ("--temperature nan", "--temperature is nan; a number above 0 (--greedy takes"),
        (
            "--num-beams 3 -t 0.5 -n 2",
            "generate: --temperature has no effect without sampling, which --gr",
        ),
    ],
)
def test_generates_messages_speak_in_flags(run: Any, arguments: str, told: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = gptkern.cli._show_warning
        _, _, err = run("generate", "x", *arguments.split())
    assert told in err
    assert "do_sample" not in err


@pytest.mark.parametrize("command", gptkern.cli.COMMANDS)
def test_every_command_shows_an_example_or_needs_nothing(run: Any, command: str) -> None:
    code, out, _ = run("help", command)
    assert code == 0
    assert out == run(command, "-h")[1] == run(command, "--help")[1]
    assert _example(command) is not None or command == "doctor"


def test_help_says_what_the_exit_codes_mean(run: Any) -> None:
    _, out, _ = run("help")
    words = " ".join(out.split())
    assert "Exit codes: 0 it is done; 1 it could not be done" in words
    assert "130 Ctrl-C stopped it" in words


@pytest.mark.parametrize("error", [KeyboardInterrupt, gptkern.cli.typer.Abort])
def test_ctrl_c_ends_the_line(
    error: type[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> Any:
        def app(**_: Any) -> None:
            raise error

        return app

    monkeypatch.setattr(gptkern.cli, "build", build)
    assert gptkern.cli.run(["info"]) == 130
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert gptkern.cli.run(["info"]) == 130
    assert capsys.readouterr().err == "\n"


def test_models_tells_what_is_here_and_what_opens(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(name: str, config: str | None, *files: str) -> None:
        repository = tmp_path / f"models--{name}"
        folder = repository / "snapshots" / "abc"
        folder.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        for file in files:
            (folder / file).write_bytes(b"0123456789")
        if config is not None:
            (folder / "config.json").write_text(config)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    assert [model["name"] for model in json.loads(run("models", "--json")[1])["models"]] == ["embedded"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached("openai-community--gpt2", '{"model_type": "gpt2"}', "model.safetensors")
    cached("some--llama", '{"model_type": "mamba"}', "model.safetensors")
    cached("no--weights", '{"model_type": "gpt2"}')
    cached("no--config", None, "model.safetensors")
    cached("bad--config", "[", "model.safetensors")
    code, out, _ = run("models", "--json")
    assert code == 0
    told = json.loads(out)
    assert {model["name"]: model["problem"] for model in told["models"]} == {
        "embedded": "",
        "bad/config": "no config.json in the cache",
        "no/config": "no config.json in the cache",
        "no/weights": "no weights in the cache",
        "openai-community/gpt2": "",
        "some/llama": "model_type 'mamba'",
    }
    assert any("gpt2" in line for line in told["supported"])
    _, out, _ = run("models")
    assert "some/llama" in out and "not supported: model_type 'mamba'" in out
    assert "llm.c" in out


@pytest.mark.parametrize("command", gptkern.cli.COMMANDS)
def test_what_a_script_reads_is_json(run: Any, command: str) -> None:
    """Those without have their result in a file, or speak with a person."""
    without = {"chat", "serve", "train", "plot", "tune"}
    assert ("--json" in run(command, "--help")[1]) == (command not in without)


def test_messages_are_one_line_whatever_they_hold(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.tell("two\n  lines")
    assert capsys.readouterr().err == "gptkern: two lines\n"


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_info_fits_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert gptkern.cli.run(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= max(columns, 32)  # the longest name is a word of 32
    assert " ".join(" ".join(lines).split()).endswith("3,072 bytes a token, 1.6 MB a full context")
    assert ("KV cache in float16:" in lines) == (columns < 80)


def test_doctor_tells_gptkerns_own_version(run: Any) -> None:
    found = {item["subject"]: item["text"] for item in json.loads(run("doctor", "--json")[1])}
    assert found["gptkern"] == gptkern.__version__


def test_a_prompt_of_another_locale_is_utf8(run: Any) -> None:
    kept_aside = "é".encode().decode("ascii", "surrogateescape")  # what the locale C makes of it
    code, out, _ = run("generate", kept_aside, "-n", "3", "--json")
    assert code == 0
    assert json.loads(out)["prompt"] == "é"


def test_an_extension_of_another_version_is_told_in_a_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(_: str) -> dict[str, Any]:
        raise ImportError("gptkern._C has other statuses: build the extension again")

    monkeypatch.setattr("gptkern.cli.info.describe", describe)
    assert run("info") == (1, "", "gptkern: gptkern._C has other statuses: build the extension again\n")
    monkeypatch.setattr("gptkern.cli.info.describe", lambda _: exec("from json import nothing"))
    with pytest.raises(ImportError, match="nothing"):
        run("info")


def test_a_shell_completes_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        typed = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", "from gptkern.cli import main; main()"]
        environment = {**os.environ, **typed, "_GPTKERN_COMPLETE": "complete_bash"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=200, check=True
        )
        return done.stdout.split()

    assert completed("gptkern gen") == ["generate"]
    assert completed("gptkern generate --top") == ["--top-k", "--top-p"]
