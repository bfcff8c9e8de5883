"""Chat templates: text and ids of transformers' ``apply_chat_template``, errors that show the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from gptkern.checkpoint import CheckpointError
from gptkern.tokenizer import Tokenizer
from gptkern.tokenizer.streams import byte_chars

# The shapes of templates that models bring, each with what it is known for.
CHATML = """\
{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
HEADERS = """\
{{- bos_token }}
{%- set today = strftime_now("%Y") if strftime_now is defined else "2024" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|head|>system<|tail|>\\n\\nYear: " + today + "\\n" + system + eos_token }}
{%- if tools is not none %}
    {%- for tool in tools %}
{{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{%- macro turn(message, last=false) %}
{{- "<|head|>" ~ message['role'] ~ "<|tail|>\\n\\n" ~ (message['content'] | trim) ~ eos_token }}
{%- endmacro %}
{%- for message in messages %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- continue %}
    {%- endif %}
{{- turn(message, last=loop.last) }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|head|>assistant<|tail|>\\n\\n" }}
{%- endif %}
"""
ALTERNATING = """\
{%- if messages[0]["role"] == "system" %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- for message in rest %}
    {%- if (message["role"] == "user") != (ns.count % 2 == 0) %}
        {{- raise_exception("Roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and messages[0]["role"] == "system" %}
            {{- "[INST] " + messages[0]["content"] + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {% generation %}{{- " " + message["content"] | trim + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
THINKING = """\
{%- for message in messages[::-1] %}
{%- if message.role == "user" and not (message.content.startswith('<r>')) %}
{%- break %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools %}{{ tools | map(attribute='name') | list | tojson(ensure_ascii=True) }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "alternating": ALTERNATING, "thinking": THINKING}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi <b>& bye</b>"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Où?"}],
    "several": [
        {"role": "user", "content": "1 + 1?\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n 2 ", "tool_calls": None},
        {"role": "user", "content": "und <|im_end|> so weiter"},
    ],
}
TOOLS = [{"name": "größe", "parameters": {"type": "object", "required": ["a<b"]}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with the special tokens that the templates write."""
    folder = tmp_path_factory.mktemp("chat")
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(byte_chars())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|tail|>"]
    backend.add_special_tokens(special)
    backend.add_tokens(["<think>", "</think>"])
    backend.save(str(folder / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": "</s>",
        "cls_token": "<|head|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", CONVERSATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, "enable_thinking": False, "tools": TOOLS},
        {"continue_final_message": True},
    ],
    ids=["plain", "prompt", "tools", "continue"],
)
def test_text_and_ids_are_those_of_transformers(
    both: tuple[Tokenizer, Any], name: str, talk: str, options: dict[str, Any]
) -> None:
    ours, theirs = both
    given = {"conversation": CONVERSATIONS[talk], "chat_template": TEMPLATES[name], **options}
    text = ours.apply_chat_template(**given, tokenize=False)
    assert text == theirs.apply_chat_template(**given, tokenize=False)
    assert len(text) > 10
    assert ours.apply_chat_template(**given, return_dict=False) == theirs.apply_chat_template(
        **given, return_dict=False
    )
    one, other = ours.apply_chat_template(**given), theirs.apply_chat_template(**given)
    assert (one.input_ids, one.attention_mask) == (other.input_ids, other.attention_mask)


def test_a_batch_of_conversations(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    given: dict[str, Any] = {"conversation": [*CONVERSATIONS.values()], "chat_template": CHATML}
    assert ours.apply_chat_template(**given, tokenize=False) == theirs.apply_chat_template(
        **given, tokenize=False
    )
    tensors = ours.apply_chat_template(**given, return_tensors="pt", padding=True)
    assert tensors.input_ids.shape[0] == len(CONVERSATIONS)
    single = ours.apply_chat_template(CONVERSATIONS["one"], chat_template=CHATML, return_tensors="pt")
    assert single.input_ids.shape == (1, len(ours.encode(ours.decode(single.input_ids[0]))))
    assert single.input_ids.tolist() == [
        theirs.apply_chat_template(CONVERSATIONS["one"], chat_template=CHATML, return_dict=False)
    ]


@pytest.mark.parametrize("form", ["text", "list", "file"])
def test_templates_are_found_where_files_keep_them(folder: Path, tmp_path: Path, form: str) -> None:
    configuration = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    if form == "text":
        configuration["chat_template"] = CHATML
    elif form == "list":
        configuration["chat_template"] = [
            {"name": "default", "template": CHATML},
            {"name": "tool_use", "template": THINKING},
        ]
    else:
        configuration["chat_template"] = "passed over"
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configuration))
    ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for more in ({}, {"tools": TOOLS}):
        given: dict[str, Any] = {"conversation": CONVERSATIONS["several"], "tokenize": False, **more}
        text = ours.apply_chat_template(**given)
        assert text == theirs.apply_chat_template(**given)
        assert text.startswith("<|im_start|>system") == (form != "list" or not more)
    if form == "list":
        named = ours.apply_chat_template(CONVERSATIONS["one"], chat_template="tool_use", tokenize=False)
        assert named == "<|im_start|>user\nHi <b>& bye</b><|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "line", "what"),
    [
        ("{% if true %}\n\n{{ raise_exception('no system role') }}\n{% endif %}", 3, "no system role"),
        ("a\n{{ messages[0.content }}", 2, "unexpected '}'"),
        ("a\n{% for m in messages %}\n{{ m.content + 1 }}\n{% endfor %}", 3, "can only concatenate"),
        ("{{ 1 }}\n{{ nothing.there }}", 2, "'nothing' is undefined"),
        ("{% macro f() %}\n{{ g.h }}\n{% endmacro %}\n{{ f() }}", 2, "'g' is undefined"),
        ("\n\n{{ ''.__class__.mro() }}", 3, "unsafe"),
        ("\n{{ messages.append(1) }}", 2, "unsafe"),
        ("{% unknown %}", 1, "unknown tag"),
    ],
)
def test_errors_show_the_templates_line(
    both: tuple[Tokenizer, Any], template: str, line: int, what: str
) -> None:
    with pytest.raises(ValueError, match="chat template, line") as caught:
        both[0].apply_chat_template(CONVERSATIONS["one"], chat_template=template, tokenize=False)
    assert f"line {line} (" in str(caught.value)
    assert template.split("\n")[line - 1][:20] in str(caught.value)
    assert what in str(caught.value)


def test_alternation_is_refused_by_the_templates_words(both: tuple[Tokenizer, Any]) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match=r"line 7 .*Roles must alternate"):
        both[0].apply_chat_template(talk, chat_template=ALTERNATING)


def test_what_is_no_conversation_is_refused(
    both: tuple[Tokenizer, Any], tmp_path: Path, folder: Path
) -> None:
    ours = both[0]
    with pytest.raises(ValueError, match="no chat template"):
        ours.apply_chat_template(CONVERSATIONS["one"])
    with pytest.raises(ValueError, match="conversation is empty"):
        ours.apply_chat_template([], chat_template=CHATML)
    for wrong in ("hello", [1], {"role": "user"}):
        with pytest.raises(TypeError, match="a list of messages"):
            ours.apply_chat_template(wrong, chat_template=CHATML)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="JSON schemas"):
        ours.apply_chat_template(CONVERSATIONS["one"], [print], chat_template=CHATML)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="give one of them"):
        ours.apply_chat_template(
            CONVERSATIONS["one"],
            chat_template=CHATML,
            add_generation_prompt=True,
            continue_final_message=True,
        )
    with pytest.raises(ValueError, match="text to continue"):
        ours.apply_chat_template([{"role": "user"}], chat_template=CHATML, continue_final_message=True)
    with pytest.raises(ValueError, match="does not write"):
        ours.apply_chat_template(CONVERSATIONS["one"], chat_template="x", continue_final_message=True)
    configuration = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": [3]}
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configuration))
    with pytest.raises(CheckpointError, match=r"chat_template is \[3\]"):
        Tokenizer.from_pretrained(tmp_path).apply_chat_template(CONVERSATIONS["one"])
