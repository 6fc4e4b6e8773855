"""A client's mistake is a 400 that names it, and the server goes on as if nothing had been."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from serve.config import Settings
from tests.rest.harness import Served, error_of, served

ROUTES = ("/v1/generate", "/v1/score", "/v1/tokenize", "/v1/completions", "/v1/chat/completions")


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return (opening * depth + "1" + closing * depth).encode()


# Bodies that are wrong on every route.
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \r\n",
    "no JSON": b"instruction=hello",
    "half a body": b'{"instruction": "hel',
    "a comma too many": b'{"instruction": "hello",}',
    "single quotes": b"{'instruction': 'hello'}",
    "two objects": b'{"instruction": "hello"}{"instruction": "hello"}',
    "a comment": b'{"instruction": "hello" /* x */}',
    "null": b"null",
    "a list": b'[{"instruction": "hello"}]',
    "a string": b'"hello"',
    "a number": b"5",
    "Latin-1": '{"instruction": "café"}'.encode("latin-1"),
    "UTF-16": '{"instruction": "hello"}'.encode("utf-16"),
    "a cut character": '{"instruction": "café"}'.encode()[:-3],
    "surrogates as bytes": b'{"instruction": "\xed\xa0\x80"}',
    "a raw control character": b'{"instruction": "a\x01b"}',
    "a raw NUL": b'{"instruction": "a\x00b"}',
    "a bad escape": b'{"instruction": "\\x41"}',
    "NaN": b'{"instruction": "hello", "temperature": NaN}',
    "Infinity": b'{"instruction": "hello", "temperature": Infinity}',
    "-Infinity": b'{"instruction": "hello", "temperature": -Infinity}',
    "a name twice": b'{"instruction": "hello", "n": 1, "n": 2}',
    "100 lists": nested(100),
    "100 lists in a field": b'{"instruction": ' + nested(100) + b"}",
    "100 objects in a field": b'{"x": ' + nested(100, '{"a":', "}") + b"}",
    "100,000 lists": nested(100_000),
    "100,000 open lists": b"[" * 100_000,
    "100,000 objects": nested(100_000, '{"a":', "}"),
    "a number of 10,000 digits": b'{"instruction": "hello", "seed": ' + b"9" * 10_000 + b"}",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    "a form": b"--x\r\nContent-Disposition: form-data; name=instruction\r\n\r\nhello\r\n--x--",
}

# Fields of /v1/generate, and the one that the error names.
FIELDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "stream as a string": ({"stream": "false"}, "stream"),
    "stream as a number": ({"stream": 0}, "stream"),
    "debug as a string": ({"debug": "yes"}, "debug"),
    "n as true": ({"n": True}, "n"),
    "n as a float": ({"n": 1.0}, "n"),
    "n as a string": ({"n": "1"}, "n"),
    "n as a list": ({"n": [1]}, "n"),
    "max_tokens as a float": ({"max_tokens": 5.5}, "max_tokens"),
    "max_tokens beyond 64 bits": ({"max_tokens": 2**63}, "max_tokens"),
    "seed beyond 64 bits": ({"seed": 2**63}, "seed"),
    "seed below 64 bits": ({"seed": -(2**63) - 1}, "seed"),
    "seed as a float": ({"seed": 1e3}, "seed"),
    "temperature as a string": ({"temperature": "0.5"}, "temperature"),
    "temperature as true": ({"temperature": True}, "temperature"),
    "temperature of 400 digits": ({"temperature": 10**400}, "temperature"),
    "top_p as a list": ({"top_p": []}, "top_p"),
    "stop as a number": ({"stop": 5}, "stop"),
    "stop with a number": ({"stop": ["a", 5]}, "stop"),
    "stop with null": ({"stop": [None]}, "stop"),
    "an empty stop": ({"stop": ""}, "stop"),
    "instruction as a number": ({"instruction": 5}, "instruction"),
    "instruction as a list": ({"instruction": ["hello"]}, "instruction"),
    "instruction null": ({"instruction": None}, "instruction"),
    "instruction empty": ({"instruction": ""}, "instruction"),
    "instruction blank": ({"instruction": " \t\n"}, "instruction"),
    "input as an object": ({"input": {"text": "x"}}, "input"),
    "mode as a number": ({"mode": 1}, "mode"),
    "no such mode": ({"mode": "few-shot"}, "mode"),
    "options as a string": ({"options": "yes"}, "options"),
    "options with numbers": ({"options": ["yes", 1]}, "options"),
    "exemplars as an object": ({"mode": "cot", "exemplars": {"input": "x", "output": "y"}}, "exemplars"),
    "exemplars of strings": ({"mode": "cot", "exemplars": ["x"]}, "exemplars"),
    "an exemplar without output": ({"mode": "cot", "exemplars": [{"input": "x"}]}, "exemplars"),
    "an exemplar with a number": ({"mode": "cot", "exemplars": [{"input": "x", "output": 4}]}, "exemplars"),
    "an exemplar with more": (
        {"mode": "cot", "exemplars": [{"input": "x", "output": "y", "answer": "z"}]},
        "exemplars",
    ),
    "logit_bias as a list": ({"logit_bias": [5, 1.0]}, "logit_bias"),
    "logit_bias with a word": ({"logit_bias": {"cat": 1}}, "logit_bias"),
    "logit_bias with a sign": ({"logit_bias": {"-5": 1}}, "logit_bias"),
    "logit_bias with Arabic digits": ({"logit_bias": {"٥": 1}}, "logit_bias"),
    "logit_bias with a long number": ({"logit_bias": {"9" * 30: 1}}, "logit_bias"),
    "logit_bias of a string": ({"logit_bias": {"5": "1"}}, "logit_bias"),
    "logit_bias of null": ({"logit_bias": {"5": None}}, "logit_bias"),
    "request_id with a space": ({"request_id": "a b"}, "request_id"),
    "request_id with a line": ({"request_id": "a\r\nx-evil: 1"}, "request_id"),
    "request_id empty": ({"request_id": ""}, "request_id"),
    "request_id as a number": ({"request_id": 7}, "request_id"),
    "model as a number": ({"model": 7}, "model"),
    "answer_format": ({"mode": "cot", "answer_format": "json"}, "answer_format"),
    "prompts": ({"prompts": ["x"]}, "prompts"),
    "timeout_seconds": ({"timeout_seconds": 1}, "timeout_seconds"),
    "a misspelt field": ({"tempreature": 1}, "tempreature"),
    "a nameless field": ({"": 1}, ""),
    "a field of 10,000 letters": ({"x" * 10_000: 1}, "x" * 64),
    "a field with odd letters": ({"\u0000\ud800": 1}, None),
    "a lone surrogate": ({"instruction": "a\ud800b"}, "instruction"),
    "a lone surrogate in input": ({"input": "\udfff"}, "input"),
    "a lone surrogate in stop": ({"stop": "\ud800"}, "stop"),
    "a lone surrogate in an option": ({"options": ["\ud800"]}, "options"),
    "NUL": ({"instruction": "a\u0000b"}, "instruction"),
    "too long": ({"instruction": "cat " * 3000}, "instruction"),
}


async def alive(server: Served) -> None:
    """The server answers a normal request, and the same connection is of use."""
    body = await server.generate()
    assert body["outputs"][0]["text"] == "yes"


@pytest.mark.parametrize("route", ROUTES)
async def test_bodies_that_are_no_request(route: str) -> None:
    async with served("yes") as server:
        for name, body in BODIES.items():
            begun = time.monotonic()
            response = await server.http.post(route, content=body, headers={"content-type": "application/json"})
            assert response.status_code == 400, (name, response.text[:500])
            assert error_of(response)["code"] == "invalid"
            assert len(error_of(response)["message"]) < 500
            assert time.monotonic() - begun < 0.5, name
            await alive(server)
        assert await server.outcomes() == {"invalid": len(BODIES), "stop": len(BODIES)}


@pytest.mark.parametrize("stream", [False, True])
async def test_fields_with_wrong_values(stream: bool) -> None:
    async with served("yes") as server:
        for name, (fields, param) in FIELDS.items():
            base = {"instruction": "hello", "stream": stream}
            response = await server.http.post("/v1/generate", content=json.dumps({**base, **fields}))
            assert response.status_code == 400, (name, response.text[:500])
            error = error_of(response)
            assert (error["param"], error["code"]) == (param, "invalid"), (name, error)
            assert len(error["message"]) < 500
            await alive(server)


async def test_messages_say_what_to_change() -> None:
    async with served("yes") as server:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"tempreature": 1}, "unknown field 'tempreature'; did you mean 'temperature'?"),
            ({"max_new_tokens": 1}, "unknown field 'max_new_tokens'; did you mean 'max_tokens'?"),
            ({"mode": "few-shot"}, "mode must be one of raw, instruction, few_shot, cot, not 'few-shot'"),
            ({"stream": "false"}, "stream must be true or false, not a string"),
            ({"n": 1.0}, "n must be an integer, not 1.0"),
            ({"n": True}, "n must be an integer, not a boolean"),
            ({"stop": ["a", 5]}, "stop[1] must be a string, not a number"),
            ({"mode": "cot", "exemplars": [{"input": "x"}]}, "exemplars[0]: output is required"),
            ({"exemplars": [{"input": "x", "output": "y", "rational": "z"}]}, "did you mean 'rationale'?"),
        ]
        for fields, message in cases:
            response = await server.post("/v1/generate", {"instruction": "hello", **fields})
            assert message in error_of(response)["message"]
        for content, message in [
            (b'{"instruction": "hello",\n "n" 5}', "not valid JSON: Expecting ':' delimiter at line 2 column 6"),
            (b'{"n": NaN}', "NaN"),
            (b'{"n": 1, "n": 1}', "'n' twice"),
            (b"[]", "must be a JSON object, not a list"),
            (b"\xff", "byte 0 is 0xff"),
            (nested(100_000), "nested too deeply"),
        ]:
            response = await server.http.post("/v1/generate", content=content)
            assert message in error_of(response)["message"]


async def test_what_is_right_is_taken() -> None:
    async with served("yes") as server:
        for content in [
            b'\xef\xbb\xbf{"instruction": "hello"}',
            b' {"instruction" : "hello"}\r\n',
            '{"instruction": "héllo \\u00e9 \\ud83d\\ude00 😀"}'.encode(),
            b'{"instruction": "hello", "temperature": 1, "top_p": 1, "seed": -9223372036854775808}',
            b'{"instruction": "hello", "temperature": 1e-9}',
        ]:
            for content_type in ("application/json", "application/json; charset=utf-8", "text/plain", None):
                headers = {} if content_type is None else {"content-type": content_type}
                response = await server.http.post("/v1/generate", content=content, headers=headers)
                assert response.status_code == 200, response.text


@pytest.mark.parametrize("route", ROUTES)
async def test_a_body_above_the_limit(route: str) -> None:
    async with served("yes", settings=Settings(port=0, max_body_mib=0.25)) as server:
        body = b'{"instruction": "' + b"x" * 300_000 + b'"}'

        async def pieces() -> Any:
            for start in range(0, len(body), 10_000):
                yield body[start : start + 10_000]

        for content in (body, pieces()):  # with a content-length, and chunked
            response = await server.http.post(route, content=content)
            assert response.status_code == 413
            assert error_of(response)["code"] == "too_large"
            await alive(server)
        assert await server.outcomes() == {"invalid": 2, "stop": 2}


async def test_a_prompt_of_several_mb() -> None:
    async with served("yes") as server:
        for size, status in [(10_000_000, 413), (2_000_000, 400)]:
            body = json.dumps({"instruction": "cat " * (size // 4)}).encode()
            begun = time.monotonic()
            response = await server.http.post("/v1/generate", content=body)
            assert response.status_code == status
            assert error_of(response)["param"] == ("instruction" if status == 400 else None)
            assert time.monotonic() - begun < 5
            await alive(server)


async def test_unknown_fields_are_ignored_where_openai_s_schema_holds_but_not_their_values_in_ours() -> None:
    async with served("yes") as server:
        odd = json.dumps({"prompt": "hello", "x": {"y": [None]}, "\ud800": "\u0000", "user": "\udfff"})
        response = await server.http.post("/v1/completions", content=odd)
        assert response.status_code == 200
        for field in ("prompt", "stop"):
            body = json.dumps({"prompt": "hello", field: "a\ud800"})
            response = await server.http.post("/v1/completions", content=body)
            assert (response.status_code, error_of(response)["param"]) == (400, field)
        body = json.dumps({"messages": [{"role": "user", "content": "\u0000"}]})
        response = await server.http.post("/v1/chat/completions", content=body)
        assert (response.status_code, error_of(response)["param"]) == (400, "messages")
        response = await server.http.post("/v1/completions", content=json.dumps({"prompt": "x", "model": "\ud800"}))
        assert (response.status_code, error_of(response)["param"]) == (404, "model")
