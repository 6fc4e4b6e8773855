"""Names, keys and origins: what holds on every route."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from pathlib import Path

import httpx
import pytest

from serve.config import Settings
from serve.rest import RestServer
from tests.rest.harness import error_of, http_post, served
from tests.rpc.certificates import make_certificates
from tests.service.scripted_runtime import scripted_service

KEYED = Settings(port=0, api_keys=("first", "sécond key"))
PAGE = "https://page.example"
BODY = {"instruction": "hello"}
OPEN = ("/livez", "/readyz", "/health", "/metrics", "/", "/static/playground.js")
CLOSED = (
    "/v1/models",
    "/v1/models/scripted",
    "/docs",
    "/openapi.json",
    "/static",
    "/nope",
    "/livez/",
    "/%2flivez",
    "/LIVEZ",
)


async def test_every_response_has_a_name() -> None:
    async with served("yes", settings=KEYED) as server:
        for path in (*OPEN, *CLOSED, "/v1/generate"):
            for method in ("GET", "POST", "OPTIONS", "HEAD"):
                response = await server.http.request(method, path)
                assert re.fullmatch(r"req-[0-9a-f]{24}", response.headers["x-request-id"]), (method, path)
                response = await server.http.request(method, path, headers={"x-request-id": "mine"})
                assert response.headers.get_list("x-request-id") == ["mine"]


async def test_what_needs_a_key_and_what_does_not() -> None:
    async with served("yes", settings=KEYED) as server:
        for path in OPEN:
            assert (await server.http.get(path)).status_code == 200
        for path in CLOSED:
            response = await server.http.get(path)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            assert error_of(response)["code"] == "unauthorized"
        for path in ("/v1/generate", "/v1/score", "/v1/tokenize", "/v1/completions", "/v1/chat/completions"):
            assert (await server.post(path, BODY)).status_code == 401
        assert await server.outcomes() == {"unauthorized": 5}
    async with served("yes", settings=KEYED, key="first") as server:
        assert (await server.post("/v1/generate", BODY)).status_code == 200
        assert (await server.http.get("/nope")).status_code == 404


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (b"Bearer first", 200),
        (b"bearer first", 200),
        (b"BEARER    first", 200),
        ("Bearer sécond key".encode(), 200),
        ("Bearer sécond key".encode("latin-1"), 401),
        (b"Bearer firs", 401),
        (b"Bearer first1", 401),
        (b"Bearer First", 401),
        (b"Bearer", 401),
        (b"first", 401),
        (b"Basic first", 401),
        (b"Bearerfirst", 401),
        ("Bearer f\u00efrst".encode(), 401),
        (b"Bearer \xff\xfe", 401),
        (b"", 401),
    ],
)
async def test_keys(value: bytes, status: int) -> None:
    async with served("yes", settings=KEYED) as server:
        response = await server.http.post("/v1/generate", json=BODY, headers={b"authorization": value})
        assert response.status_code == status


async def test_keys_reach_no_log_and_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with served("yes", settings=KEYED, key="first-but-wrong") as server:
        response = await server.post("/v1/generate", BODY)
        assert "first" not in response.text
        raw = await server.raw(http_post("/v1/generate", b"{}", "Authorization: Bearer first", "Connection: close"))
        assert b"first" not in raw
    assert "first-but-wrong" not in caplog.text.replace("'authorization', b'Bearer first-but-wrong'", "")


async def test_origins() -> None:
    settings = Settings(port=0, api_keys=("k",), cors_origins=(PAGE,))
    ask = {"origin": PAGE, "access-control-request-method": "POST"}
    ask["access-control-request-headers"] = "authorization,content-type"
    async with served("yes", settings=settings) as server:
        for path in ("/v1/generate", "/v1/models", "/nope"):
            response = await server.http.options(path, headers=ask)
            assert response.status_code == 204
            assert response.headers["access-control-allow-origin"] == PAGE
            assert "POST" in response.headers["access-control-allow-methods"]
            assert "authorization" in response.headers["access-control-allow-headers"]
            assert "access-control-allow-credentials" not in response.headers
        for key, status in [("k", 200), ("wrong", 401)]:
            response = await server.post("/v1/generate", BODY, origin=PAGE, authorization=f"Bearer {key}")
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == PAGE
            assert "x-request-id" in response.headers["access-control-expose-headers"]
            assert "origin" in response.headers["vary"].lower()
        for origin in ("https://other.example", f"{PAGE}.evil", "null", PAGE.upper()):
            response = await server.http.options("/v1/generate", headers={**ask, "origin": origin})
            assert response.status_code == 401
            answer = await server.post("/v1/generate", BODY, origin=origin, authorization="Bearer k")
            assert answer.status_code == 200
            for one in (response, answer):
                assert not [name for name in one.headers if name.startswith("access-control")]
        assert await server.outcomes() == {"stop": 5, "unauthorized": 1}


async def test_any_origin_and_none() -> None:
    async with served("yes", settings=Settings(port=0, cors_origins=("*",))) as server:
        response = await server.post("/v1/generate", {**BODY, "stream": True}, origin=PAGE)
        assert response.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in response.headers
        response = await server.post("/v1/generate", {"n": 0}, origin=PAGE)
        assert response.status_code == 400
        assert response.headers["access-control-allow-origin"] == "*"
    async with served("yes") as server:
        response = await server.post("/v1/generate", BODY, origin=PAGE)
        assert not [name for name in response.headers if name.startswith("access-control")]
        ask = {"origin": PAGE, "access-control-request-method": "POST"}
        assert (await server.http.options("/v1/generate", headers=ask)).status_code == 405


async def test_tls(tmp_path: Path) -> None:
    folder = make_certificates(tmp_path)
    service = scripted_service("yes")
    settings = Settings(
        port=0,
        tls_cert=str(folder / "server.pem"),
        tls_key=str(folder / "server.key"),
        tls_client_ca=str(folder / "ca.pem"),
    )
    server = RestServer(service, settings=settings)
    url = f"https://127.0.0.1:{await server.start()}/v1/generate"
    trusting = ssl.create_default_context(cafile=folder / "ca.pem")
    async with httpx.AsyncClient(verify=trusting, trust_env=False) as http:
        with pytest.raises(httpx.TransportError):  # no certificate of its own
            await http.post(url, json=BODY)
    known = ssl.create_default_context(cafile=folder / "ca.pem")
    known.load_cert_chain(folder / "client.pem", folder / "client.key")
    async with httpx.AsyncClient(verify=known, trust_env=False) as http:
        assert (await http.post(url, json=BODY)).json()["outputs"][0]["text"] == "yes"
        response = await http.post(url, json={**BODY, "stream": True})
        assert response.text.endswith("data: [DONE]\n\n")
    await service.close()
    await server.stop(1)
    with pytest.raises(OSError):
        await RestServer(service, settings=Settings(port=0, tls_cert="/nope", tls_key="/nope")).start()


async def test_outcomes_are_counted_once_and_by_route() -> None:
    async with served("yes") as server:
        long = {"instruction": "hello", "max_tokens": 1}
        await asyncio.gather(
            server.post("/v1/generate", {**BODY, "mode": "cot"}),
            server.post("/v1/generate", long),
            server.post("/v1/generate", {**long, "stream": True}),
            server.post("/v1/generate", {"instruction": 5}),
            server.post("/v1/generate", {**BODY, "model": "none"}),
            server.http.post("/v1/generate", content=b"{"),
            server.post("/v1/score", {**BODY, "candidates": ["x"]}),
            server.post("/v1/tokenize", {"text": "x"}),
            server.post("/v1/completions", {"prompt": "x"}),
            server.post("/v1/completions", {"prompt": ""}),
            server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            *(server.http.get(path) for path in (*OPEN, "/v1/generate", "/v1/models", "/docs", "/nope")),
            server.post("/v1/generat", BODY),
        )
        assert server.requests() == {
            ("rest", "generate", "cot", "stop"): 1,
            ("rest", "generate", "instruction", "length"): 2,
            ("rest", "generate", "none", "invalid"): 2,
            ("rest", "generate", "instruction", "invalid"): 1,
            ("rest", "score", "instruction", "stop"): 1,
            ("rest", "tokenize", "none", "stop"): 1,
            ("rest", "completions", "raw", "stop"): 1,
            ("rest", "completions", "raw", "invalid"): 1,
            ("rest", "chat", "raw", "stop"): 1,
        }
        text = (await server.http.get("/metrics")).text
        assert 'flan_requests_total{mode="cot",outcome="stop",protocol="rest",route="generate"} 1.0' in text
        assert "vllm:num_requests_running 0.0" in text
        response = await server.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
