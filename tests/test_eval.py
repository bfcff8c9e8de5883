"""lm-evaluation-harness: the same numbers in process, through the server and from Hugging Face's backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra [eval]")

import tokenizers
from serve_support import NAME, serving
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gptkern import GPT
from gptkern.eval.lm_eval import HarnessModel
from gptkern.tokenizer.streams import byte_chars

END = "<|endoftext|>"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "how",
    "dogs",
    "ran",
    "over",
    "hills",
    "to",
    "find",
]

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: brier_score}}]
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
UNTIL = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{made}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of transformers', with a tokenizer of bytes."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("checkpoint")
    sizes = {"vocab_size": 257, "n_positions": 96, "n_layer": 2, "n_head": 2, "n_embd": 32}
    ends = {"bos_token_id": 256, "eos_token_id": 256, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(**sizes, **ends)).save_pretrained(path)
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(byte_chars())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    backend.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": 96,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Any:
    """Three local tasks, one a kind of request."""
    path = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> str:
        places = torch.randint(len(WORDS), (count,), generator=generator).tolist()
        return " ".join(WORDS[place] for place in places)

    model = GPT.from_pretrained(folder)
    rows = []
    for place in range(12):
        question = words(3 + place % 4)
        made = model.generate_text(question, max_new_tokens=12, stop_strings="e")[0].text
        choices = [" " + words(1 + place % 2) for _ in range(4)]
        # Half of the texts that greedy makes are wanted.
        wanted = made if place % 2 else "x"
        rows.append({"question": question, "choices": choices, "answer": place % 4, "made": wanted})
    data = path / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("own_choice", CHOICE), ("own_rolling", ROLLING), ("own_until", UNTIL)):
        (path / f"{name}.yaml").write_text(text.format(name=name, data=data))
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(path), include_defaults=False)


def printed(model: Any, tasks: Any, names: list[str]) -> dict[str, dict[str, str]]:
    """The results as the harness prints them."""
    found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=tasks, bootstrap_iters=0)
    return {
        task: {
            name: f"{value:.4f}"
            for name, value in results.items()
            if isinstance(value, float) and "stderr" not in name
        }
        for task, results in found["results"].items()
    }


def test_three_backends_print_the_same(folder: Path, tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    names = ["own_choice", "own_rolling", "own_until"]
    reference = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    theirs = HFLM(pretrained=reference, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4)
    expected = printed(theirs, tasks, names)
    assert all(len(values) >= 1 for values in expected.values()) and len(expected) == 3
    assert printed(HarnessModel(GPT.from_pretrained(folder)), tasks, names) == expected
    with serving(GPT.from_pretrained(folder), {"max_seqs": 8}) as server:
        served = LocalCompletionsAPI(
            model=NAME,
            base_url=server.url + "/v1/completions",
            tokenizer=str(folder),
            max_length=96,
            num_concurrent=4,
        )
        assert printed(served, tasks, names) == expected


def test_likelihoods_say_whether_greedy_would_write_it(folder: Path) -> None:
    model = GPT.from_pretrained(folder)
    harness = HarnessModel(model)
    made = model.generate_text("the cat", max_new_tokens=5)[0].token_ids
    context = harness.tok_encode("the cat")
    (greedy, other) = harness._loglikelihood_tokens(
        [(None, context, made), (None, context, [*made[:-1], (made[-1] + 1) % 256])]
    )
    assert greedy[1] and not other[1] and greedy[0] > other[0]
