"""The server's answers: OpenAI's forms, every field, every error; by plain HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from serve_support import NAME, Running, serving, small_model

from gptkern import GPT
from gptkern.cli import main
from gptkern.serve.admission import Admission
from gptkern.serve.errors import ApiProblem
from gptkern.serve.protocol import ChatRequest, CompletionRequest
from gptkern.serve.settings import ServeSettings


@pytest.fixture(scope="module")
def model() -> GPT:
    return small_model()


@pytest.fixture(scope="module")
def server(model: GPT) -> Iterator[Running]:
    with serving(model, {"max_seqs": 8, "prefill_chunk": 64}) as running:
        yield running
        assert running.is_idle()


def events(text: str) -> list[Any]:
    """The events of a stream, without the last."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert found[-1] == "[DONE]"
    return [json.loads(event) for event in found[:-1]]


# Everything that shapes a draw, and what the engine calls it.
DRAWS = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "typical_p": 0.95, "seed": 5}


def test_a_completion_is_what_generate_makes(model: GPT, server: Running) -> None:
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.1}
    answer = server.complete("ab", max_tokens=20, logprobs=2, **DRAWS, **penalties)
    (expected,) = model.generate_text(
        "ab", max_new_tokens=20, do_sample=True, top_logprobs=2, **DRAWS, **penalties
    )
    (choice,) = answer["choices"]
    assert choice["text"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert choice["logprobs"]["token_logprobs"] == expected.logprobs
    assert len(choice["logprobs"]["tokens"]) == len(expected.token_ids)
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 20, "total_tokens": 22}
    assert answer["object"] == "text_completion" and answer["model"] == NAME


def test_defaults_are_openais_and_not_the_checkpoints(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"temperature": 0.01, "top_k": 1, "repetition_penalty": 5.0, "max_length": 3, "eos_token_id": 256}
    monkeypatch.setattr(model, "generation_config", said)
    with serving(model) as server:
        answer = server.complete("ab", seed=3)
    monkeypatch.undo()
    options = {"max_new_tokens": 16, "do_sample": True, "top_k": 0, "seed": 3}
    (expected,) = model.generate_text("ab", **options)
    assert answer["choices"][0]["text"] == expected.text


def test_a_stream_is_the_answer_in_parts(server: Running) -> None:
    body = {"max_tokens": 30, "seed": 1, "logprobs": 1, "n": 3, "echo": True}
    whole = server.complete(["ab", "cd"], **body)
    streamed = server.post(
        "/v1/completions",
        prompt=["ab", "cd"],
        stream=True,
        stream_options={"include_usage": True},
        **body,
    )
    *parts, last = events(streamed.text)
    assert last["usage"] == whole["usage"] and last["choices"] == []
    assert all(part["usage"] is None for part in parts)
    assert {part["id"] for part in parts} == {last["id"]}
    for index, choice in enumerate(whole["choices"]):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own][-1] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            assert [value for part in own for value in part["logprobs"][name]] == values
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert "".join(choice["logprobs"]["tokens"][:2]) == choice["text"][:2]


def test_chat_is_the_completion_of_its_template(server: Running) -> None:
    messages = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "z"}]},
    ]
    body = {"seed": 2, "temperature": 1.2}
    chat = server.post(
        "/v1/chat/completions",
        messages=messages,
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=2,
        **body,
    ).json()
    plain = server.complete("system: x\nuser: yz\nassistant:", max_tokens=12, logprobs=2, **body)
    (choice,) = chat["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": plain["choices"][0]["text"],
        "refusal": None,
        "annotations": [],
    }
    assert chat["usage"] == plain["usage"]
    content, flat = choice["logprobs"]["content"], plain["choices"][0]["logprobs"]
    assert [token["logprob"] for token in content] == flat["token_logprobs"]
    assert [token["token"] for token in content] == flat["tokens"]
    assert [len(token["top_logprobs"]) for token in content] == [2] * len(content)
    stream = server.post("/v1/chat/completions", messages=messages, max_tokens=12, stream=True, **body)
    parts = [part["choices"][0] for part in events(stream.text)]
    assert parts[0]["delta"]["role"] == "assistant"
    assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]


def test_stop_texts_and_tokens(model: GPT, server: Running) -> None:
    free = server.complete("ab", seed=1, max_tokens=40)["choices"][0]["text"]
    stop = free[5:8]
    cut = server.complete("ab", seed=1, max_tokens=40, stop=["never so long a text", stop])
    assert cut["choices"][0]["text"] == free[: free.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    streamed = server.post("/v1/completions", prompt="ab", seed=1, max_tokens=40, stop=stop, stream=True)
    text = "".join(part["choices"][0]["text"] for part in events(streamed.text))
    assert text == cut["choices"][0]["text"]
    tokens = model.generate_text("ab", do_sample=True, top_k=0, seed=1, max_new_tokens=40)[0].token_ids
    by_token = server.complete("ab", seed=1, max_tokens=40, stop_token_ids=[tokens[9]])
    assert by_token["usage"]["completion_tokens"] == tokens.index(tokens[9]) + 1


def test_the_end_of_text(server: Running) -> None:
    likely = {"logit_bias": {"256": 100}, "temperature": 0}
    ended = server.complete("ab", max_tokens=9, **likely)
    assert ended["choices"][0] | {"index": 0} == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert ended["usage"]["completion_tokens"] == 1
    assert server.complete("ab", max_tokens=9, min_tokens=4, **likely)["usage"]["completion_tokens"] == 5
    going = server.complete("ab", max_tokens=9, ignore_eos=True, **likely)
    assert going["usage"]["completion_tokens"] == 9
    assert going["choices"][0]["finish_reason"] == "length"


def test_greedy_copies_are_alike(server: Running) -> None:
    answer = server.complete("ab", n=3, temperature=0, max_tokens=8)
    alone = server.complete("ab", temperature=0, max_tokens=8)
    assert {choice["text"] for choice in answer["choices"]} == {alone["choices"][0]["text"]}


def test_prompts_as_text_and_ids(server: Running) -> None:
    body = {"seed": 1, "max_tokens": 6}
    forms = ("ab", [97, 98], ["ab"], [[97, 98]])
    texts = [server.complete(form, **body)["choices"][0]["text"] for form in forms]
    assert len(set(texts)) == 1


def test_an_empty_prompt_is_the_beginning_of_a_text(server: Running) -> None:
    empty = server.complete("", seed=1)
    assert empty["choices"] == server.complete([256], seed=1)["choices"]
    endless = small_model(eos_token_id=None)
    with serving(endless) as other:
        assert "prompt is empty" in other.error(prompt="")["message"]


def test_no_tokens_are_made_where_only_the_prompt_is_asked_for(server: Running) -> None:
    answer = server.complete("abc", max_tokens=0, echo=True, logprobs=0, prompt_logprobs=1)
    (choice,) = answer["choices"]
    assert choice["text"] == "abc" and choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    values = [table[str(token)]["logprob"] for table, token in zip(rest, (98, 99), strict=True)]
    assert values == choice["logprobs"]["token_logprobs"][1:]


def test_log_probabilities_of_prompts_stand_where_vllm_has_them(server: Running) -> None:
    shared: Any = {"max_tokens": 2, "seed": 1, "prompt_logprobs": 1}
    prompts = ["abc", "de"]
    own = [server.complete(prompt, **shared)["choices"][0]["prompt_logprobs"] for prompt in prompts]
    choices = server.complete(prompts, n=2, **shared)["choices"]
    assert [choice["prompt_logprobs"] for choice in choices] == [own[0], own[0], own[1], own[1]]

    messages = [{"role": "user", "content": "x"}]
    chat = server.post("/v1/chat/completions", messages=messages, n=2, **shared).json()
    assert all("prompt_logprobs" not in choice for choice in chat["choices"])
    plain = server.complete("user: x\nassistant:", **shared)["choices"][0]
    assert chat["prompt_logprobs"] == plain["prompt_logprobs"]
    streamed = server.post("/v1/chat/completions", messages=messages, stream=True, **shared)
    first, *rest = events(streamed.text)
    assert first["prompt_logprobs"] == chat["prompt_logprobs"]
    assert not any("prompt_logprobs" in part for part in rest)


def test_a_character_is_never_split(server: Running) -> None:
    text = "é€😀"
    raw = list(text.encode())
    # Every token is forced in turn by a grammar of one text.
    whole = server.complete("ab", regex=text, max_tokens=40, logprobs=0)
    assert whole["choices"][0]["text"] == text
    assert whole["choices"][0]["logprobs"]["tokens"][0] == "bytes:\\xc3"
    assert whole["usage"]["completion_tokens"] == len(raw)
    stream = server.post("/v1/completions", prompt="ab", regex=text, max_tokens=40, stream=True)
    pieces = [part["choices"][0]["text"] for part in events(stream.text)]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


def test_answers_follow_their_grammars(server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = server.complete("ab", response_format=form, max_tokens=60, n=4)
    for choice in answer["choices"]:
        found = json.loads(choice["text"])
        assert found["name"] in ("ann", "bob") and isinstance(found["old"], bool)
        assert choice["finish_reason"] == "stop"
    free = server.complete("ab", response_format={"type": "json_object"}, max_tokens=60, temperature=2)
    assert free["choices"][0]["text"].startswith("{")
    lark = server.complete("ab", grammar='start: ("x" | "y") "z"', max_tokens=60)
    assert lark["choices"][0]["text"] in ("xz", "yz")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"regex": "("}, "regex cannot be used"),
        ({"grammar": "start: x"}, 'unknown name: "x"'),
        # By its size, or by its time: which is first depends on what else runs.
        ({"regex": "a{1000}{1000}{1000}"}, "too many expressions|a simpler one is needed"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar exclude each other"),
        ({"response_format": {"type": "json_schema"}}, "belongs to the type json_schema"),
    ],
)
def test_a_bad_grammar_is_its_own_requests_error(server: Running, body: Any, message: str) -> None:
    assert re.search(message, server.error(**body)["message"])
    assert server.complete("ab", regex="[ab]c", max_tokens=5)["choices"][0]["text"][1] == "c"


def test_a_grammar_that_takes_too_long_is_refused(model: GPT) -> None:
    with serving(model, grammar_seconds=0.001, body_bytes=1 << 24) as server:
        schema = {"enum": ["x" * length for length in range(4000)]}
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        error = server.error(response_format=form)
        assert "takes more than 0.001 s" in error["message"] and error["code"] == "grammar_too_complex"
        assert server.complete("ab", max_tokens=2)["choices"]


def test_a_mistake_in_a_message_names_its_place(server: Running) -> None:
    for content, place in ((None, "messages.1.content is null"), ([], "messages.1.content is an array")):
        messages = [{"role": "user", "content": "x"}, {"role": "user", "content": content}]
        error = server.error("/v1/chat/completions", messages=messages)
        assert error["param"] == "messages" and error["message"].startswith(place), error


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"suffix": "x"}, "suffix", "suffix is not served"),
        ({"tools": []}, "tools", "tools is not served"),
        ({"prompt": 3}, "prompt", "prompt is a number"),
        ({"prompt": None}, "prompt", "prompt is null; Input should be a valid string; or:"),
        (
            {"prompt": []},
            "prompt",
            "prompt is an array; Input should be a valid string; or: List",
        ),
        ({"prompt": [3, -1]}, "prompt", "prompt.1 is a number; Input should be greater than or equal to 0"),
        ({"stop": ["a", ""]}, "stop", "stop.1 is ''; String should have at least 1 character"),
        ({"prompt": [1, 999]}, "prompt", "prompt is 999; token ids from 0 to 256"),
        ({"prompt": "a" * 128}, "prompt", "so at most 127 are accepted"),
        ({"max_tokens": 128}, "max_tokens", "so at most 127 are accepted"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"n": 9}, "n", "at most 8"),
        ({"n": 10**9}, "n", "less than or equal to 128"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": "1"}, "seed", "seed is '1'"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids from 0 to 256"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "token ids from 0 to 256"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "token ids up to 256"),
        ({"min_tokens": 17}, "min_tokens", "at most max_tokens, 16"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "belongs to stream"),
    ],
)
def test_mistakes_name_field_and_value(server: Running, body: Any, param: str, message: str) -> None:
    error = server.error(**body)
    assert error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_mistakes_of_chat(server: Running) -> None:
    path = "/v1/chat/completions"
    user = [{"role": "user", "content": "x"}]
    assert server.error(path, messages=[])["param"] == "messages"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert server.error(path, messages=image)["param"] == "messages"
    assert "belongs to logprobs" in server.error(path, messages=user, top_logprobs=2)["message"]
    both = server.error(path, messages=user, max_tokens=1, max_completion_tokens=1)
    assert "two names of one field" in both["message"]
    assert server.error(path, messages=user, model="other", status=404)["code"] == "model_not_found"
    assert "missing" in server.error(path)["message"]


def test_a_model_without_a_template_serves_no_chat(model: GPT) -> None:
    with serving(model, chat_template=None) as server:
        error = server.error("/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
    assert "no chat template" in error["message"]


def test_a_template_that_refuses_is_the_requests_error(model: GPT) -> None:
    with serving(model, chat_template="{{ raise_exception('roles must alternate') }}") as server:
        error = server.error("/v1/chat/completions", messages=[{"role": "user", "content": "x"}])
    assert "roles must alternate" in error["message"]


SURROGATE = b'{"model":"gptkern","prompt":"\\ud800","user":"\\ud800"}'


def test_bodies_and_headers_that_are_wrong(server: Running) -> None:
    url = server.url + "/v1/completions"
    json_type = {"content-type": "application/json"}
    for content in (b"{", b"[]", b"\xff", b"", b"[" * 100_000, b'{"model":NaN}', SURROGATE):
        answer = httpx.post(url, content=content, headers=json_type)
        assert answer.status_code == 400, answer.text
    assert httpx.post(url, content=b"{}").status_code == 400
    bad_id = httpx.get(server.url + "/health", headers={"x-request-id": "a b"})
    assert bad_id.status_code == 400 and "x-request-id is 'a b'" in bad_id.text
    named = httpx.get(server.url + "/health", headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    assert httpx.get(server.url + "/nothing").json()["error"]["message"].startswith("there is nothing")
    assert httpx.get(url).status_code == 405


def test_a_long_body_is_not_read(model: GPT) -> None:
    with serving(model, body_bytes=1000) as server:
        assert server.error(prompt="a" * 1000, status=413)["code"] == "body_too_long"

        def chunks() -> Iterator[bytes]:
            for _ in range(10):
                yield b"a" * 500

        answer = httpx.post(server.url + "/v1/completions", content=chunks())
        assert answer.status_code == 413


def test_models_tokens_and_versions(server: Running) -> None:
    listed = httpx.get(server.url + "/v1/models").json()["data"]
    assert [card["id"] for card in listed] == [NAME]
    assert httpx.get(server.url + f"/v1/models/{NAME}").json() == listed[0]
    assert httpx.get(server.url + "/v1/models/other").status_code == 404
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    assert httpx.get(server.url + "/version").json()["version"]
    assert server.post("/tokenize", prompt="é").json() == {
        "tokens": [195, 169],
        "count": 2,
        "max_model_len": 128,
    }
    assert server.post("/detokenize", tokens=[195, 169]).json() == {"prompt": "é"}
    assert "99999" in server.error("/detokenize", tokens=[99999])["message"]
    chat = server.post("/tokenize", messages=[{"role": "user", "content": "x"}]).json()
    assert bytes(chat["tokens"]).decode() == "user: x\nassistant:"
    assert "one of them is needed" in server.error("/tokenize")["message"]
    info = httpx.get(server.url + "/tokenizer_info").json()
    assert (info["vocab_size"], info["end_of_text"]) == (256, [256])


def test_metrics_count_what_was_served(model: GPT) -> None:
    with serving(model) as server:
        server.complete("abc", max_tokens=7, n=2, seed=1)  # neither draws the end of the text
        server.error(n=0)
        lines = httpx.get(server.url + "/metrics").text.splitlines()
    values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if f'"{NAME}"' in line}
    assert values["gptkern:prompt_tokens_total"] == 3
    assert values["gptkern:generation_tokens_total"] == 14
    assert values["gptkern:request_success_total"] == 2
    assert values["gptkern:requests_refused_total"] == 1
    assert values["gptkern:time_to_first_token_seconds_count"] == 1
    assert values["gptkern:e2e_request_latency_seconds_count"] == 1
    assert values["gptkern:num_requests_running"] == 0
    named = {
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "num_preemptions_total",
        "inter_token_latency_seconds_bucket",
    }
    assert {f"gptkern:{name}" for name in named} <= values.keys()


def test_the_dashboard_reads_metrics_that_there_are(server: Running) -> None:
    server.complete("ab", max_tokens=3)
    server.error(n=0)
    text = httpx.get(server.url + "/metrics").text
    dashboard = (files("gptkern.serve") / "grafana.json").read_text()
    named = set(re.findall(r"gptkern:\w+", dashboard))
    assert len(named) >= 12
    assert [name for name in named if f"\n{name}{{" not in text] == []


def test_the_page_takes_nothing_from_elsewhere(server: Running) -> None:
    page = httpx.get(server.url + "/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    parts = [page.text]
    for path, kind in (("playground.css", "text/css"), ("playground.js", "text/javascript")):
        assert f'"{path}"' in page.text
        part = httpx.get(f"{server.url}/{path}")
        assert part.headers["content-type"].startswith(kind)
        parts.append(part.text)
    for part in parts:
        assert "//" not in part.replace("\n// ", "") and "innerHTML" not in part
    ids = set(re.findall(r'\bid="(\w+)"', parts[0]))
    assert set(re.findall(r'\bat\("(\w+)"\)', parts[2])) <= ids


def test_keys_and_origins(model: GPT) -> None:
    keys = ("first-key-1", "second-key-2")
    with serving(model, api_keys=keys, cors_origins=("https://a.example",)) as server:
        refused = server.error(status=401)
        assert refused["type"] == "authentication_error" and "first-key" not in str(refused)
        for header, status in (("Bearer second-key-2", 200), ("Bearer nonsense", 401), ("second-key-2", 401)):
            answer = httpx.get(server.url + "/v1/models", headers={"authorization": header})
            assert answer.status_code == status
        assert httpx.get(server.url + "/health").status_code == 200
        preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
        allowed = httpx.options(server.url + "/v1/completions", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.get(server.url + "/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_the_log_has_a_line_a_request_and_no_prompt(model: GPT, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(model, access_log=True) as server:
        server.complete("secret words", max_tokens=3)
        server.error(prompt="secret words", n=0)
        httpx.get(server.url + "/health?key=secret")
    err = capfd.readouterr().err
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/v1/completions", 200),
        ("/v1/completions", 400),
        ("/health", 200),
    ]
    assert lines[0]["completion_tokens"] == 3 and "secret" not in err


def test_admission_never_passes_its_limits() -> None:
    admission = Admission(4, 100)
    ticket = admission.reserve(3)
    ticket.take(60)
    with pytest.raises(ApiProblem, match="3 of 4 continuations are taken") as busy:
        admission.reserve(2)
    assert busy.value.status == 429 and busy.value.headers["Retry-After"] == "1"
    other = admission.reserve(1)
    with pytest.raises(ApiProblem, match="60 of 100 tokens are taken, 41 more"):
        other.take(41)
    for never in (lambda: admission.reserve(5), lambda: other.take(101)):
        with pytest.raises(ApiProblem) as refused:
            never()
        assert refused.value.status == 400
    for one in (ticket, ticket, other):
        one.close()
    assert admission.rows == admission.tokens == 0


def test_a_deadline_ends_an_answer_with_what_it_has(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model, deadline=0.001) as server:
        answer = server.complete("ab", max_tokens=100, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "abort"
    assert answer["usage"]["completion_tokens"] < 100


def test_a_fault_of_the_engine_is_a_500_and_the_server_goes_on(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model) as server:
        with monkeypatch.context() as broken:
            fault = RuntimeError("out of memory")
            broken.setattr(server.service.inner, "_launch", lambda ahead: (_ for _ in ()).throw(fault))
            assert server.error(status=500)["type"] == "server_error"
            stream = server.post("/v1/completions", prompt="a", stream=True)
            assert "out of memory" in stream.text and "[DONE]" not in stream.text
        assert server.complete("ab", max_tokens=2)["choices"]
        assert server.is_idle()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"port": 70000}, "port is 70000"),
        ({"most_rows": 0}, "most_rows is 0; 1 or more"),
        ({"drain": "x"}, "drain is 'x'; a number"),
        ({"deadline": float("inf")}, "deadline is inf"),
        ({"api_keys": ("short",)}, "shorter than 8"),
        ({"tls_key": "x"}, "belong together"),
        ({"steering": ("calm",)}, "steering is 'calm'; NAME=FILE"),
        ({"steering": ("=calm.safetensors",)}, "NAME=FILE, with a name of 1 to 64"),
        ({"steering": ("a=x", "a=y")}, "steering has 'a' twice"),
    ],
)
def test_settings_are_checked(setting: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ServeSettings(**setting)


def test_every_setting_comes_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[tuple[ServeSettings, dict[str, Any]]] = []

    def run(model: GPT, settings: ServeSettings, **engine: Any) -> int:
        found.append((settings, engine))
        return 7

    monkeypatch.setattr("gptkern.serve.process.run", run)
    monkeypatch.setenv("GPTKERN_API_KEYS", "from-the-environment")
    (tmp_path / "keys").write_text("first-key-1\n\nsecond-key-2\n")
    (tmp_path / "template").write_text("{{ messages }}")
    typed = (
        "--host ::1 --port 1 --name n --most-rows 2 --most-tokens 3 --deadline 0 --body-bytes 4 "
        "--grammar-seconds 5 --drain 6 --stream-interval 7 --stream-tokens 8 --cors-origin a "
        f"--cors-origin b --no-access-log --steering a={tmp_path}/keys --steering b={tmp_path}/template "
        f"--api-key-file {tmp_path}/keys --chat-template {tmp_path}/template --max-seqs 9"
    )
    for arguments in (["serve", "embedded", *typed.split()], ["serve"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 7
    (settings, engine), (plain, _) = found
    assert settings == ServeSettings(
        model_name="n",
        host="::1",
        port=1,
        most_rows=2,
        most_tokens=3,
        deadline=None,
        body_bytes=4,
        grammar_seconds=5.0,
        drain=6.0,
        stream_interval=7.0,
        stream_tokens=8,
        cors_origins=("a", "b"),
        access_log=False,
        steering=(f"a={tmp_path}/keys", f"b={tmp_path}/template"),
        api_keys=("first-key-1", "second-key-2", "from-the-environment"),
        chat_template="{{ messages }}",
    )
    assert engine["max_seqs"] == 9
    assert plain == ServeSettings(api_keys=("from-the-environment",))


def test_a_model_without_a_tokenizer_is_refused() -> None:
    bare = small_model()
    bare.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"), serving(bare):
        pass


def test_every_field_is_described() -> None:
    for kind in (CompletionRequest, ChatRequest):
        for name, field in kind.model_fields.items():
            assert field.description, name


def test_the_first_seed_is_random(server: Running) -> None:
    torch.manual_seed(0)
    texts = {server.complete("ab", max_tokens=12)["choices"][0]["text"] for _ in range(2)}
    assert len(texts) == 2
