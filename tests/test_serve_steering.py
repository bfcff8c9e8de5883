"""Steering vectors of the server: by their names and strengths, beside requests that have none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra [serve]")

from safetensors.torch import save_file
from serve_support import Running, serving, small_model

from gptkern import GPT
from gptkern.checkpoint.errors import CheckpointError
from gptkern.cli import main

LOUD, CALM = {1: 0}, {0: 1, 1: 2}
STRENGTHS = {"loud": 1.5, "calm": -0.75}


def vectors(seeds: dict[int, int]) -> dict[int, torch.Tensor]:
    return {
        layer: torch.randn(32, generator=torch.Generator().manual_seed(seed)) for layer, seed in seeds.items()
    }


def stored(folder: Path, name: str, tensors: dict[Any, torch.Tensor]) -> str:
    save_file({str(layer): tensor for layer, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return f"{name}={folder / name}.safetensors"


@pytest.fixture(scope="module")
def model() -> GPT:
    return small_model()


@pytest.fixture(scope="module")
def server(model: GPT, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("vectors")
    bf16 = {layer: vector.bfloat16() for layer, vector in vectors(CALM).items()}
    registered = (stored(folder, "loud", vectors(LOUD)), stored(folder, "calm", bf16))
    with serving(model, {"max_seqs": 8}, steering=registered) as running:
        yield running
        assert running.is_idle()


def summed() -> dict[int, torch.Tensor]:
    calm = {layer: vector.bfloat16().float() for layer, vector in vectors(CALM).items()}
    return {0: -0.75 * calm[0], 1: 1.5 * vectors(LOUD)[1] - 0.75 * calm[1]}


def test_an_answer_is_steered_as_generate_steers(model: GPT, server: Running) -> None:
    draw = {"temperature": 0.8, "seed": 5}
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 20, **draw}
    (expected,) = model.generate_text("ab", steering=summed(), **options)
    answer = server.complete("ab", max_tokens=20, logprobs=1, steering=STRENGTHS, **draw)
    (choice,) = answer["choices"]
    assert choice["text"] == expected.text
    assert choice["logprobs"]["token_logprobs"] == expected.logprobs
    other_order = dict(reversed(STRENGTHS.items()))
    assert (
        server.complete("ab", max_tokens=20, steering=other_order, **draw)["choices"][0]["text"]
        == expected.text
    )
    (plain,) = model.generate_text("ab", **options)
    assert plain.text != expected.text
    for nothing in (None, {}, {"loud": 0}):
        answer = server.complete("ab", max_tokens=20, steering=nothing, **draw)
        assert answer["choices"][0]["text"] == plain.text


def test_requests_side_by_side_keep_their_own(server: Running) -> None:
    bodies: list[Any] = [{"steering": {"loud": strength}} for strength in (-4, -1, 1, 4)] + [{}, {}]
    alone = [server.complete("ab" * 20, max_tokens=24, seed=1, **body)["choices"] for body in bodies]
    together: dict[int, Any] = {}

    def ask(place: int) -> None:
        answer = server.complete("ab" * 20, max_tokens=24, seed=1, **bodies[place])
        together[place] = answer["choices"]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[place] for place in range(len(bodies))] == alone
    assert len({choices[0]["text"] for choices in alone}) == 5


def test_a_chat_is_steered_and_the_names_are_listed(server: Running) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "seed": 1, "max_tokens": 12}
    steered = server.post("/v1/chat/completions", **asked, steering={"loud": 4}).json()
    plain = server.post("/v1/chat/completions", **asked).json()
    assert steered["choices"][0]["message"] != plain["choices"][0]["message"]
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["steering"] == ["loud", "calm"]
    document = httpx.get(server.url + "/openapi.json").json()
    (table, _) = document["components"]["schemas"]["ChatRequest"]["properties"]["steering"]["anyOf"]
    assert table["propertyNames"] == {"enum": ["loud", "calm"]}
    assert table["maxProperties"] == 16


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"angry": 1}, "steering is 'angry'; 'loud', 'calm' are registered"),
        ({"calm": 1, "angry": 0}, "steering is 'angry'"),
        ({"calm": 1001}, "less than or equal to 1000"),
        ({"calm": "1"}, "steering"),
        (["calm"], "steering"),
        ({str(name): 1 for name in range(17)}, "at most 16"),
    ],
)
def test_mistakes_are_the_requests_own(server: Running, steering: Any, message: str) -> None:
    error = server.error(steering=steering)
    assert error["param"].startswith("steering") and message in error["message"]


def test_a_server_without_vectors_says_so(model: GPT) -> None:
    with serving(model) as server:
        error = server.error(steering={"calm": 1})
        assert error["code"] == "steering_not_found"
        assert "no steering vectors: start it with --steering NAME=FILE" in error["message"]
        # Its passes stay with the fastest executor.
        assert server.service.inner.executors.decode.name == "cpu"


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"6": torch.zeros(32)}, ValueError, "steering of layer 6; layers from 0 to 1"),
        ({"1": torch.zeros(31)}, ValueError, r"layer 1 has shape \(31,\)"),
        ({"1": torch.zeros(32, dtype=torch.int32)}, TypeError, "layer 1 is torch.int32"),
        ({"1": torch.full((32,), torch.inf)}, ValueError, "layer 1 is not finite"),
        ({"layer.1": torch.zeros(32)}, ValueError, "tensor 'layer.1' found; tensors named by their layer"),
        ({"01": torch.zeros(32)}, ValueError, "tensor '01' found"),
        ({}, ValueError, "no tensor found"),
    ],
)
def test_files_are_checked_at_the_start(
    model: GPT, tmp_path: Path, tensors: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    registered = stored(tmp_path, "calm", tensors)
    with pytest.raises(error, match=message), serving(model, steering=(registered,)):
        pass


def test_other_files_are_refused(model: GPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("no tensors")
    text = (f"calm={tmp_path / 'text'}",)
    with pytest.raises(CheckpointError, match="not a safetensors file"), serving(model, steering=text):
        pass
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--steering", f"calm={tmp_path / 'nowhere'}"])
    assert ended.value.code == 2
    assert "there is no file" in " ".join(capsys.readouterr().err.replace("│", " ").split())
