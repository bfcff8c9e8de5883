"""A server on a port of its own, in a thread of the test's process; and requests to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from gptkern import GPT, GPTConfig, Tokenizer
from gptkern.serve.app import create_app
from gptkern.serve.process import DrainingServer, server_config
from gptkern.serve.service import Service
from gptkern.serve.settings import ServeSettings

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
NAME = "gptkern"


@dataclass
class Running:
    """A server that runs.

    Attributes:
        url: Its address, without a path.
        loop: The event loop that it runs in.
    """

    url: str
    service: Service
    server: DrainingServer
    loop: asyncio.AbstractEventLoop

    def post(self, path: str, timeout: float = 60, **body: Any) -> httpx.Response:
        """Ask for something of the model."""
        return httpx.post(self.url + path, json={"model": NAME, **body}, timeout=timeout)

    def complete(self, prompt: Any = "ROMEO:", **body: Any) -> dict[str, Any]:
        """The answer to a completion that is served."""
        answer = self.post("/v1/completions", prompt=prompt, **body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def error(self, path: str = "/v1/completions", status: int = 400, **body: Any) -> dict[str, Any]:
        """The error of a request that is refused."""
        given = {"prompt": "a"} if path == "/v1/completions" and "prompt" not in body else {}
        answer = self.post(path, **given, **body)
        assert answer.status_code == status, answer.text
        found: dict[str, Any] = answer.json()["error"]
        assert answer.headers["x-request-id"] == found["request_id"]
        return found

    def is_idle(self) -> bool:
        """True if nothing of any request is left."""
        service, load = self.service, self.service.inner.load
        return (
            service.jobs_in_flight == service.admission.rows == service.admission.tokens == 0
            and load.running == load.waiting == 0
            and load.free_pages == load.num_pages
            and not service.inner.cache.sequences
        )


def small_model(**changes: Any) -> GPT:
    """A random model of bytes, with an end of text."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 257, "n_positions": 128, "n_layer": 1, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**(sizes | {"eos_token_id": 256, "initializer_range": 0.3} | changes))).eval()
    model.tokenizer = Tokenizer.bytes()
    return model


@contextmanager
def serving(model: GPT, engine: dict[str, Any] | None = None, **settings: Any) -> Iterator[Running]:
    """A server of a model."""
    chosen = ServeSettings(**({"port": 0, "access_log": False, "chat_template": TEMPLATE} | settings))
    app: Any = create_app(model, chosen, **(engine or {}))
    config = server_config(app, chosen)
    server = DrainingServer(config, app.state.service)
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        serve = asyncio.create_task(server.serve())
        while not server.started and not serve.done():
            await asyncio.sleep(0.005)
        ready.set()
        await serve

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(60) and server.started
        port = server.servers[0].sockets[0].getsockname()[1]
        scheme = "https" if config.is_ssl else "http"
        yield Running(f"{scheme}://127.0.0.1:{port}", app.state.service, server, loops[0])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
