"""The REST application: which path leads to which handler, and what holds for all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as PathRoute

from serve.config import Settings
from serve.errors import EngineFailure, MethodNotAllowed, NotFound, ServeError
from serve.metrics import Route
from serve.rest import errors, playground, reference_page
from serve.rest.call import Call
from serve.rest.endpoint import ByMethod, Endpoint, Handler, TrackedHandler, tracked
from serve.rest.handlers import Handlers
from serve.rest.json_text import dump, dump_ascii, shown
from serve.rest.middleware import Cors, Keys, RequestIds, UnreadBodies
from serve.rest.openai_handlers import OpenAIHandlers
from serve.rest.schema import openapi_document
from serve.rest.tgi import Answer
from serve.rest.tgi_handlers import TgiHandlers
from serve.service import Service


def create_app(service: Service, *, settings: Settings) -> FastAPI:
    """The application over a service.

    Args:
        settings: api_keys, cors_origins, max_body_mib, keepalive_seconds, ui and grpc_port of it.
    """
    # FastAPI's own routes are off: its documentation page loads scripts from elsewhere.
    app = FastAPI(title="flan-serve", openapi_url=None, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    native, openai, tgi = Handlers(service), OpenAIHandlers(service), TgiHandlers(service, version=_version())
    requests: Mapping[str, tuple[Route, TrackedHandler]] = {
        "/v1/generate": (Route.GENERATE, native.generate),
        "/v1/score": (Route.SCORE, native.score),
        "/v1/tokenize": (Route.TOKENIZE, native.tokenize),
        "/v1/completions": (Route.COMPLETIONS, openai.completions),
        "/v1/chat/completions": (Route.CHAT, openai.chat),
        "/generate": (Route.TGI, tgi.generate(Answer.OBJECT)),
        "/generate_stream": (Route.TGI, tgi.generate(Answer.STREAM)),
        "/": (Route.TGI, tgi.generate(Answer.AS_ASKED)),
    }
    looks: Mapping[str, Handler] = {
        "/v1/models": native.models,
        "/v1/models/{name:path}": native.model,
        "/livez": native.live,
        "/readyz": native.ready,
        "/health": native.ready,
        "/metrics": native.metrics,
        "/info": tgi.info,
        **(playground.pages(settings) if settings.ui else {"/": _no_playground}),
        **_reference(has_keys=bool(settings.api_keys)),
    }
    endpoints: dict[str, dict[str, Endpoint]] = {
        path: {"GET": Endpoint(look, settings)} for path, look in looks.items()
    }
    for path, (route, handler) in requests.items():
        to_body = errors.to_tgi_body if route is Route.TGI else errors.to_body
        endpoint = Endpoint(tracked(route, service.metrics, handler), settings, to_body)
        endpoints.setdefault(path, {})["POST"] = endpoint
    for path, by_method in endpoints.items():
        app.router.routes.append(_ExactRoute(path, ByMethod(by_method), methods=list(by_method)))
    app.add_exception_handler(HTTPException, _refuse)
    # What is added last stands outermost.
    if settings.api_keys:
        routes = {path: route for path, (route, _) in requests.items()}
        app.add_middleware(Keys, keys=settings.api_keys, routes=routes, metrics=service.metrics)
    if settings.cors_origins:
        app.add_middleware(Cors, origins=settings.cors_origins)
    app.add_middleware(RequestIds, is_draining=lambda: service.is_draining)
    app.add_middleware(UnreadBodies)
    return app


class _ExactRoute(PathRoute):
    """A route whose path ends where it ends: Starlette's patterns end in `$`, which lets a newline pass behind it."""

    def __init__(self, path: str, endpoint: ByMethod, *, methods: list[str]) -> None:
        super().__init__(path, endpoint, methods=methods)
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z")


def _reference(*, has_keys: bool) -> dict[str, Handler]:
    document = openapi_document(_version(), has_keys=has_keys)
    as_json, as_page = dump(document), reference_page.render(document)

    async def openapi(call: Call) -> None:
        await call.reply(as_json)

    async def docs(call: Call) -> None:
        await call.reply(as_page, content_type=b"text/html; charset=utf-8")

    return {"/openapi.json": openapi, "/docs": docs}


async def _no_playground(call: Call) -> None:
    raise NotFound("there is no route 'GET /': the server runs with --no-ui; GET /docs lists the others")


async def _refuse(request: Request, error: Exception) -> Response:
    """What the router refuses: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    where = shown(f"{request.method} {request.url.path}")
    refusal: ServeError = EngineFailure("internal error")
    if error.status_code == 404:
        refusal = NotFound(f"there is no route {where}; GET /docs lists them")
    elif error.status_code == 405:
        allowed = "" if error.headers is None else error.headers.get("Allow", "")
        refusal = MethodNotAllowed(f"there is no {where}; the path takes {allowed}")
    return Response(
        dump_ascii(errors.to_body(refusal)),
        status_code=errors.to_status(refusal),
        headers=error.headers,
        media_type="application/json",
    )


def _version() -> str:
    try:
        return version("flan-serve")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0.0.0"
