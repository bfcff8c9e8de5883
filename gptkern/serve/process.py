"""The server process: uvicorn, with a drain between SIGTERM and the end."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from types import FrameType
from typing import Any

import uvicorn

from gptkern.gpt import GPT
from gptkern.serve.app import create_app
from gptkern.serve.service import Service
from gptkern.serve.settings import ServeSettings
from gptkern.serve.wire import BoundedProtocol

# After a drain answers are on their way out: they have so many seconds.
_LAST_SECONDS = 5
# Requests that a drain has ended get their last tokens within this time.
_CANCEL_SECONDS = 5.0
_POLL_SECONDS = 0.02
# How long the event loop may keep the engine's thread waiting for the interpreter: a pass takes about a
# millisecond, and Python's own 5 would be as much as several.
_SWITCH_SECONDS = 0.0005


def run(model: GPT, settings: ServeSettings | None = None, **engine_options: Any) -> int:
    """Serve a model until SIGTERM or Ctrl-C.

    Either lets the server take no more requests and end those in flight, for ``settings.drain`` seconds; the
    rest then ends with what it has. A second one ends that time at once.

    Args:
        engine_options: Those of ``gptkern.Engine``.

    Returns:
        An exit code: 0, or 130 after Ctrl-C.

    Raises:
        TypeError, ValueError: As ``create_app``.
        OSError: The address cannot be listened at.
    """
    settings = settings or ServeSettings()
    sys.setswitchinterval(_SWITCH_SECONDS)
    app: Any = create_app(model, settings, **engine_options)
    config = server_config(app, settings)
    # Here, so that an address that is taken is an error of this function.
    socket = config.bind_socket() if settings.port else None
    server = DrainingServer(config, app.state.service)
    server.run(sockets=None if socket is None else [socket])
    return 130 if server.interrupted else 0


def server_config(app: Any, settings: ServeSettings) -> uvicorn.Config:
    """The settings of uvicorn's own."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedProtocol,
        ws="none",
        # What clients do wrong is told to them.
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )


class DrainingServer(uvicorn.Server):
    """A server whose first signal begins a drain.

    Attributes:
        interrupted: Ctrl-C ended it.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._signals = 0
        self._drain: asyncio.Task[None] | None = None
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: the first begins the drain, the second ends it, the third ends all."""
        self.interrupted |= sig == signal.SIGINT
        self._signals += 1
        if self._signals > 2:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Begin the drain where a signal has come; True ends the server."""
        if self._signals and self._drain is None:
            self._service.draining = True
            self._drain = asyncio.create_task(self._drained())
        return bool(await super().on_tick(counter))

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets=sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            host = f"[{host}]" if ":" in host else host
            name = self._service.settings.model_name
            print(f"gptkern serves {name} at {scheme}://{host}:{port}", file=sys.stderr, flush=True)

    async def _drained(self) -> None:
        """Wait for the requests in flight, then end what is left of them."""
        service = self._service
        end = time.monotonic() + service.settings.drain
        while service.jobs_in_flight and self._signals < 2 and time.monotonic() < end:
            await asyncio.sleep(_POLL_SECONDS)
        service.cancel_all()
        end = time.monotonic() + _CANCEL_SECONDS
        while service.jobs_in_flight and time.monotonic() < end:
            await asyncio.sleep(_POLL_SECONDS)
        self.should_exit = True
