"""One table of options: what is made from it, and what stands beside it, agree."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from gptkern import cli
from gptkern.checkpoint.generation import FIELDS
from gptkern.cli.chat import chat
from gptkern.cli.generate import generate
from gptkern.engine.library_names import INSTEAD
from gptkern.engine.option_checks import checked
from gptkern.engine.options import OPTIONS, TABLE, GenerateOptions, Option
from gptkern.ops.sample import SamplingParams
from gptkern.ops.sample.params import PARAMETERS
from gptkern.sampler_columns import COLUMNS

RANGED = [option for option in TABLE if option.range is not None]


def test_the_typed_dict_lists_the_table() -> None:
    assert list(OPTIONS) == [option.name for option in TABLE] == list(GenerateOptions.__annotations__)
    assert get_type_hints(GenerateOptions) == {option.name: option.type for option in TABLE}


def test_the_documentation_tells_every_option() -> None:
    text = GenerateOptions.__doc__ or ""
    told = re.findall(r"^        (\w+): (.+)$", text, re.MULTILINE)
    assert [name for name, _ in told] == list(OPTIONS)
    for name, sentence in told:
        option = OPTIONS[name]
        assert sentence.startswith(option.help)
        assert option.range is None or option.range.words in sentence
        assert option.default in (None, ()) or f"Default: {option.default!r}." in sentence


def test_defaults_are_of_their_types_and_accepted() -> None:
    for option in TABLE:
        kinds = (option.type, *get_args(option.type))
        if option.default not in (None, ()) and option.name not in ("kv_cache_dtype", "early_stopping"):
            assert type(option.default) in kinds, option.name
            assert checked("x", {option.name: option.default}) == {option.name: option.default}


def test_transformers_options_are_what_a_checkpoint_may_set() -> None:
    from transformers import GenerationConfig

    shared = {name for name in OPTIONS if hasattr(GenerationConfig(), name)}
    assert set(FIELDS) == shared


def test_columns_are_the_sampler_parameters() -> None:
    assert tuple(column.name for column in COLUMNS) == PARAMETERS
    defaults = {name: p.default for name, p in inspect.signature(SamplingParams.make).parameters.items()}
    for column in COLUMNS:
        assert (defaults[column.name] or 0.0) == column.neutral
    by_name = {column.name: column for column in COLUMNS}
    for option in TABLE:
        if option.column is None:
            continue
        assert option.column == option.name
        # The sampler's temperature of 0, greedy, is ``do_sample=False`` here; a greater k than there are
        # tokens is all of them.
        if option.name not in ("temperature", "top_k", "min_new_tokens"):
            assert option.range is by_name[option.name].range
    # Every column but the width of the answer is an option.
    assert {o.column for o in TABLE if o.column} == {*PARAMETERS} - {"n_logprobs"}
    # The sampler applies columns in the order of the table.
    drawing = {option.name for option in TABLE if option.draws}
    assert [o.name for o in TABLE if o.draws] == [name for name in PARAMETERS if name in drawing]


@pytest.mark.parametrize("option", RANGED, ids=lambda option: option.name)
def test_values_at_the_bounds(option: Option) -> None:
    bounds = option.range
    assert bounds is not None
    whole = int in (option.type, *get_args(option.type))
    for bound, outside, closed in (
        (bounds.low, -1, not bounds.open_low),
        (bounds.high, 1, not bounds.open_high),
    ):
        if abs(bound) == float("inf"):
            continue
        number = int(bound) if whole else float(bound)
        step = 1 if whole else 1e-6
        beyond = number + outside * step
        inside = number if closed else number - outside * step
        assert checked("here", {option.name: inside}) == {option.name: inside}
        for refused in (beyond, *(() if closed else (number,))):
            with pytest.raises(ValueError, match=re.escape(f"here: {option.name} is {refused}; ")):
                checked("here", {option.name: refused})
    if not whole:
        with pytest.raises(ValueError, match=f"{option.name} is nan"):
            checked("here", {option.name: float("nan")})


@pytest.mark.parametrize("command", [generate, chat])
def test_the_command_line_is_the_table(command: object) -> None:
    shown = {
        name: parameter
        for name, parameter in inspect.signature(command).parameters.items()  # type: ignore[arg-type]
        if name in OPTIONS
    }
    settled = {"min_new_tokens", "num_beams", "num_return_sequences", "stop_strings"}
    wanted = {option.name for option in TABLE if option.flag is not None}
    assert {*shown} == (wanted if command is generate else wanted - settled)
    for name, parameter in shown.items():
        declared = parameter.annotation.__metadata__[0]
        flag = OPTIONS[name].flag
        assert flag is not None
        if (command, name) != (chat, "max_new_tokens"):
            assert (declared.default, *declared.param_decls) == flag.names
            assert declared.help == (flag.help or OPTIONS[name].help)


def test_help_tells_each_commands_own_defaults() -> None:
    app = cli.build()
    texts = {}
    for name in ("generate", "chat"):
        done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"})
        assert done.exit_code == 0
        texts[name] = done.output
    assert "else 0.95" in texts["chat"] and "else 0.95" not in texts["generate"]
    for option in TABLE:
        if option.flag is not None:
            assert option.flag.names[0] in texts["generate"]


def test_the_table_needs_no_torch() -> None:
    code = "import sys, gptkern.engine.options; sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_of_transformers_are_answered() -> None:
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    own = {"self", "kwargs", "_from_model_config", "transformers_version"}
    taken = {"logits_processor", "stopping_criteria", "streamer", "return_dict_in_generate"}
    theirs = {*inspect.signature(GenerationMixin.generate).parameters, *GenerationConfig().to_dict()}
    assert theirs - set(OPTIONS) - own - taken <= set(INSTEAD)
    assert not set(INSTEAD) & (set(OPTIONS) | taken)
    with pytest.raises(TypeError, match=r"'output_scores'.*output_logprobs=True.*gptkern\.accelerate"):
        checked("generate", {"output_scores": True})
    with pytest.raises(TypeError, match=r"does not have: gptkern\.accelerate keeps"):
        checked("generate", {"penalty_alpha": 0.6})
    with pytest.raises(TypeError, match="'top_kk' is no option; did you mean 'top_k'"):
        checked("generate", {"top_kk": 3})
