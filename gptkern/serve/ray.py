"""A Ray Serve application: several engines, of one machine or many, behind one address (extra ``ray``).

::

    serve run gptkern.serve.ray:app model=gpt2 replicas=4

A front takes requests and hands each to the replica that has seen the longest beginning of its prompt, among
equals to the one with the least to do. A replica is a server as ``gptkern serve`` runs, without a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gptkern.serve.admission import RETRY_AFTER
from gptkern.serve.connection import while_connected
from gptkern.serve.errors import ApiProblem, json_bytes
from gptkern.serve.guard import guarded
from gptkern.serve.settings import ServeSettings

# Characters of a prompt that are told apart together, and how many such pieces are remembered in all.
PIECE = 256
_MOST_PIECES = 1 << 16
_MOST_PIECES_A_PROMPT = 64
# Settings of a plain server's process, in whose place Ray has its own.
_RAYS_OWN = ("host", "port", "drain", "tls_certificate", "tls_key")


def opening_of(body: bytes) -> str:
    """The beginning of what a body asks to be continued; empty where it has none.

    A body that is wrong has none either: the replica refuses it.
    """
    try:
        asked = json.loads(body)
        prompt = asked.get("prompt", asked.get("messages", ""))
        while isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        return (prompt if isinstance(prompt, str) else json.dumps(prompt))[: PIECE * _MOST_PIECES_A_PROMPT]
    except (ValueError, AttributeError, RecursionError):
        return ""


class PrefixTable:
    """The beginnings that replicas have seen, the latest of them.

    Args:
        most: Beginnings that are remembered.
    """

    def __init__(self, most: int = _MOST_PIECES) -> None:
        self._most = most
        self._seen: OrderedDict[tuple[Any, int], None] = OrderedDict()

    def add(self, replica: Any, opening: str) -> None:
        """Note that a replica gets a prompt."""
        for key in self._keys(opening):
            self._seen[(replica, key)] = None
            self._seen.move_to_end((replica, key))
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)

    def length(self, replica: Any, opening: str) -> int:
        """The pieces of a prompt's beginning that a replica has seen."""
        count = 0
        for key in self._keys(opening):
            if (replica, key) not in self._seen:
                break
            count += 1
        return count

    @staticmethod
    def _keys(opening: str) -> list[int]:
        return [hash(opening[:end]) for end in range(PIECE, len(opening) + 1, PIECE)]


class PrefixRouter(RequestRouter):
    """Ray Serve's choice of a replica: the longest known beginning first, then the shortest queue."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = PrefixTable()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which they are tried: a full one is passed over."""
        opening = _opening_argument(pending_request)

        def order(replica: RunningReplica) -> tuple[int, int, str]:
            queued = self.replica_queue_len_cache.get(replica.replica_id)
            return (
                -self._table.length(replica.replica_id, opening),
                0 if queued is None else queued,
                str(replica.replica_id),
            )

        return [[replica] for replica in sorted(candidate_replicas, key=order)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Note where a prompt went."""
        self._table.add(replica_id, _opening_argument(pending_request))


def _opening_argument(pending: PendingRequest | None) -> str:
    return "" if pending is None else str(pending.kwargs.get("opening", ""))


@serve.deployment(request_router_config=RequestRouterConfig(request_router_class=PrefixRouter))
class Replica:
    """One engine.

    Args:
        model: As in ``GPT.from_pretrained``.
        settings: Those of ``ServeSettings``.
        engine: Those of ``Engine``.
    """

    def __init__(
        self, model: str, device: str | None, settings: dict[str, Any], engine: dict[str, Any]
    ) -> None:
        import torch

        from gptkern.gpt import GPT
        from gptkern.serve.app import create_app

        on = device or ("cuda" if torch.cuda.is_available() else "cpu")
        gpt = GPT.from_pretrained(model, device=on)
        self._app: Any = create_app(gpt, ServeSettings(**settings), **engine)

    async def answer(
        self, method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes, *, opening: str
    ) -> AsyncIterator[dict[str, Any]]:
        """The ASGI messages that answer a request."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers],
            "client": None,
            "server": None,
        }
        incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        outgoing: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})

        async def run() -> None:
            try:
                await self._app(scope, incoming.get, outgoing.put)
            finally:
                outgoing.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (message := await outgoing.get()) is not None:
                if message["type"] == "http.response.start":
                    pairs = [
                        (name.decode("latin-1"), value.decode("latin-1"))
                        for name, value in message["headers"]
                    ]
                    yield {"status": message["status"], "headers": pairs}
                elif message.get("body"):
                    yield {"body": message["body"]}
        finally:
            incoming.put_nowait({"type": "http.disconnect"})
            await asyncio.gather(task, return_exceptions=True)

    def check_health(self) -> None:
        """Raise where the engine takes nothing more: Ray then makes a new replica."""
        if self._app.state.service.draining:
            raise RuntimeError("the engine is about to end")


@serve.deployment
class Front:
    """The address: behind the same guard as a plain server, it gives requests to replicas, and answers back.

    Args:
        replicas: The replicas' handle.
        settings: Those of ``ServeSettings``.
    """

    draining = False

    def __init__(self, replicas: Any, settings: dict[str, Any]) -> None:
        self._replicas = replicas.options(stream=True)
        self._app = guarded(self._forward, ServeSettings(**settings), self)

    def refused(self, status: int) -> None:
        """Nothing: what replicas refuse, they count."""

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        return _Application(self._app)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        await while_connected(receive, self._answer(scope, body, send))

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        request_id = scope["state"]["request_id"]
        headers = [("x-request-id", request_id)]
        if (kind := Headers(scope=scope).get("content-type")) is not None:
            headers.append(("content-type", kind))
        messages = self._replicas.answer.remote(
            scope["method"], scope["path"], headers, body, opening=opening_of(body)
        )
        try:
            start = await anext(messages)
        except (RayError, RayServeException) as error:
            raise _lost(error) from error
        pairs = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in start["headers"]
            if name != "content-length"
        ]
        await send({"type": "http.response.start", "status": start["status"], "headers": pairs})
        streamed = any(value.startswith("text/event-stream") for _, value in start["headers"])
        async with contextlib.aclosing(_bodies(messages, streamed, request_id)) as parts:
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Application(Response):
    """An answer that an ASGI application makes: Ray calls it with what came."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _bodies(messages: Any, streamed: bool, request_id: str) -> AsyncGenerator[bytes, None]:
    """The parts of an answer. Where its replica dies a stream ends with an error, and another is cut off."""
    ended = False
    try:
        async for message in messages:
            yield message["body"]
        ended = True
    except (RayError, RayServeException) as error:
        ended = True
        if not streamed:
            raise
        yield b"data: " + json_bytes(_lost(error).body(request_id)) + b"\n\n"
    finally:
        if not ended:
            messages.cancel()


def _lost(error: Exception) -> ApiProblem:
    message = f"the replica that had the request was lost ({type(error).__name__}): ask again"
    return ApiProblem(503, message, code="replica_lost", headers=RETRY_AFTER)


def app(arguments: dict[str, Any]) -> Any:
    """The application, for ``serve run`` and ``serve deploy``.

    Args:
        arguments: ``model``; ``replicas`` (1); ``device``; ``gpus`` and ``cpus`` a replica;
            ``max_ongoing_requests`` of a replica (64); ``settings``, those of ``ServeSettings``; ``engine``,
            those of ``Engine``.

    Raises:
        TypeError, ValueError: An argument that is not known; a setting that is wrong, or Ray's own.
    """
    given = dict(arguments)
    model, device = str(given.pop("model", "embedded")), given.pop("device", None)
    settings = {"access_log": False, **given.pop("settings", {})}
    if own := [name for name in _RAYS_OWN if name in settings]:
        raise ValueError(f"gptkern.serve.ray: {own[0]} of the settings is for Ray to say, in its own options")
    ServeSettings(**settings)
    resources = {"num_cpus": float(given.pop("cpus", 1)), "num_gpus": float(given.pop("gpus", 0))}
    replica: Any = Replica
    # Keys, origins and the log are the front's.
    inner = settings | {"api_keys": (), "cors_origins": (), "access_log": False}
    replicas = replica.options(
        num_replicas=int(given.pop("replicas", 1)),
        max_ongoing_requests=int(given.pop("max_ongoing_requests", 64)),
        ray_actor_options=resources,
    ).bind(model, device, inner, dict(given.pop("engine", {})))
    if given:
        raise ValueError(f"gptkern.serve.ray: {', '.join(sorted(given))} is not known; see the guide")
    front: Any = Front
    return front.options(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0}).bind(
        replicas, settings
    )
