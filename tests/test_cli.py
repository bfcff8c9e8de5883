"""The command line: what it prints, what it refuses, how it begins."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import gptkern.cli
from gptkern import _checkout, _native
from gptkern.cli import doctor as doctor_command
from gptkern.cli import info as info_command
from gptkern.cli._conversation import Transcript
from gptkern.cli._generation import unescape
from gptkern.config import GPTConfig
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model over bytes, saved."""
    torch.manual_seed(1)
    config = GPTConfig(
        vocab_size=256,
        n_positions=64,
        n_layer=1,
        n_head=2,
        n_embd=32,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT(config)
    model.tokenizer = Tokenizer.bytes()
    path = tmp_path_factory.mktemp("models") / "bytes"
    model.save_pretrained(path)
    return str(path)


class Run:
    """What a command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run_command(*arguments: str, stdin: str | None = None) -> Run:
        if stdin is not None:
            import io

            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = gptkern.cli.run(list(arguments))
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run_command


def test_a_prompt_is_continued(run: Any, folder: str) -> None:
    done = run("generate", "To be", "-m", folder, "-n", "12", "--greedy")
    assert done.code == 0
    expected = GPT.from_pretrained(folder).generate_text("To be", max_new_tokens=12)[0].text
    assert done.out == expected + "\n"
    assert re.fullmatch(r"12 tokens in [\d.]+ s: [\d.]+ tokens/s on cpu\n", done.err)
    assert run("generate", "To be", "-m", folder, "-n", "12", "-t", "0").out == done.out
    assert run("generate", "To be", "-m", folder, "-n", "12", "--greedy", "--echo").out == "To be" + done.out


def test_a_prompt_comes_from_a_file_or_stdin(run: Any, folder: str, tmp_path: Path) -> None:
    common = ("-m", folder, "-n", "5", "--greedy")
    expected = run("generate", "To be", *common).out
    (tmp_path / "prompt").write_text("To be")
    assert run("generate", "--file", str(tmp_path / "prompt"), *common).out == expected
    assert run("generate", "-", *common, stdin="To be").out == expected
    assert run("generate", *common, stdin="To be").out == expected


def test_without_a_length_it_fits_what_is_left(run: Any, folder: str) -> None:
    done = run("generate", "x" * 60, "-m", folder)
    assert done.err.startswith("4 tokens")


def test_seeds_are_told_and_repeat_the_text(run: Any, folder: str) -> None:
    first = run("generate", "To be", "-m", folder, "-n", "20")
    seed = re.search(r"seed (\d+)", first.err)
    assert seed
    again = run("generate", "To be", "-m", folder, "-n", "20", "--seed", seed[1])
    assert again.out == first.out
    assert run("generate", "To be", "-m", folder, "-n", "20", "--seed", "7").out != first.out


def test_samples_as_json_and_as_text(run: Any, folder: str) -> None:
    common = ("generate", "To be", "-m", folder, "-n", "8", "--seed", "5", "--num-samples", "3")
    made = [json.loads(line) for line in run(*common, "--json").out.splitlines()]
    assert len(made) == 3
    assert {m["prompt"] for m in made} == {"To be"}
    assert len({m["text"] for m in made}) == 3
    assert all(len(m["token_ids"]) == len(m["logprobs"]) == 8 for m in made)
    assert {m["finish_reason"] for m in made} == {"length"}
    text = run(*common).out
    assert all(f"--- {i} of 3 ---\n{m['text']}\n" in text for i, m in enumerate(made, 1))


def test_every_sampling_option_arrives(run: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stream(self: GPT, prompt: str, **options: Any) -> Any:
        seen.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(GPT, "stream", stream)
    given = "-n 3 --min-new-tokens 2 -t 0.5 --top-k 3 --top-p 0.4 --min-p 0.1 --typical-p 0.6"
    rest = r"--repetition-penalty 1.5 --seed 9 --stop \n --stop END"
    more = "--presence-penalty 0.2 --frequency-penalty -0.3 --no-repeat-ngram-size 4"
    more += " --epsilon-cutoff 0.01 --eta-cutoff 0.02 --speculate 2 --kv-cache-dtype fp8"
    assert run("generate", "a", "-m", folder, *given.split(), *rest.split(), *more.split()).code == 1
    assert seen == {
        "max_new_tokens": 3,
        "min_new_tokens": 2,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.4,
        "min_p": 0.1,
        "typical_p": 0.6,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.02,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "no_repeat_ngram_size": 4,
        "seed": 9,
        "stop_strings": ["\n", "END"],
        "num_return_sequences": 1,
        "speculate": 2,
        "kv_cache_dtype": "fp8",
    }


def test_a_checkpoint_has_its_word(
    run: Any, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options, then generation_config.json, then the command's own defaults."""
    shutil.copytree(folder, tmp_path / "m")
    said = {"temperature": 0.3, "repetition_penalty": 1.2, "max_new_tokens": 7}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(said))
    seen: dict[str, Any] = {}

    def stream(self: GPT, prompt: str, **options: Any) -> Any:
        seen.update(self.generation_config | options)
        raise ValueError("seen")

    monkeypatch.setattr(GPT, "stream", stream)
    model = ("-m", str(tmp_path / "m"), "--seed", "3")
    run("generate", "a", *model)
    own = {"do_sample": True, "top_k": 50, "seed": 3}
    assert {n: seen[n] for n in (*said, *own)} == said | own
    run("generate", "a", *model, "-t", "0.5", "-n", "9")
    assert (seen["temperature"], seen["max_new_tokens"], seen["repetition_penalty"]) == (0.5, 9, 1.2)
    seen.clear()
    run("generate", "a", "-m", folder, "--greedy")
    assert seen["do_sample"] is False
    assert not {"temperature", "top_k", "seed"} & set(seen)


def test_beams_do_not_sample_whatever_the_checkpoint_says(run: Any, folder: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    beams = ("-n", "4", "--num-beams", "2")
    done = run("generate", "To", "-m", str(tmp_path / "m"), *beams)
    assert (done.code, done.out) == (0, run("generate", "To", "-m", folder, *beams).out)


def test_chat_wants_a_tokenizer_before_anybody_types(run: Any, folder: str, tmp_path: Path) -> None:
    model = GPT.from_pretrained(folder)
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    done = run("chat", "-m", str(tmp_path), stdin="")
    assert done.code == 1
    assert "meta.pkl" in done.err and "--tokenizer" in done.err


def test_an_option_without_effect_is_told(run: Any, folder: str) -> None:
    common = ("generate", "a", "-m", folder, "-n", "2")
    for more in (("--greedy", "-t", "0.7"), ("--num-beams", "3", "--temperature", "0.5")):
        with pytest.warns(UserWarning, match="temperature has no effect"):
            assert run(*common, *more).code == 0


def test_beams(run: Any, folder: str) -> None:
    expected = GPT.from_pretrained(folder).generate_text("To", max_new_tokens=6, num_beams=3)[0].text
    assert run("generate", "To", "-m", folder, "-n", "6", "--num-beams", "3").out == expected + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "x", "-m", "/nowhere"], 1, "/nowhere"),
        (["generate", "x", "-m", "./nope"], 1, "nope: no such file or folder"),
        (["generate", "x", "-m", "{}", "--tokenizer", "nope.pkl"], 1, "nope.pkl: no such file or folder"),
        (["train", "nope.toml", "--out", "run"], 1, "nope.toml: No such file or directory"),
        (["generate", "x" * 64, "-m", "{}"], 1, "the prompt has 64 tokens, the model's context is 64"),
        (["generate", "x", "-m", "{}", "-n", "64"], 1, "at most 63 is possible"),
        (["generate", "x", "-m", "{}", "--device", "tpu"], 1, "--device is 'tpu'"),
        (["generate", "x", "-m", "{}", "--device", "cuda:77"], 1, "CUDA devices are visible"),
        (["generate", "x", "--top-k", "-2"], 1, "--top-k is -2; 0 or more is needed"),
        (["generate", "x", "--top-k", "x"], 2, "--top-k"),
        (["generate", "x", "--top-p", "0"], 1, "0 < --top-p <= 1"),
        (["generate", "x", "--dtype", "int3"], 2, "--dtype"),
        (["generate", "x", "--file", str(ROOT / "pyproject.toml")], 2, "give one of them"),
        (["generate", "x", "--file", "/nowhere"], 2, "/nowhere"),
        (["no-such-command"], 2, "no-such-command"),
        (["generate", "x", "--no-such-option"], 2, "--no-such-option"),
        (["info", "/nowhere"], 1, "/nowhere"),
    ],
)
def test_errors_are_one_line(run: Any, folder: str, arguments: list[str], code: int, message: str) -> None:
    done = run(*(argument.replace("{}", folder) for argument in arguments))
    assert done.code == code
    assert done.out == ""
    assert message in done.err
    assert done.err.startswith("gptkern: ")
    assert done.err.count("\n") == 1


def test_faults_of_the_program_are_not_hidden(run: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPT, "stream", lambda *_, **__: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        run("generate", "x", "-m", folder)


def test_a_missing_extra_is_named(run: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gptkern.cli.COMMANDS, "info", "bench")
    monkeypatch.setattr(info_command, "describe", lambda _: __import__("no_such_package"))
    done = run("info", folder)
    assert (done.code, done.err) == (1, "gptkern: info needs no_such_package: pip install 'gptkern[bench]'\n")


def test_interrupted(run: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT, "stream", stream)
    assert run("generate", "x", "-m", folder).code == 130


@pytest.mark.parametrize("command", ["", "generate", "chat", "info", "doctor"])
def test_help_teaches(run: Any, command: str) -> None:
    done = run(*([command] if command else []), "--help")
    assert done.code == 0
    assert "Usage" in done.out
    if command in ("generate", "chat", "info"):
        assert "Examples" in done.out
    if not command:
        assert run().out == done.out


def test_info(run: Any, folder: str) -> None:
    facts = json.loads(run("info", folder, "--json").out)
    model = GPT.from_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())
    assert facts["parameters"] == count
    assert facts["parameters_without_embeddings"] == count - (256 + 64) * 32
    assert facts["bytes"]["bfloat16"] == 2 * count
    assert facts["kv_bytes_per_token"]["float32"] == 2 * 1 * 32 * 4
    assert facts["config"]["n_positions"] == 64
    shown = run("info", folder).out
    assert f"{count:,}" in shown
    assert "256 bytes a token, 16.4 kB a full context" in shown
    # The tied head once; what the file holds beyond its tensors is the header.
    assert facts["quantization"] is None
    size = (Path(folder) / "model.safetensors").stat().st_size
    assert facts["stored_bytes"] < size < facts["stored_bytes"] + 4096


def test_info_of_a_quantised_model(run: Any, folder: str, tmp_path: Path) -> None:
    model = GPT.from_pretrained(folder, weights="int8")
    model.save_pretrained(tmp_path)
    facts = json.loads(run("info", str(tmp_path), "--json").out)
    assert facts["quantization"]["format"] == "int8"
    size = (tmp_path / "model.safetensors").stat().st_size
    assert facts["stored_bytes"] < size < facts["stored_bytes"] + 4096
    assert ", linear layers in int8" in run("info", str(tmp_path)).out


def test_doctor(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {f["subject"]: f for f in json.loads(run("doctor", "--json").out)}
    assert {"device", "kernels", "python", "torch", "triton"} <= set(found)
    assert torch.__version__ in found["torch"]["text"]
    if not torch.cuda.is_available():
        assert found["executor"]["text"].startswith("cpu (persistent and graph need a CUDA device)")
    assert "torch" in run("doctor").out
    assert "decoding on CUDA" not in found or torch.cuda.is_available()
    monkeypatch.setitem(doctor_command.TESTED, "torch", "1.0")
    newer = {f["subject"]: f for f in json.loads(run("doctor", "--json").out)}
    assert newer["torch"]["verdict"] == "note"
    assert "newer than 1.0" in newer["torch"]["text"]


def test_doctor_says_which_decode_step_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {finding.subject: finding.text for finding in doctor_command._extension()}
    assert "the persistent executor is off" in found["decoding on CUDA"]


def test_doctor_in_a_checkout_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what the import has said, and lists everything that is slower for it."""
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_checkout, "warning", lambda: "gptkern comes from the source checkout /clone")
    found = {finding.subject: finding for finding in doctor_command._extension()}
    assert "the source checkout /clone" in found["sampler"].text
    assert {found[name].verdict for name in ("sampler", "decoding on CPU")} == {"fallback"}


def test_strict_refuses_fallbacks(run: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = doctor_command.Finding("sampler", "fallback", "plain PyTorch")
    monkeypatch.setattr(doctor_command, "examine", lambda: [slow])
    assert run("doctor").code == 0
    assert run("generate", "x", "-m", folder, "-n", "2").code == 0
    monkeypatch.setenv("GPTKERN_STRICT", "1")
    assert run("doctor").code == 1
    done = run("generate", "x", "-m", folder, "-n", "2")
    assert done.code == 1
    assert "GPTKERN_STRICT=1 allows no fallback" in done.err


def test_doctor_knows_the_tested_set() -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for name, version in (doctor_command.TESTED | doctor_command.TESTED_OPTIONAL).items():
        assert pinned[name] == version


def test_chat_keeps_the_conversation(run: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    real = GPT.stream

    def stream(self: GPT, prompt: str, **options: Any) -> Any:
        prompts.append(prompt)
        assert options["stop_strings"] == ["\nA:", "\nB:"]
        return real(self, prompt, **options)

    monkeypatch.setattr(GPT, "stream", stream)
    common = ("chat", "-m", folder, "--you", "A", "--bot", "B", "-n", "6", "--greedy")
    done = run(*common, stdin="one\n\n/help\ntwo\n/reset\nthree\n/exit\nnever\n")
    assert done.code == 0
    assert len(prompts) == 3
    assert prompts[0] == "A: one\nB:"
    assert prompts[1].startswith("A: one\nB: ")
    assert prompts[1].endswith("\nA: two\nB:")
    assert prompts[2] == "A: three\nB:"
    assert done.out.count("B:") >= 3
    assert "/reset" in done.err


def test_chat_forgets_the_oldest_turns_and_says_so(run: Any, folder: str) -> None:
    common = ("chat", "-m", folder, "--you", "A", "--bot", "B", "-n", "8", "--greedy")
    done = run(*common, stdin="a fairly long line\nanother long line\nand one more line\n")
    assert done.code == 0
    assert "the context is full: 1 earlier turns are forgotten" in done.err
    refused = run(*common, stdin="x" * 80 + "\n")
    assert refused.code == 1
    assert "the context is 64" in refused.err


def test_transcripts_begin_with_their_opening() -> None:
    transcript = Transcript("A talk.", "A", "B", turns=[("hi", "ho")])
    assert transcript.prompt("and?") == "A talk.\nA: hi\nB: ho\nA: and?\nB:"


def test_escapes() -> None:
    assert unescape(r"a\nb\tc\\nd") == "a\nb\tc\\nd"


def process(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )


def test_as_a_process(folder: str) -> None:
    done = process("-m", "gptkern", "generate", "ROMEO:", "-m", folder, "-n", "30", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "30 tokens" in done.stderr
    assert "Traceback" not in done.stderr
    refused = process("-m", "gptkern", "generate", "x", "-m", "/nowhere")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)


def test_importing_is_light() -> None:
    code = """
import sys, time
import gptkern
assert "torch" not in sys.modules, "gptkern alone must not load torch"
import torch
gptkern.GPT, gptkern.KVCache, gptkern.Tokenizer, gptkern.ops, gptkern.backend
gptkern.GPTConfig, gptkern.CheckpointError, gptkern.Completion, gptkern.GenerateOutput, gptkern.Score
assert "transformers" not in sys.modules
assert "matplotlib" not in sys.modules
assert not torch.cuda.is_initialized()
assert set(gptkern.__all__) <= set(dir(gptkern))
"""
    done = process("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_version_is_one(run: Any) -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {told}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {told}\n" in (ROOT / "CITATION.cff").read_text()
    assert gptkern.__version__ == importlib.metadata.version("gptkern")
    assert run("--version").out == f"gptkern {gptkern.__version__}\n"


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, gptkern.cli; gptkern.cli.run(['--help']); sys.exit('torch' in sys.modules)"
    assert process("-c", code).returncode == 0


def test_the_new_users_script(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=64, n_layer=2, n_head=2, n_embd=32, initializer_range=0.5)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "generate.py"))
    printed = capsys.readouterr().out
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    expected = theirs.generate(**inputs, max_length=50, num_return_sequences=1, pad_token_id=0)
    assert printed == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"
    assert expected.shape == (1, 50)
