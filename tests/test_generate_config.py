"""What a checkpoint says of generation: ``generation_config.json``, as transformers reads it."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS
from family_models import library_model
from transformers import AutoModelForCausalLM

import gptkern
from gptkern.checkpoint import generation
from gptkern.checkpoint.errors import CheckpointError
from gptkern.config import GPTConfig
from gptkern.engine.settings import options_over
from gptkern.generate import GenerateOptions
from gptkern.gpt import GPT
from gptkern.tokenizer import Tokenizer

PROMPT = torch.tensor([[5, 9, 33, 12, 7]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 of transformers'."""
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 97, "n_positions": 64, "n_layer": 2, "n_head": 4, "n_embd": 32}
    config = transformers.GPT2Config(**shape, initializer_range=0.4, bos_token_id=None, eos_token_id=None)
    path = tmp_path_factory.mktemp("model")
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def opened(folder: Path, said: dict[str, Any] | None, **config: Any) -> tuple[Any, GPT]:
    """(transformers' model, gptkern's) with this generation_config.json and more of config.json."""
    import transformers

    kept = json.loads((folder / "config.json").read_text())
    for name in (*generation.FIELDS, *generation.UNSUPPORTED):
        kept.pop(name, None)
    (folder / "config.json").write_text(json.dumps(kept | config))
    file = folder / "generation_config.json"
    if said is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(json.dumps(said))
    return transformers.GPT2LMHeadModel.from_pretrained(folder), GPT.from_pretrained(folder)


def test_every_field_is_an_option_or_refused_by_name() -> None:
    assert set(generation.FIELDS) <= set(GenerateOptions.__annotations__)
    assert not set(generation.UNSUPPORTED) & set(generation.FIELDS)


def test_the_page_names_every_field() -> None:
    text = (Path(__file__).parent.parent / "docs" / "generate.md").read_text()
    table = text.partition("What becomes of a field of `generation_config.json`")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert {*generation.FIELDS, *generation.UNSUPPORTED, "bos_token_id", "return_dict_in_generate"} <= named


FIRST = [95, 51, 51, 54, 35, 6, 95, 8]
SAID: list[tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any]]] = [
    ({"eos_token_id": [96, 54]}, {}, {}),
    ({"eos_token_id": 51, "pad_token_id": 3, "max_new_tokens": 9}, {}, {}),
    ({"max_length": 12}, {}, {}),
    ({"max_length": 12}, {}, {"max_new_tokens": 3}),
    ({"max_new_tokens": 6}, {}, {}),
    ({"max_new_tokens": 6}, {}, {"max_new_tokens": None}),
    ({"repetition_penalty": 5.0}, {}, {}),
    ({"repetition_penalty": 5.0}, {}, {"repetition_penalty": 1.5}),
    ({"repetition_penalty": 5.0}, {}, {"repetition_penalty": None}),
    ({"no_repeat_ngram_size": 1, "max_new_tokens": 20}, {}, {}),
    ({"bad_words_ids": [[51], [95, 3]], "suppress_tokens": [54]}, {}, {}),
    ({"sequence_bias": [[[95, 51], -9.0], [[6], 3.0]]}, {}, {}),
    ({"min_new_tokens": 5, "eos_token_id": 51}, {}, {}),
    ({"min_length": 9, "eos_token_id": 51}, {}, {}),
    ({"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": 51}, {}, {}),
    ({"num_beams": 3}, {}, {"num_beams": 1}),
    # of sampling, where nothing is sampled: of no effect, and no error
    ({"temperature": 0.0, "top_p": 0.3, "do_sample": False}, {}, {}),
    ({"eos_token_id": 51}, {}, {"eos_token_id": None}),
    ({"eos_token_id": 51}, {}, {"eos_token_id": 54}),
    # where the file is there, it alone speaks
    ({}, {"eos_token_id": 51, "pad_token_id": 3}, {}),
    (None, {"eos_token_id": 51, "pad_token_id": 3}, {}),
    (None, {"eos_token_id": [96, 54]}, {}),
    (None, {"repetition_penalty": 5.0, "max_length": 14}, {}),
]


@pytest.mark.parametrize(("said", "config", "given"), SAID, ids=str)
def test_a_checkpoint_s_word_is_the_default_as_in_transformers(
    folder: Path, said: dict[str, Any] | None, config: dict[str, Any], given: dict[str, Any]
) -> None:
    theirs, ours = opened(folder, said, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.generate(PROMPT, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ours.generate(PROMPT, **given)
    assert torch.equal(found, expected)
    ours.tokenizer = Tokenizer.bytes()
    (completion,) = ours.generate_text(PROMPT.tolist(), **given)
    assert completion.token_ids == expected[0, 5:].tolist()


@pytest.mark.parametrize("name", ["opt", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    "said",
    [
        {"eos_token_id": [60, 31, 7], "pad_token_id": 3, "bos_token_id": 1, "max_new_tokens": 40},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 3, "max_length": 30, "eos_token_id": 66},
        {
            "num_beams": 3,
            "early_stopping": True,
            "length_penalty": 0.5,
            "eos_token_id": [5, 6],
            "pad_token_id": 3,
        },
    ],
    ids=str,
)
def test_a_family_s_checkpoint_is_followed_and_written_back(
    name: str, said: dict[str, Any], tmp_path: Path
) -> None:
    library_model(CONFIGS[name]).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps(said))
    ids = torch.randint(67, (4, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text()) == said
    for folder in ("theirs", "ours"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / folder, attn_implementation="eager")
        expected = theirs.generate(ids, attention_mask=mask)
        assert torch.equal(ours.generate(ids, mask), expected)


def test_the_drop_in_agrees(folder: Path) -> None:
    said = {"eos_token_id": [96, 54], "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "max_length": 24}
    theirs, ours = opened(folder, said | {"pad_token_id": 3})
    ids = torch.cat([PROMPT, PROMPT + 1])
    expected = theirs.generate(ids)
    assert torch.equal(gptkern.accelerate(theirs).generate(ids), expected)
    assert torch.equal(ours.generate(ids), expected)


def test_padding_is_taken_for_padding(folder: Path) -> None:
    ids = torch.tensor([[0, 0, 9, 33, 12], [5, 9, 33, 12, 7]])
    for said, config in (({"pad_token_id": 0}, {}), (None, {"pad_token_id": 0, "eos_token_id": 96})):
        theirs, ours = opened(folder, said, **config)
        expected = theirs.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(ours.generate(ids, max_new_tokens=6), expected)
        assert not torch.equal(ours.generate(ids, torch.ones_like(ids), max_new_tokens=6), expected)


def test_sampling_by_default(folder: Path) -> None:
    ours = opened(folder, {"do_sample": True, "temperature": 3.0, "top_k": 9, "max_new_tokens": 12})[1]
    drawn = ours.generate(PROMPT, seed=1)
    assert torch.equal(
        drawn, ours.generate(PROMPT, do_sample=True, temperature=3.0, top_k=9, max_new_tokens=12, seed=1)
    )
    assert not torch.equal(drawn, ours.generate(PROMPT, seed=1, temperature=1.0))
    assert not torch.equal(drawn, ours.generate(PROMPT, seed=1, top_k=None))
    assert ours.generate(PROMPT, do_sample=False)[0, 5:13].tolist() == FIRST
    with pytest.raises(ValueError, match="beam search does not sample"):
        ours.generate(PROMPT, num_beams=2)


def test_explicit_lengths_go_before_the_checkpoint_s(folder: Path) -> None:
    ours = opened(folder, {"max_new_tokens": 9, "min_new_tokens": 9, "eos_token_id": 54})[1]
    assert ours.generate(PROMPT, max_length=7).shape[1] == 7
    assert ours.generate(PROMPT, min_length=6).shape[1] == 9
    # a default that the context cannot hold is no wish
    long = opened(folder, {"max_new_tokens": 1000})[1]
    assert long.generate(PROMPT).shape[1] == 64
    assert opened(folder, {"max_length": 1000})[1].generate(PROMPT).shape[1] == 64
    with pytest.raises(ValueError, match="max_length is 4, the prompt has 5 tokens already"):
        opened(folder, {"max_length": 4})[1].generate(PROMPT)


def test_stop_strings_of_the_checkpoint(folder: Path) -> None:
    ours = opened(folder, {"stop_strings": ["36"]})[1]
    ours.tokenizer = Tokenizer.bytes()
    (free,) = ours.generate_text(PROMPT.tolist(), stop_strings=None, max_new_tokens=5)
    assert free.text == "_336#"
    (cut,) = ours.generate_text(PROMPT.tolist(), max_new_tokens=5)
    assert (cut.text, cut.finish_reason) == ("_3", "stop")
    assert list(ours.stream(PROMPT[0].tolist(), max_new_tokens=5)) == ["_", "3"]


def test_results_with_their_log_probabilities_where_the_checkpoint_asks(folder: Path) -> None:
    ours = opened(folder, {"return_dict_in_generate": True})[1]
    assert torch.equal(ours.generate(PROMPT).sequences, ours.generate(PROMPT, return_dict_in_generate=False))


def test_what_gptkern_cannot_do_is_said_by_name(folder: Path) -> None:
    ours = opened(folder, {"num_beam_groups": 2, "top_h": 0.4, "guidance_scale": 1.0, "mine": 3})[1]
    with pytest.warns(UserWarning, match=r"num_beam_groups=2, top_h=0\.4, which gptkern does not support"):
        ours.generate(PROMPT, max_new_tokens=1)
    assert ours.generation_config["mine"] == 3
    # what asks for nothing is passed over
    ours = opened(folder, {"num_beam_groups": 1, "diversity_penalty": 0.0, "forced_bos_token_id": None})[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.generate(PROMPT, max_new_tokens=1)


def test_bad_fields_name_the_file(folder: Path) -> None:
    with pytest.raises(TypeError, match="generation_config: top_k is 'many'; a whole number"):
        opened_here(folder, {"do_sample": True, "top_k": "many"}).generate(PROMPT)
    with pytest.raises(ValueError, match=r"generation_config: repetition_penalty is -1\.0"):
        opened_here(folder, {"repetition_penalty": -1.0}).generate(PROMPT)
    for text in ("[1]", "{", '"x"', "\xff\xfe"):
        (folder / "generation_config.json").write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            GPT.from_pretrained(folder)


def opened_here(folder: Path, said: dict[str, Any]) -> GPT:
    """gptkern's model alone: transformers' refuses such a file."""
    (folder / "generation_config.json").write_text(json.dumps(said))
    return GPT.from_pretrained(folder)


def test_a_fresh_model_speaks_by_its_config() -> None:
    model = GPT(GPTConfig(vocab_size=97, n_positions=16, n_layer=1, n_head=1, n_embd=8, eos_token_id=(3, 4)))
    assert model.generation_config == {"bos_token_id": 50256, "eos_token_id": [3, 4]}
    model.generation_config["max_new_tokens"] = 2
    assert model.generate(PROMPT, eos_token_id=None).shape == (1, 7)


def test_a_caller_s_own_defaults_stand_behind_the_checkpoint_s(folder: Path) -> None:
    ours = opened(folder, {"temperature": 0.3, "max_length": 30, "num_beams": 2})[1]
    fallback = {"do_sample": True, "temperature": 0.8, "top_k": 50, "max_new_tokens": 256}
    found = options_over(fallback, ours.generation_config, {"top_p": 0.9, "num_beams": 1})
    assert found == {"do_sample": True, "top_k": 50, "top_p": 0.9, "num_beams": 1}
    # the checkpoint's beams do not sample
    assert options_over(fallback, ours.generation_config, {"max_new_tokens": 3}) == {"max_new_tokens": 3}
    assert options_over(fallback, ours.generation_config, {"do_sample": False}) == {"do_sample": False}


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["dangling", "loop", "fifo", "folder"])
def test_what_is_no_file_is_refused_and_not_passed_over(
    folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(name if kind == "loop" else "nothing")
    if name == "tokenizer_config.json":
        Tokenizer.bytes().save(tmp_path / "t")
        shutil.copy(tmp_path / "t" / "tokenizer.json", tmp_path / "m")
    with pytest.raises(CheckpointError, match=name):
        GPT.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    "said", [{"pad_token_id": -1}, {"eos_token_id": -1}, {"eos_token_id": [-1], "pad_token_id": -1}]
)
def test_a_token_below_0_is_none(folder: Path, said: dict[str, Any]) -> None:
    theirs, ours = opened(folder, said)
    expected = theirs.generate(PROMPT, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours.generate(PROMPT, max_new_tokens=5), expected)


def test_biases_are_fp32_whatever_pytorchs_default_is(folder: Path) -> None:
    _, model = opened(folder, None)
    expected = model.generate(PROMPT, max_new_tokens=5, sequence_bias={(3,): 2.0})
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model.generate(PROMPT, max_new_tokens=5, sequence_bias={(3,): 2.0}), expected)
    finally:
        torch.set_default_dtype(torch.float32)
