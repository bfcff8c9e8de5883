"""Every key of a run's TOML file with its default and its meaning, from the settings' own docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from typing import Any, get_type_hints

from gptkern.config import GPTConfig
from gptkern.model.families import FAMILIES
from gptkern.train.settings import Settings

_WIDTH = 100
_HEAD = """\
Every key of a run's TOML file, with its default. A key that is left out has it. Command line options stand in
for some: see `gptkern train --help`."""
_MODEL = """\
Either the checkpoint to begin with (`from`), or the shape of a new model: the fields of GPTConfig below, or
`family` and fields of that family's config.json, under transformers' names. With a tokenizer, vocab_size and
the special tokens are its own; the longest context (n_positions, max_position_embeddings) is [data]'s."""
_FAMILY = """\
The family of a new model. Its sizes must be given (as hidden_size, intermediate_size, num_hidden_layers and
num_attention_heads); other fields, as rope_parameters, have transformers' defaults. A field that a model of
this shape does not go by is refused. Families: {}."""
_DROPOUT = """\
Probability for all dropout of the model: of each rate that the family has and that is not given by itself."""


def reference() -> str:
    """A commented TOML file that ``Settings.from_file`` reads as the defaults."""
    parts = [_comment(_HEAD), "", "[model]", _comment(_MODEL), "", '# from = "gpt2"']
    parts += ["", _comment(_FAMILY.format(", ".join(FAMILIES))), '# family = "llama"']
    parts += ["", _comment(_DROPOUT), "# dropout = 0.1"]
    meanings = _meanings(GPTConfig)
    for field in dataclasses.fields(GPTConfig):
        parts += _key(field.name, field.default, meanings[field.name], commented=True)
    for section, cls in get_type_hints(Settings).items():
        if section == "model":
            continue
        parts += ["", "", f"[{section}]", _comment(_summary(cls))]
        meanings, defaults = _meanings(cls), cls()
        for field in dataclasses.fields(cls):
            parts += _key(field.name, getattr(defaults, field.name), meanings[field.name])
    return "\n".join(parts) + "\n"


def _key(name: str, default: Any, meaning: str, *, commented: bool = False) -> list[str]:
    value = "..." if default is None else json.dumps(default)
    mark = "# " if commented or default is None else ""
    return [*(["", _comment(meaning)] if meaning else []), f"{mark}{name} = {value}"]


def _comment(text: str) -> str:
    words = " ".join(text.replace("``", "`").split())
    return "\n".join(f"# {line}" for line in textwrap.wrap(words, _WIDTH - 2))


def _summary(cls: type) -> str:
    """A docstring's first paragraph."""
    return (inspect.getdoc(cls) or "").partition("\n\n")[0]


def _meanings(cls: type) -> dict[str, str]:
    """The text of each name in a docstring's ``Attributes:`` or ``Args:``.

    Of several names that share an entry the first has the text, with all the names; the others follow it.
    """
    section = re.search(r"^(?:Attributes|Args):\n((?:    .*\n)+)", f"{inspect.getdoc(cls)}\n", re.MULTILINE)
    assert section is not None, cls
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): ((?:.*\n)(?:     +.*\n)*)", section[1], re.MULTILINE):
        for place, name in enumerate(names.split(", ")):
            shared = f"{names}: " if "," in names else ""
            found[name] = shared + text if place == 0 else ""
    return found
