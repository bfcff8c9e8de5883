"""The server as other people's programs see it: OpenAI's own client, and schemathesis over its document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from serve_support import NAME, Running, serving, small_model

from gptkern import GPT

KEY = "a-key-of-a-test"
MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(small_model(), {"max_seqs": 8}, api_keys=(KEY,)) as running:
        yield running
        assert running.is_idle()


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    return openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)


def test_completions(client: Any) -> None:
    asked: Any = {"model": NAME, "prompt": ["ab", "c"], "max_tokens": 9, "n": 2, "seed": 1, "logprobs": 1}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.usage.completion_tokens == 36 and whole.usage.prompt_tokens == 3
    texts = dict.fromkeys(range(4), "")
    logprobs: dict[int, list[float]] = {index: [] for index in range(4)}
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            logprobs[choice.index] += choice.logprobs.token_logprobs
    assert chunk.usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert logprobs[choice.index] == choice.logprobs.token_logprobs
    more = client.completions.create(
        model=NAME, prompt="ab", max_tokens=3, extra_body={"top_k": 5, "regex": "x{3}"}
    )
    assert more.choices[0].text == "xxx"


def test_chat(client: Any) -> None:
    asked: Any = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 9, "seed": 1, "n": 2}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[1].logprobs.content[0].top_logprobs) == 3
    texts = ["", ""]
    with client.chat.completions.create(**asked, stream=True) as stream:
        for chunk in stream:
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_structured_answers(client: Any) -> None:
    import pydantic

    class Person(pydantic.BaseModel):
        grown: bool

    found = client.chat.completions.parse(
        model=NAME, messages=MESSAGES, response_format=Person, max_completion_tokens=40
    )
    assert isinstance(found.choices[0].message.parsed, Person)


def test_errors_and_models(client: Any, server: Running) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=NAME, prompt="a", max_tokens=10**6)
    assert wrong.value.param == "max_tokens" and wrong.value.code == "context_length_exceeded"
    assert wrong.value.request_id is not None and wrong.value.request_id.startswith("req-")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="nonsense").models.list()
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


# Its others ask for tools and for images, which are refused by name, and for a model that reasons.
COMPLY = (
    "chat-basic-response",
    "chat-system-prompt",
    "chat-multi-turn",
    "chat-streaming-response",
    "chat-streaming-usage",
    "chat-error-handling",
)


def test_llm_comply(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llm_comply", reason="needs llm-comply")
    model = GPT.from_pretrained()
    # It asks for answers that end: here with a sentence.
    assert model.tokenizer is not None
    ends = [model.tokenizer.encode(mark)[0] for mark in ".!?"]
    monkeypatch.setattr(model, "generation_config", {"eos_token_id": ends})
    # It draws without a seed. The likeliest token is drawn: others' sentences may outlast its limit.
    with torch.no_grad():
        for parameter in model.transformer.ln_f.parameters():
            parameter.mul_(100)
    with serving(model, api_keys=(KEY,)) as server:
        command = [str(Path(sys.executable).with_name("llm-comply")), "--format", "openai-chat", "--json"]
        command += ["-u", server.url + "/v1", "-k", KEY, "-m", NAME, "-f", ",".join(COMPLY)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        summary = json.loads(done.stdout)["summary"]
        assert summary["passed"] == summary["total"] == len(COMPLY), done.stdout
        tools: Any = {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]}
        image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
        key = {"authorization": f"Bearer {KEY}"}
        for body, field in ((tools, "tools"), ({"messages": image}, "messages.0.content.0.type")):
            url = server.url + "/v1/chat/completions"
            answer = httpx.post(url, json={"model": NAME, **body}, headers=key)
            assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(field)


CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "ignored_auth",
    "unsupported_method",
    "valid_data_is_accepted",
)


def _schemathesis(examples: int) -> None:
    """Ask for what the document allows and for what it forbids, and check the answers."""
    pytest.importorskip("schemathesis", reason="needs schemathesis")
    # A context that holds most of what is asked.
    with serving(small_model(n_positions=1024), {"max_seqs": 8}, api_keys=(KEY,)) as server:
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"{server.url}/openapi.json",
            f"--header=Authorization: Bearer {KEY}",
            f"--checks={','.join(CHECKS)}",
            "--mode=all",
            "--phases=fuzzing",
            f"--max-examples={examples}",
            "--continue-on-failure",
            "--seed=1",
            "--generation-database=none",
            "--no-color",
        ]
        here = str(Path(__file__).parent)
        paths = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
        hooks = {"SCHEMATHESIS_HOOKS": "schemathesis_checks", "PYTHONPATH": paths}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=280, check=False, env=os.environ | hooks
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert "Tested: 9" in done.stdout, done.stdout
        assert server.is_idle()


def test_the_document_says_what_is_accepted_and_what_is_refused() -> None:
    _schemathesis(5)


@pytest.mark.slow
def test_the_document_says_it_of_very_many_bodies() -> None:
    _schemathesis(300)
