"""HTTP requests from an OpenAPI document: each of its routes, asked rightly and in many ways wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tests.fuzz.chances import one_in, rarely
from tests.fuzz.json_bodies import Json, bodies, resolve, values

KEY = "fuzz-key"
TIMEOUT = "x-request-timeout-ms"
REQUEST_ID = "x-request-id"
# Served, but not in the document: they are for people, or one of many.
UNLISTED = ("/docs", "/openapi.json", "/static/playground.js", "/v1/models/default", "/v1/models/none")

Headers = tuple[tuple[str, bytes], ...]

METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW", "post", "PROPFIND")
RIGHT_KEYS = tuple(f"{scheme}{KEY}".encode() for scheme in ("Bearer ", "bearer ", "BEARER   "))
WRONG_KEYS = (
    *(b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"Basic Zm9v", b"fuzz-key", b"Bearer fuzz-key2", b"Bearer fuzz-ke"),
    *(
        b"Bearer f\xc3\xbczz",
        b"Bearer \xff\xfe",
        b"Bearer,fuzz-key",
        b"Token fuzz-key",
        b"Bearer FUZZ-KEY",
        b"x" * 4000,
    ),
)
CONTENT_TYPES = (
    *(b"application/json", b"application/json; charset=utf-8", b"text/plain", b"application/x-www-form-urlencoded"),
    *(b"", b"application/json; charset=latin-1", b"multipart/form-data; boundary=x", b"application/grpc", b"\xff\xfe"),
)
REQUEST_IDS = (b"mine", b"a.b:c-d_1", b"x" * 128, b"x" * 129, b"", b"a b", b"a/b", b"\xe9", b"'; drop", b"{}", b"\t")
TIMEOUTS = (
    *(b"0", b"1", b"5", b"20", b"60000", b"999999999999", b"0060000", b"9" * 13, b"9" * 4000, b"-1", b"1.5", b"1e3"),
    *(b"", b"soon", b"\xb2", b"\xd9\xa3", b"+5", b"0x10", b"1 000", b"NaN", b"60000, 60000"),
)
OTHER_HEADERS: Sequence[tuple[str, bytes]] = (
    *(("accept", b"text/html"), ("accept", b"text/event-stream"), ("accept-encoding", b"gzip, br, \xff")),
    *(("expect", b"100-continue"), ("upgrade", b"h2c"), ("upgrade", b"websocket"), ("connection", b"close")),
    *(("connection", b"Upgrade, HTTP2-Settings"), ("connection", b"keep-alive"), ("connection", b"x-request-id")),
    *(("origin", b"http://evil.example"), ("cookie", b"a=b"), ("range", b"bytes=0-1"), ("if-none-match", b"*")),
    *(("content-encoding", b"identity"), ("x-forwarded-for", b"1.2.3.4"), ("x-forwarded-proto", b"https")),
    *(("x-http-method-override", b"DELETE"), ("te", b"trailers"), ("forwarded", b"for=\xff"), ("x" * 200, b"y" * 2000)),
    *(("access-control-request-method", b"POST"), ("traceparent", b"00-0-0-0"), ("user-agent", b"")),
)
TAILS = ("/", "/x", "%00", "%0a", "%0d", "%20", "%", "%zz", "%ff", ";x", "/..", "/../..", "x" * 3000)
HEADER_NAMES = st.text("abcdefghijklmnopqrstuvwxyz-_.!#$%&'*+^`|~0123456789", min_size=1, max_size=12)
# Any byte that a header's value may have.
HEADER_VALUES = st.lists(st.integers(0x20, 0xFF).filter(lambda byte: byte != 0x7F), max_size=20).map(bytes)


@dataclass(frozen=True)
class Case:
    """One request.

    `has_key`: it may pass. `pieces`: the body's parts where it is sent in chunks. `leaves`: the client hangs up
    without reading the answer.
    """

    method: str
    target: str
    headers: Headers
    body: bytes
    has_key: bool = True
    pieces: int = 0
    leaves: bool = False

    @property
    def path(self) -> str:
        """What the target means to the server."""
        return unquote(self.target.partition("?")[0])

    def values_of(self, name: str) -> list[bytes]:
        """The values of a header, as the server sees them."""
        return [value.strip(b" \t") for given, value in self.headers if given == name]

    def to_bytes(self) -> bytes:
        head = [f"{self.method} {self.target} HTTP/1.1".encode(), b"host: test"]
        head += [name.encode() + b": " + value for name, value in self.headers]
        if self.pieces:
            head.append(b"transfer-encoding: chunked")
            size = max(1, -(-len(self.body) // self.pieces))
            parts = [self.body[start : start + size] for start in range(0, len(self.body), size)]
            content = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        else:
            content = self.body
            if content or self.method not in ("GET", "HEAD"):
                head.append(b"content-length: %d" % len(content))
        return b"\r\n".join([*head, b"", content])


def request_schema(document: Json, path: str) -> Json | None:
    """The schema of the body that a path takes, None where it takes none."""
    operation = document["paths"].get(path, {}).get("post")
    if operation is None:
        return None
    return resolve(operation["requestBody"]["content"]["application/json"]["schema"], document)


def cases(document: Json) -> SearchStrategy[Case]:
    """Requests to every route of the document, three of four to those that take a body."""
    posted: dict[str, SearchStrategy[bytes]] = {}
    for path in document["paths"]:
        schema = request_schema(document, path)
        if schema is not None:
            posted[path] = bodies(values(schema, document), sorted(schema["properties"]))
    looked = [path for path, operations in document["paths"].items() if "get" in operations]
    paths = st.sampled_from([*looked, "/", *UNLISTED])

    @st.composite
    def drawn(draw: DrawFn) -> Case:
        takes_body = draw(st.sampled_from([True, True, True, False]))
        path = draw(st.sampled_from(sorted(posted)) if takes_body else paths)
        body = draw(posted[path]) if takes_body else draw(rarely(st.just(b""), st.binary(max_size=30)))
        usual = "POST" if takes_body else "GET"
        method = draw(rarely(st.just(usual), st.sampled_from(METHODS), 20))
        has_key = not draw(one_in(15))
        return Case(
            method=method,
            target=draw(_targets(path)) if draw(one_in(12)) else path,
            headers=draw(_headers(has_key)),
            body=body,
            has_key=has_key,
            pieces=draw(rarely(st.just(0), st.integers(1, 4), 10)),
            leaves=takes_body and draw(one_in(40)),
        )

    return drawn()


@st.composite
def _targets(draw: DrawFn, path: str) -> str:
    """Ways to write a path, and paths that are near it or anywhere."""
    kind = draw(st.sampled_from(["query", "query", "coded", "tail", "head", "case", "any"]))
    if kind == "query":
        return path + "?" + draw(st.sampled_from(["", "a=b", "stream=true", "x=%ff%00", "?", "=&=&", "a" * 3000]))
    if kind == "coded":
        at = draw(st.integers(0, len(path) - 1))
        return f"{path[:at]}%{ord(path[at]):02x}{path[at + 1 :]}" if at > 0 else path
    if kind == "tail":
        return path + draw(
            st.sampled_from(["/", "/x", "%00", "%0a", "%", "%zz", "%ff", ";x", "/..", "/../..", "x" * 3000])
        )
    if kind == "head":
        return draw(st.sampled_from(["/.", "/..", "/v1", "/%2f", "/%252e", "/static/../..", "/static/%2e%2e"])) + path
    if kind == "case":
        return path.upper()
    return "/" + quote(draw(st.text(max_size=20)).encode("utf-8", "surrogatepass"), safe="/.~;,:@&=+$")


@st.composite
def _headers(draw: DrawFn, has_key: bool) -> Headers:
    found: list[tuple[str, bytes]] = []
    if has_key:
        found.append(("authorization", draw(st.sampled_from(RIGHT_KEYS))))
    elif draw(st.booleans()):
        found.append(("authorization", draw(st.sampled_from(WRONG_KEYS))))
    choices: tuple[tuple[str, Sequence[Any], int], ...] = (
        ("content-type", CONTENT_TYPES, 4),
        (REQUEST_ID, REQUEST_IDS, 4),
        (TIMEOUT, TIMEOUTS, 8),
    )
    for name, given, chance in choices:
        if draw(one_in(chance)):
            found.append((name, draw(st.sampled_from(given))))
    if draw(one_in(6)):
        found.append(draw(st.sampled_from(OTHER_HEADERS)))
    if draw(one_in(10)):
        found.append(("x-" + draw(HEADER_NAMES), draw(HEADER_VALUES)))
    return tuple(found)
