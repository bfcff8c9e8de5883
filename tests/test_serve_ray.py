"""The Ray application: one server's answers from several replicas, and a replica that dies."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ray = pytest.importorskip("ray", reason="needs the extra [ray]")
serve = pytest.importorskip("ray.serve", reason="needs the extra [ray]")

from serve_support import serving

from gptkern import GPT
from gptkern.serve.ray import PIECE, PrefixTable, app, opening_of

URL = "http://127.0.0.1:8241"


def test_the_table_knows_the_longest_beginning() -> None:
    table = PrefixTable(most=4)
    text = "".join(map(chr, range(300, 300 + 4 * PIECE)))
    table.add("a", text[: 2 * PIECE])
    table.add("b", text[:PIECE])
    assert [table.length(name, text) for name in "abc"] == [2, 1, 0]
    table.add("c", text[:PIECE] + "x" * PIECE)
    # What was seen first is forgotten first.
    assert [table.length(name, text) for name in "abc"] == [0, 1, 1]


def test_the_opening_of_a_body() -> None:
    assert opening_of(b'{"prompt": "ab"}') == "ab"
    assert opening_of(b'{"prompt": ["ab", "c"]}') == "ab"
    assert opening_of(b'{"prompt": [[1, 2], [3]]}') == "[1, 2]"
    assert "hi" in opening_of(b'{"messages": [{"role": "user", "content": "hi"}]}')
    assert [opening_of(body) for body in (b"", b"[]", b"{", b"[" * 100_000)] == [""] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "embedded", "replica": 2}, "replica is not known"),
        ({"settings": {"port": 80}}, "port of the settings is for Ray"),
        ({"settings": {"tls_key": "x"}}, "tls_key of the settings is for Ray"),
        ({"settings": {"body_bytes": 0}}, "body_bytes is 0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        app(arguments)


KEY = "a-key-of-a-test"
ORIGIN = "https://a.example"
SETTINGS = {"api_keys": [KEY], "cors_origins": [ORIGIN], "body_bytes": 10_000}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": 8241})
    serve.run(
        app({"replicas": 2, "cpus": 0.5, "engine": {"max_seqs": 8}, "settings": SETTINGS}), name="gptkern"
    )
    yield URL
    serve.shutdown()
    ray.shutdown()


def body(seed: int, **more: Any) -> dict[str, Any]:
    return {"model": "gptkern", "prompt": "ROMEO: " * 40, "max_tokens": 20, "seed": seed, **more}


def replica_processes() -> list[int]:
    """The processes of the replicas that this one started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            grandparent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if title.startswith(b"ray::ServeReplica:gptkern:Replica") and os.getpid() in (parent, grandparent):
            found.append(int(folder.name))
    return found


HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_front_has_a_plain_servers_guard(address: str) -> None:
    url = address + "/v1/completions"
    for headers, status in (({}, 401), ({"authorization": "Bearer nonsense"}, 401), (HEADERS, 200)):
        answer = httpx.post(url, json=body(1), headers=headers, timeout=60)
        assert answer.status_code == status, answer.text
        assert len(set(answer.headers.get_list("x-request-id"))) == 1
    named = httpx.get(address + "/health", headers={"x-request-id": "mine-1"})
    # Ray's proxy adds the id too.
    assert named.status_code == 200 and set(named.headers.get_list("x-request-id")) == {"mine-1"}
    assert httpx.get(address + "/health", headers={"x-request-id": "a b"}).status_code == 400
    # A browser asks before, without a key.
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = httpx.options(url, headers=asks | {"origin": ORIGIN})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == ORIGIN
    other = httpx.options(url, headers=asks | {"origin": "https://b.example"})
    assert other.status_code == 400
    answer = httpx.post(url, json=body(1), headers=HEADERS | {"origin": ORIGIN}, timeout=60)
    assert answer.headers.get_list("access-control-allow-origin") == [ORIGIN]
    refused = httpx.post(url, json=body(1), headers={"origin": ORIGIN})
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == ORIGIN
    long = httpx.post(url, json=body(1, user="a" * 10_000), headers=HEADERS)
    assert long.status_code == 413 and long.json()["error"]["code"] == "body_too_long"


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_answers_are_one_servers_and_a_lost_replica_comes_back(address: str) -> None:
    with serving(GPT.from_pretrained()) as server:
        expected = [server.complete(**{k: v for k, v in body(s).items() if k != "model"}) for s in range(6)]
    for seed, one in enumerate(expected):
        found = httpx.post(address + "/v1/completions", json=body(seed), headers=HEADERS, timeout=60).json()
        assert found["choices"] == one["choices"] and found["usage"] == one["usage"]
    assert httpx.get(address + "/v1/models", headers=HEADERS).json()["data"][0]["id"] == "gptkern"
    wrong = httpx.post(address + "/v1/completions", json=body(1, n=0), headers=HEADERS)
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "n"

    victims = replica_processes()
    assert len(victims) == 2
    long = body(1, max_tokens=200, stream=True)
    lines: list[str] = []
    with httpx.stream("POST", address + "/v1/completions", json=long, headers=HEADERS, timeout=120) as answer:
        iterator = answer.iter_lines()
        lines.append(next(iterator))
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        lines += iterator
    events = [line for line in lines if line.startswith("data: ")]
    last = events[-1].removeprefix("data: ")
    assert last == "[DONE]" or json.loads(last)["error"]["code"] == "replica_lost"
    end = time.monotonic() + 120
    while True:
        assert time.monotonic() < end
        try:
            again = httpx.post(address + "/v1/completions", json=body(0), headers=HEADERS, timeout=60)
        except httpx.HTTPError:
            continue
        if again.status_code == 200:
            assert again.json()["choices"] == expected[0]["choices"]
            break
        time.sleep(0.5)
