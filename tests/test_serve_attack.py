"""The server against clients that mean no good: each gets an error or a proper end, and leaves nothing."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from serve_support import NAME, Running, serving, small_model

from gptkern import GPT
from gptkern.serve import grammar_worker, uploads, wire
from gptkern.serve.body import read_json
from gptkern.serve.protocol import ChatRequest, CompletionRequest

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def model() -> GPT:
    return small_model()


@pytest.fixture(scope="module")
def server(model: GPT) -> Iterator[Running]:
    with serving(model, {"max_seqs": 8, "prefill_chunk": 64}) as running:
        yield running


@pytest.fixture(autouse=True)
def _leaves_nothing(server: Running) -> Iterator[None]:
    yield
    until(server.is_idle)
    assert httpx.get(server.url + "/health").status_code == 200


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60)


def ask(server: Running, sent: bytes) -> bytes:
    """The whole of what comes back for bytes on a connection of their own."""
    received = b""
    with closing(connect(server)) as raw:
        raw.sendall(sent)
        while part := raw.recv(65536):
            received += part
    return received


def status_of(received: bytes) -> int:
    """The status of an answer, whose error is checked to be of OpenAI's form."""
    head, _, body = received.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status >= 400:
        error = json.loads(body)["error"]
        assert error["message"] and error["request_id"], received
    return status


def body(**more: Any) -> bytes:
    return json.dumps({"model": NAME, "prompt": "ab", "max_tokens": 4} | more).encode()


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"TRACE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
        (GET + b"B@d header\r\n\r\n", 400),
        (GET + b"X: a\x00b\r\n\r\n", 400),
        (GET + b"x-request-id: a\r\n b\r\n\r\n", 400),
        (GET + b"x-request-id: \xff\r\n\r\n", 400),
        (GET + b"X: " + b"a" * (1 << 16) + b"\r\n\r\n", 431),
        (GET + b"X: a\r\n" * 20_000 + b"\r\n", 431),
        (b"GET /" + b"a" * 65_000 + b"?" + b"b" * 1000 + b" HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        (b"GET /v1/models/%00%ff%0aX HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (POST + b"Content-Length: -5\r\n\r\n", 400),
        (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
        (POST + b"Content-Length: 9223372036854775807\r\n\r\n", 413),
        (POST + b"Content-Length: 5000000\r\nExpect: 100-continue\r\n\r\n", 413),
        (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        # It says less than it sends: the rest is no request.
        (POST + b"Content-Length: 5\r\n\r\n" + body(), 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n", 400),
        (
            POST
            + b"Transfer-Encoding: chunked\r\n\r\n"
            + b"".join(b"1\r\n%c\r\n" % byte for byte in body())
            + b"0\r\n\r\n",
            200,
        ),
    ],
)
def test_heads_and_lengths_that_lie(server: Running, sent: bytes, status: int) -> None:
    assert status_of(ask(server, sent)) == status


def test_a_head_without_an_end_is_not_read_on(server: Running) -> None:
    with closing(connect(server)) as raw, pytest.raises(OSError):
        raw.sendall(GET + b"X: ")
        while True:
            raw.sendall(b"a" * 65536)


def test_a_slow_head_ends(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEAD_SECONDS", 0.05)
    assert status_of(ask(server, b"GET /health HTT")) == 408
    assert ask(server, b"") == b""
    # A second request of a connection, too.
    again = ask(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea")
    assert again.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 408" in again


def test_a_slow_body_ends(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "BODY_SECONDS", 0.05)
    assert status_of(ask(server, POST + b'Content-Length: 100\r\n\r\n{"model"')) == 408


def test_a_body_that_breaks_off_leaves_nothing(server: Running) -> None:
    with closing(connect(server)) as raw:
        raw.sendall(POST + b'Content-Length: 100\r\n\r\n{"model"')
        raw.shutdown(socket.SHUT_WR)
        assert raw.recv(1) == b""


def test_bodies_have_a_bound_together(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_TOGETHER", 2)
    long = b'{"prompt": "' + b"a" * 900
    with serving(model, body_bytes=1000) as server:
        open_ones = [connect(server) for _ in range(3)]
        for raw in open_ones:
            raw.sendall(POST + b"Content-Length: 1000\r\n\r\n" + long)
        # One of them is the third, which finds no room.
        found = b"".join(raw.recv(65536) for raw in open_ones if _has_answer(raw))
        assert status_of(found) == 429 and b"retry-after" in found.lower()
        for raw in open_ones:
            raw.close()
        until(lambda: server.complete("a", max_tokens=1) != {})
        assert server.is_idle()


def _has_answer(raw: socket.socket) -> bool:
    raw.settimeout(0.5)
    try:
        return raw.recv(1, socket.MSG_PEEK) != b""
    except TimeoutError:
        return False


def test_a_body_that_is_too_long_is_told_so_when_it_is_sent(model: GPT) -> None:
    with serving(model, body_bytes=100_000) as server:
        # Nobody reads an answer before everything is sent.
        sent = POST + b"Content-Length: 400000\r\n\r\n" + b"a" * 400_000
        assert status_of(ask(server, sent)) == 413


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"[" * 100_000, "invalid_json"),
        (b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}", "invalid_json"),
        (b'{"response_format":' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}", "invalid_json"),
        (b'{"temperature":NaN}', "invalid_json"),
        (b'{"temperature":-Infinity}', "invalid_json"),
        (b'{"temperature":1e400}', "invalid_json"),
        (b'{"seed":' + b"1" * 5000 + b"}", "invalid_json"),
        (b'{"seed":1e300}', "invalid_field"),
        (b'{"n":1.5}', "invalid_field"),
        (b'{"n":true}', "invalid_field"),
        (b'{"user":"\\ud800"}', "invalid_json"),
        (b'{"stop":"\\udfff"}', "invalid_json"),
        (b'{"regex":"a\\ud800b"}', "invalid_json"),
        (b'{"logit_bias":{"\\ud800":1}}', "invalid_json"),
        (b'{"user":"\xff"}', "invalid_json"),
        (b"\x1f\x8b\x08\x00", "invalid_json"),
        (b'{"max_tokens":9223372036854775808}', "invalid_field"),
        (b'{"n":8,"max_tokens":2147483647}', "context_length_exceeded"),
        (b'{"repetition_penalty":1e-300}', "invalid_field"),
        (b'{"stop":[' + b'"a",' * 5000 + b'"a"]}', "invalid_field"),
        (b'{"use_beam_search":true}', "unknown_field"),
    ],
)
def test_values_that_mean_no_good(server: Running, content: bytes, code: str) -> None:
    if content.startswith(b"{"):
        content = b'{"model":"gptkern",' + (b"" if b'"prompt"' in content else b'"prompt":"a",') + content[1:]
    answer = httpx.post(server.url + "/v1/completions", content=content, headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == code, answer.text


@pytest.mark.parametrize("value", [5e-324, 1e-300, 1e-40])
@pytest.mark.parametrize("name", ["temperature", "top_p", "typical_p", "min_p"])
def test_the_smallest_numbers_draw(server: Running, name: str, value: float) -> None:
    assert server.complete("abc", logprobs=1, **{name: value})["choices"][0]["logprobs"]


def test_whole_numbers_may_be_written_as_floats(server: Running) -> None:
    whole = server.complete([97, 98], seed=3, n=2, max_tokens=4)["choices"]
    assert server.complete([97.0, 98], seed=3.0, n=2.0, max_tokens=4.0)["choices"] == whole


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [0.5] * 5000},
        {"prompt": [1, *["a"] * 5000]},
        {"prompt": [[0.5] * 5000] * 5},
        {"prompt": ["a"] * 5000},
        {"prompt": "a", "stop": [3] * 5000},
        {"prompt": "a", "logit_bias": {str(key): "x" for key in range(50_000)}},
        {"prompt": "a", **{f"x{place}": 1 for place in range(5000)}},
        {"messages": [{"role": "user", "content": 3}] * 4000},
        {"messages": [{"role": "user", "content": [{"type": "image"}] * 4000}]},
        {"messages": [{f"x{place}": 1 for place in range(5000)}] * 5},
    ],
)
def test_very_many_mistakes_are_few_errors(fields: dict[str, Any]) -> None:
    kind = ChatRequest if "messages" in fields else CompletionRequest
    with pytest.raises(ValidationError) as wrong:
        kind.model_validate({"model": NAME, **fields})
    assert wrong.value.error_count() < 20


def test_a_long_value_is_cut_in_its_error(server: Running) -> None:
    for value in ("a" * 300, ["a" * 300] * 17, {"a" * 300: 1}, 10**300):
        error = server.error(stop=value)
        assert error["param"] == "stop" and len(error["message"]) < 400


def test_json_is_read_as_deep_as_schemas_go() -> None:
    nested = b"[" * 100 + b"]" * 100
    assert json.dumps(read_json(nested)).encode() == nested
    with pytest.raises(json.JSONDecodeError, match="too deeply"):
        read_json(b"[" * 200 + b"]" * 200)


def test_a_grammar_whose_tokens_take_long_is_its_own_requests_error(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiled before, so that its tokens alone are at fault.
    assert server.complete(regex="[ab]{90}", n=2)["choices"]
    with monkeypatch.context() as slow:
        slow.setattr(grammar_worker, "_SECONDS", 0.0)
        slow.setattr(grammar_worker, "_TOKEN_SECONDS", 0.0)
        assert "the grammar cannot go on" in server.error(regex="[ab]{90}", n=2)["message"]
        stream = server.post("/v1/completions", prompt="ab", regex="[ab]{90}", stream=True)
        assert "a simpler one is needed" in stream.text and "[DONE]" not in stream.text
    assert server.complete(regex="[ab]{90}", n=2)["choices"]


@pytest.mark.parametrize(
    "grammar",
    [
        {"regex": "(" * 1000 + "a" + ")" * 1000},
        {"grammar": "start: start"},
        {"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000},
        {"grammar": "start: e\ne: e"},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"$ref": "http://127.0.0.1:1/"}},
            }
        },
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
    ],
)
def test_grammars_of_no_language(server: Running, grammar: dict[str, Any]) -> None:
    assert server.error(**grammar)["code"] in ("invalid_grammar", "grammar_too_complex")


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_during_the_prompt_leaves_nothing(model: GPT, stream: bool) -> None:
    with serving(model, {"max_seqs": 2, "prefill_chunk": 64, "prefix_cache": False}) as server:
        inner = server.service.inner
        step = inner.step
        began, gone = threading.Event(), threading.Event()

        def held_step() -> Any:
            events = step()
            if not began.is_set():
                # The first part of the prompt is done, no token has come.
                assert not [event for event in events if event.token is not None]
                began.set()
                assert gone.wait(60)
            return events

        inner.step = held_step  # type: ignore[method-assign]
        content = body(prompt="a" * 120, stream=stream)
        with closing(connect(server)) as raw:
            raw.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(content) + content)
            assert began.wait(60)
        until(lambda: not server.service.jobs_in_flight)
        gone.set()
        until(server.is_idle)


def test_a_second_signal_ends_the_drain_properly(model: GPT) -> None:
    with serving(model, {"max_seqs": 2}, drain=600.0) as server:
        inner = server.service.inner
        step, hold = inner.step, threading.Event()

        def slow_step() -> Any:
            hold.wait(0.01)
            return step()

        inner.step = slow_step  # type: ignore[method-assign]
        fields = {"model": NAME, "prompt": "ab", "max_tokens": 120, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=fields, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            for _ in range(2):
                server.server.handle_exit(signal.SIGTERM, None)
            events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "abort"
        until(server.is_idle)


def test_a_clock_that_jumps_changes_nothing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = server.complete("ab", seed=1, max_tokens=8)["choices"]
    jumps = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    assert server.complete("ab", seed=1, max_tokens=8)["choices"] == expected


def test_nothing_writes_lines_of_its_own_into_the_log(model: GPT, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(model, access_log=True) as server:
        httpx.get(server.url + "/v1/models/a%0a%7b%22status%22:200%7d%0d%1b[31m")
        httpx.get(server.url + "/health", headers={"x-request-id": "{a}"})
        ask(server, b"GARBAGE\r\n\r\n")
        ask(
            server,
            b"GET /health HTTP/1.1\r\nConnection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n\r\nX\r\n\r\n",
        )
    lines = [line for line in capfd.readouterr().err.splitlines() if "gptkern serves" not in line]
    assert [json.loads(line)["status"] for line in lines] == [404, 400, 200]
    assert not any("\x1b" in line for line in lines)
