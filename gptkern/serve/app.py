"""The ASGI application: every path that a server answers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

import gptkern
from gptkern.gpt import GPT
from gptkern.serve import endpoints, metrics
from gptkern.serve.body import StrictRoute, mistake
from gptkern.serve.document import RESPONSES, DocumentedApp
from gptkern.serve.errors import ApiProblem, json_response
from gptkern.serve.guard import guarded
from gptkern.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gptkern.serve.service import Service
from gptkern.serve.settings import ServeSettings

_PAGE = {"": "text/html", "playground.css": "text/css", "playground.js": "text/javascript"}
# Nothing of the page comes from elsewhere, and nobody else's page may hold it.
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(model: GPT, settings: ServeSettings | None = None, **engine_options: Any) -> ASGIApp:
    """The application that serves a model.

    Its engine begins at once and ends with the application's lifespan. ``app.state.service`` is what is
    behind it.

    Args:
        engine_options: Those of ``gptkern.Engine``.

    Raises:
        TypeError, ValueError: An option that is wrong; a model without a tokenizer.
    """
    service = Service(model, settings or ServeSettings(), **engine_options)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = DocumentedApp(
        title="gptkern",
        version=gptkern.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.router.route_class = StrictRoute
    app.state.service = service
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_about(app, service)
    _add_page(app)
    _add_errors(app)
    app.add_middleware(guarded, settings=service.settings, gate=service)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    streamed: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The answer; with `stream`, server-sent events.",
            "content": {"application/json": {}, "text/event-stream": {}},
        }
    }

    @app.post("/v1/completions", responses=RESPONSES | streamed)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        return await endpoints.complete(service, body, request)

    @app.post("/v1/chat/completions", responses=RESPONSES | streamed)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await endpoints.chat(service, body, request)


def _add_tokens(app: FastAPI, service: Service) -> None:
    tokenizer = service.tokenizer

    @app.post("/tokenize", responses=RESPONSES)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Give the token ids of a text, or of a conversation."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiProblem(400, "prompt and messages: one of them is needed", param="prompt")
        if body.messages is not None:
            tokens = await service.encode_chat(body.messages)
        else:
            special = body.add_special_tokens is not False
            tokens = await service.encode(body.prompt or "", add_special_tokens=special)
        return json_response(
            {"tokens": tokens, "count": len(tokens), "max_model_len": service.model.spec.context}
        )

    @app.post("/detokenize", responses=RESPONSES)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Give the text of token ids."""
        service.check_model(body.model)
        try:
            return json_response({"prompt": tokenizer.decode(service.checked_ids("tokens", body.tokens))})
        except ValueError as error:
            message = str(error).removeprefix("Tokenizer.decode: ")
            raise ApiProblem(400, f"tokens: {message}", param="tokens") from error

    @app.get("/tokenizer_info", responses=RESPONSES)
    async def tokenizer_info() -> Response:
        """Say what the tokenizer is."""
        return json_response(
            {
                "vocab_size": tokenizer.vocab_size,
                "model_vocab_size": service.model.spec.vocab_size,
                "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token,
                "pad_token": tokenizer.pad_token,
                "unk_token": tokenizer.unk_token,
                "special_tokens": tokenizer.special_tokens,
                "end_of_text": list(service.end_of_text),
                "adds_space": tokenizer.adds_space,
                "chat_template": service.chat_template,
            }
        )


def _add_about(app: FastAPI, service: Service) -> None:
    settings = service.settings

    def card() -> dict[str, Any]:
        return {
            "id": settings.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "gptkern",
            "max_model_len": service.model.spec.context,
            "steering": service.steering.names,
        }

    @app.get("/v1/models", responses=RESPONSES)
    async def models() -> Response:
        """List the models: one."""
        return json_response({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}", responses=RESPONSES)
    async def model(name: str) -> Response:
        """Describe a model."""
        service.check_model(name)
        return json_response(card())

    @app.get("/health", responses={503: RESPONSES[503]})
    async def health() -> Response:
        """Say whether requests are taken."""
        if service.draining:
            raise ApiProblem(503, "the server is about to end", code="draining")
        return json_response({"status": "ok"})

    @app.get("/version")
    async def version() -> Response:
        """Give gptkern's version."""
        return json_response({"version": gptkern.__version__})

    @app.get("/metrics", include_in_schema=False)
    async def values() -> Response:
        """Give the metrics, for Prometheus."""
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    folder = files("gptkern.serve") / "playground"

    def add(path: str, kind: str) -> None:
        content = (folder / (path or "index.html")).read_bytes()

        @app.get(f"/{path}", include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    for path, kind in _PAGE.items():
        add(path, kind)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiProblem)
    async def refusal(request: Request, error: ApiProblem) -> Response:
        return error.response(request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def wrong_body(request: Request, error: RequestValidationError) -> Response:
        return mistake(error).response(request.state.request_id)

    @app.exception_handler(HTTPException)
    async def unknown_path(request: Request, error: HTTPException) -> Response:
        message = {404: "there is nothing at this path", 405: "the method is not served at this path"}
        text = message.get(error.status_code, str(error.detail))
        found = ApiProblem(error.status_code, text, headers=error.headers)
        return found.response(request.state.request_id)
