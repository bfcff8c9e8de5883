"""The pages of docs/ tell the truth: snippets run, commands parse, links lead somewhere, none is missing."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml
from documents import ROOT, accept, blocks, broken_links, commands, embedded_for_gpt2

import gptkern
import gptkern.cli
import gptkern.ops
from gptkern import GPT, GPTConfig
from gptkern.generate import GenerateOptions
from gptkern.train import Settings

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = {page.relative_to(DOCS).as_posix(): page.read_text() for page in PAGES}
BESIDE = [
    ROOT / name
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")
]


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if blocks(text, "python")])
def test_snippets_run_one_after_another(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GPT, "from_pretrained", embedded_for_gpt2)
    (tmp_path / "tinyshakespeare.txt").write_text("to be or not to be, that is the question\n" * 40)
    names: dict[str, Any] = {"__name__": "snippet"}
    for number, code in enumerate(blocks(TEXTS[name], "python")):
        exec(compile(code, f"{name}, snippet {number}", "exec"), names)


ASKED = [
    (name, arguments)
    for name, text in TEXTS.items()
    for lang in ("sh", "")
    for arguments in commands(text, lang)
]


@pytest.mark.parametrize(
    ("name", "arguments"), ASKED, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_commands_are_accepted(
    name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    accept(arguments, tmp_path)


def test_commands_are_found() -> None:
    assert len(ASKED) >= 25


@pytest.mark.parametrize("text", [code for text in TEXTS.values() for code in blocks(text, "toml")])
def test_training_files_are_accepted(text: str) -> None:
    Settings.from_dict(tomllib.loads(text))


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # it speaks of files that were
    text = page.read_text()
    roots = r"gptkern|csrc|tests|docs|scripts|benchmarks|examples|configs|\.ci|\.github"
    named = [name for name in re.findall(rf"`((?:{roots})/[\w./-]*)`", text) if "swiglu" not in name]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_warning_and_error_class_has_its_cure() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "gptkern").rglob("*.py"))
    classes = re.findall(r"^class ([A-Za-z]\w*(?:Error|Warning))\(", sources, flags=re.MULTILINE)
    assert len(classes) >= 4
    assert [name for name in classes if f"`{name}`" not in TEXTS["troubleshooting.md"]] == []


def test_the_messages_of_troubleshooting_are_gptkerns() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "gptkern").rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?r?"', "", sources)  # one message over several lines
    quoted = re.findall(r'^\*\*(?:`\w+`: )?"(.+?)"', TEXTS["troubleshooting.md"], flags=re.MULTILINE)
    parts = [part.strip(" .,:;'") for message in quoted for part in message.split("...")]
    assert len(quoted) >= 15
    assert [part for part in parts if part not in sources] == []


def test_every_op_is_explained() -> None:
    for page in ("kernels.md", "api/ops.md"):
        words = set(re.findall(r"\w+", TEXTS[page]))
        assert sorted(set(gptkern.ops.__all__) - words) == []


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(text for name, text in TEXTS.items() if name.startswith("api/"))
    documented = set(re.findall(r"^::: gptkern\.(?:\w+\.)*(\w+)$", pages, flags=re.MULTILINE))
    public = {name for name in gptkern.__all__ if not isinstance(getattr(gptkern, name), ModuleType)}
    assert sorted(public - documented) == []


def test_options_of_the_guide_are_those_of_generate() -> None:
    named = re.findall(r"^\| `(\w+)` \|", TEXTS["generate.md"], flags=re.MULTILINE)
    assert len(named) >= 15
    assert set(named) <= set(GenerateOptions.__annotations__)


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module scripts/docs_hooks.py."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import docs_hooks

    return docs_hooks


def test_every_command_and_option_is_in_the_reference(hooks: Any) -> None:
    text = hooks.on_page_markdown(TEXTS["commands.md"])
    app: Any = typer.main.get_command(gptkern.cli.build())
    for name, command in app.commands.items():
        section = text[text.index(f"## gptkern {name}\n") :].partition("\n## ")[0]
        options = [option for p in command.params for option in p.opts if p.param_type_name == "option"]
        assert [o for o in options if o != "--help" and f"`{o}" not in section] == []
        assert all(
            p.help in section.replace("\\|", "|") for p in command.params if p.help and p.name != "help"
        )


def test_every_option_of_generate_is_in_the_reference(hooks: Any) -> None:
    text = hooks.on_page_markdown(TEXTS["api/gpt.md"])
    assert [name for name in GenerateOptions.__annotations__ if f"\n| `{name}` |" not in text] == []


def test_every_field_of_a_request_is_in_the_guide(hooks: Any) -> None:
    from gptkern.serve.protocol import ChatRequest, CompletionRequest

    text = hooks.on_page_markdown(TEXTS["serve.md"])
    names = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
    assert [name for name in names if f"\n| `{name}` |" not in text] == []


def test_every_key_of_a_training_file_is_in_the_reference(hooks: Any) -> None:
    text = hooks.on_page_markdown(TEXTS["train.md"])
    shapes = {field.name: None for field in dataclasses.fields(GPTConfig)}
    for section, keys in {**Settings().to_dict(), "model": shapes}.items():
        table = text[text.index(f"### [{section}]") :].partition("\n### ")[0]
        assert [key for key in keys if f"\n| `{key}` |" not in table] == []


def test_the_workflow_and_the_hooks_run_what_is_there() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    named = [word for hook in hooks for word in hook["entry"].split() if word.endswith(".py")]
    assert len(named) == 2
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.slow
@pytest.mark.ci
def test_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    pages = {
        path.relative_to(tmp_path / "site").with_suffix(".md").as_posix()
        for path in (tmp_path / "site").rglob("*.html")
    }
    assert set(TEXTS) <= pages
