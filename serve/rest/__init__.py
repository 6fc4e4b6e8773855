"""The REST edge: HTTP in, HTTP out. Handlers decode, call the service, encode; nothing else.

    socket -> protocol -> middleware (ids, CORS, keys) -> Endpoint -> handler -> codec -> Service

Inside, errors are words; `errors` alone turns them into status codes.
"""

from serve.rest.app import create_app
from serve.rest.server import RestServer

__all__ = ["RestServer", "create_app"]
