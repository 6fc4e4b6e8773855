"""The OpenAPI document and the page made of it say what the server does."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from serve.config import Settings
from serve.rest import tgi
from serve.rest.fields import Table
from serve.rest.openai import CHAT_FIELDS, COMPLETION_FIELDS
from serve.rest.request_fields import GENERATE_FIELDS, SCORE_FIELDS, TOKENIZE_FIELDS
from serve.sampling_params import MAX_LOGPROBS, MAX_SEQUENCES, MAX_STOP_STRINGS
from tests.rest.harness import error_of, served

TABLES: dict[str, tuple[Table, dict[str, Any]]] = {
    "/v1/generate": (GENERATE_FIELDS, {"instruction": "hello"}),
    "/v1/completions": (COMPLETION_FIELDS, {"prompt": "hello"}),
    "/v1/chat/completions": (
        CHAT_FIELDS,
        {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "stream": False},
    ),
}


async def test_the_document_covers_the_routes_and_the_fields() -> None:
    async with served("yes") as server:
        document = (await server.http.get("/openapi.json")).json()
        assert document["openapi"].startswith("3.1")
        assert set(document["paths"]) == {
            *("/v1/generate", "/v1/score", "/v1/tokenize", "/v1/completions", "/v1/chat/completions"),
            *("/generate", "/generate_stream", "/", "/info"),
            *("/v1/models", "/livez", "/readyz", "/health", "/metrics"),
        }
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                assert (await server.http.request(method, path)).status_code in (200, 400)
                for body in ("requestBody" in operation and [operation["requestBody"]]) or []:
                    example = body["content"]["application/json"]["example"]
                    assert (await server.post(path, example)).status_code == 200
        schemas = document["components"]["schemas"]
        for name, table in [
            ("GenerateRequest", GENERATE_FIELDS),
            ("ScoreRequest", SCORE_FIELDS),
            ("TokenizeRequest", TOKENIZE_FIELDS),
            ("CompletionRequest", COMPLETION_FIELDS),
            ("ChatRequest", CHAT_FIELDS),
            ("TgiRequest", tgi.GENERATE_FIELDS),
            ("TgiAsAskedRequest", tgi.AS_ASKED_FIELDS),
        ]:
            assert list(schemas[name]["properties"]) == list(table)
            assert all(field["description"] for field in schemas[name]["properties"].values())
        assert schemas["GenerateRequest"]["properties"]["n"]["maximum"] == MAX_SEQUENCES
        assert schemas["GenerateRequest"]["properties"]["logprobs"]["maximum"] == MAX_LOGPROBS
        assert schemas["GenerateRequest"]["properties"]["stop"]["anyOf"][1]["maxItems"] == MAX_STOP_STRINGS
        assert schemas["GenerateRequest"]["additionalProperties"] is False
        assert "additionalProperties" not in schemas["CompletionRequest"]
        references = set(re.findall(r'"#/components/schemas/(\w+)"', (await server.http.get("/openapi.json")).text))
        assert len(references) > 12
        assert references <= set(schemas)


async def test_the_document_knows_every_word_of_a_refusal() -> None:
    async with served("yes", settings=Settings(port=0, api_keys=("first",), max_body_mib=0.01)) as server:
        key = {"authorization": "Bearer first"}
        schemas = (await server.http.get("/openapi.json", headers=key)).json()["components"]["schemas"]
        codes = schemas["Error"]["properties"]["error"]["properties"]["code"]["enum"]
        types = schemas["TgiError"]["properties"]["error_type"]["enum"]
        for status, headers, content in [
            (401, {}, b"{}"),
            (400, key, b"{}"),
            (413, key, b"x" * 20_000),
            (504, {**key, "x-request-timeout-ms": "0"}, b'{"instruction": "x", "inputs": "x"}'),
        ]:
            ours = await server.http.post("/v1/generate", headers=headers, content=content)
            tgi_s = await server.http.post("/generate", headers=headers, content=content)
            assert (tgi_s.status_code, tgi_s.json()["error_type"] in types) == (status, True)
            if b"inputs" not in content:  # one field too many for ours
                assert (ours.status_code, ours.json()["error"]["code"] in codes) == (status, True)


@pytest.mark.parametrize("path", TABLES)
async def test_the_ranges_shown_are_the_ranges_held(path: str) -> None:
    """Just outside of each bound the server refuses and names the field, on the bound it does not."""
    table, base = TABLES[path]
    checked = 0
    async with served("yes") as server:
        for name, field in table.items():
            schema = field.kind.to_schema()
            if schema.get("type") not in ("integer", "number"):
                continue
            if name in ("presence_penalty", "frequency_penalty", "best_of", "samples", "num_exemplars"):
                continue  # of no range that a single value would show
            step: Any = 1 if schema["type"] == "integer" else 0.001
            outside: list[Any] = []
            inside: list[Any] = []
            if "minimum" in schema:
                outside.append(schema["minimum"] - step)
                inside.append(schema["minimum"])
            if "exclusiveMinimum" in schema:
                outside.append(schema["exclusiveMinimum"])
                inside.append(schema["exclusiveMinimum"] + step)
            if "maximum" in schema:
                outside.append(schema["maximum"] + step)
                inside.append(schema["maximum"])
            for value in outside:
                response = await server.post(path, {**base, name: value})
                assert (response.status_code, error_of(response)["param"]) == (400, name), (name, value)
            for value in inside:
                response = await server.post(path, {**base, name: value})
                assert response.status_code == 200, (name, value, response.text)
            checked += len(outside)
    assert checked >= 10


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_the_page_needs_nothing_from_elsewhere() -> None:
    async with served("yes") as server:
        response = await server.http.get("/docs")
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        page = _Page()
        page.feed(response.text)
        assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe")]
        links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
        assert links == ["openapi.json"]
        for word in (
            "POST /v1/generate",
            "POST /generate_stream",
            "parameters.max_new_tokens",
            "repetition_penalty",
            "integer 1…64",
            "number > 0, ≤ 1",
            "x-request-id",
        ):
            assert word in page.text
