"""The playground's files as they are served; how it works in a browser is tests/server/test_playground.py."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import serve.rest
from serve.config import Settings
from serve.request import Mode
from serve.rest.request_fields import GENERATE_FIELDS
from tests.rest.harness import error_of, served

STATIC = Path(serve.rest.__file__).parent / "static"
POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
}


class _Inputs(HTMLParser):
    """Every input of the page: its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"input", "textarea", "select"}:
            self.found.append(dict(attrs))


async def test_the_page_and_its_files() -> None:
    async with served("yes") as server:
        page = await server.http.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert (await server.http.head("/")).status_code == 200
        references = set(re.findall(r'(?:href|src)="(static/[^"]+)"', page.text))
        assert references == {"static/playground.css", "static/playground.js"}
        for path in sorted(STATIC.iterdir()):
            response = page if path.suffix == ".html" else await server.http.get(f"/static/{path.name}")
            assert response.status_code == 200, path.name
            assert set(response.headers["content-security-policy"].split("; ")) == POLICY
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["cache-control"] == "no-cache"
            for imported in re.findall(r'from "\./([^"]+)"', response.text):
                assert (STATIC / imported).is_file()
        assert (await server.http.get("/static/playground.js")).headers["content-type"].startswith("text/javascript")
        assert (await server.http.get("/static/playground.html")).status_code == 404
        assert server.requests() == {}


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    files = sorted(STATIC.iterdir())
    assert {path.suffix for path in files} == {".html", ".css", ".js"}
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(https?:)?//[a-z]+\.[a-z]", text), path.name
        assert not re.search(r"innerHTML|insertAdjacentHTML|\beval\b|localStorage|sessionStorage|cookie", text)
    page = (STATIC / "playground.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?! type=\"module\" src=)", page)
    assert sum(path.stat().st_size for path in files) < 80_000


async def test_without_ui_there_is_no_page() -> None:
    async with served("yes", settings=Settings(port=0, ui=False)) as server:
        for path in ("/", "/static/playground.js", "/static/playground.css"):
            response = await server.http.get(path)
            assert response.status_code == 404
            assert error_of(response)["code"] == "not_found"
        assert (await server.post("/", {"inputs": "hello"})).json() == [{"generated_text": "yes"}]


async def test_with_keys_the_page_is_open_and_nothing_else_with_it() -> None:
    """A browser cannot send a key for a page; the page asks for it and sends it with its requests."""
    async with served("yes", settings=Settings(port=0, api_keys=("k",))) as server:
        for path in ("/", *(f"/static/{file.name}" for file in STATIC.iterdir() if file.suffix != ".html")):
            for method in ("GET", "HEAD"):
                assert (await server.http.request(method, path)).status_code == 200, (method, path)
        for path in ("/static/nothing.js", "/static/%2e%2e/v1/models"):
            assert (await server.http.get(path)).status_code == 404, path
        for method, path in [
            ("POST", "/"),
            ("PUT", "/"),
            ("POST", "/static/playground.js"),
            ("GET", "/static"),
            ("GET", "/v1/models"),
            ("GET", "/docs"),
            ("GET", "/static/../v1/models"),  # as "/v1/models": the client folds it
        ]:
            response = await server.http.request(method, path)
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
        assert server.requests() == {("rest", "tgi", "none", "unauthorized"): 1}


@pytest.mark.parametrize("port", [50051, 7000, -1, 0])
async def test_the_page_knows_the_grpc_port(port: int) -> None:
    async with served("yes", settings=Settings(port=0, grpc_port=port)) as server:
        assert f'data-grpc-port="{port}"' in (await server.http.get("/")).text


def test_the_controls_are_the_contracts_fields() -> None:
    parser = _Inputs()
    parser.feed((STATIC / "playground.html").read_text(encoding="utf-8"))
    named = {name: found for found in parser.found if (name := found.get("name")) is not None}
    assert set(named) <= set(GENERATE_FIELDS)
    left_out = {"mode", "exemplars", "stream", "model", "request_id", "logprobs", "logit_bias"}
    assert set(GENERATE_FIELDS) - set(named) == left_out | {"ignore_eos", "skip_special_tokens"}
    modes = [found["value"] for found in parser.found if found.get("type") == "radio"]
    assert {mode.value for mode in Mode} <= set(modes)
    checked = 0
    for name, found in named.items():
        schema: dict[str, Any] = GENERATE_FIELDS[name].kind.to_schema()
        if found.get("type") != "number":
            continue
        low = schema.get("minimum", schema.get("exclusiveMinimum"))
        for bound, value in (("min", low), ("max", schema.get("maximum"))):
            shown = found.get(bound)
            assert (None if shown is None else float(shown)) == value, (name, bound)
            checked += value is not None
    assert checked >= 10
