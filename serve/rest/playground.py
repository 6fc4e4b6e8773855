"""The playground at `/`: files of the package, read once and served as they are under a strict content policy."""

from __future__ import annotations

from importlib.resources import files

from serve.config import Settings
from serve.rest.call import Call
from serve.rest.endpoint import Handler

STATIC_PATH = "/static/"
_TYPES = {
    "html": b"text/html; charset=utf-8",
    "css": b"text/css; charset=utf-8",
    "js": b"text/javascript; charset=utf-8",
}
_PAGE = "playground.html"
_GRPC_PORT_MARK = b"{{grpc_port}}"
# Nothing but this server's own files and routes; nobody may frame the page, no form is ever sent.
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]


def pages(settings: Settings) -> dict[str, Handler]:
    """The page and its files, by path.

    Args:
        settings: grpc_port of it, for the page's gRPC command; 0 (any free) and -1 (off) say that it is not known.
    """
    handlers = {}
    for file in sorted(files("serve.rest").joinpath("static").iterdir(), key=lambda file: file.name):
        suffix = file.name.rpartition(".")[2]
        if suffix in _TYPES:
            content = file.read_bytes().replace(_GRPC_PORT_MARK, b"%d" % settings.grpc_port)
            path = "/" if file.name == _PAGE else STATIC_PATH + file.name
            handlers[path] = _handler(content, _TYPES[suffix])
    return handlers


def _handler(content: bytes, content_type: bytes) -> Handler:
    async def handle(call: Call) -> None:
        await call.reply(content, content_type=content_type, headers=_HEADERS)

    return handle
