"""TLS and client certificates on both ports: who gets in, and who does not."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from serve.client import FlanClient
from serve.client.transport import TlsFiles
from serve.errors import Unauthorized, Unavailable
from tests.client.harness import TRANSPORTS, async_client, served
from tests.rpc.certificates import make_certificates
from tests.server.process import ServerProcess


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another authority, which has the same name."""
    return make_certificates(tmp_path_factory.mktemp("others"))


def settings(folder: Path, *, mutual: bool) -> dict[str, Any]:
    own = {"tls_cert": str(folder / "server.pem"), "tls_key": str(folder / "server.key")}
    return {**own, "tls_client_ca": str(folder / "ca.pem")} if mutual else own


def files(ca: Path, client: Path | None = None) -> TlsFiles:
    own = {} if client is None else {"cert": str(client / "client.pem"), "key": str(client / "client.key")}
    return TlsFiles(ca=str(ca / "ca.pem"), **own)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_certificate_that_the_authority_did_not_sign_is_refused(
    transport: str, ours: Path, others: Path
) -> None:
    async with served("yes", **settings(ours, mutual=True)) as s:
        for tls in (files(ours), files(ours, others)):
            async with async_client(s, transport, tls=tls, max_retries=0) as client:
                with pytest.raises(Unavailable):
                    await client.generate("x", timeout=5)
        async with async_client(s, transport, tls=files(ours, ours)) as client:  # the server is none the worse
            assert (await client.generate("x")).outputs[0].text == "yes"
        assert len(s.runtime.requests) == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_server_that_the_client_does_not_trust_gets_nothing(transport: str, ours: Path, others: Path) -> None:
    async with served("yes", **settings(ours, mutual=False)) as s:
        for tls in (files(others), TlsFiles()):
            async with async_client(s, transport, tls=tls, max_retries=0) as client:
                with pytest.raises(Unavailable):
                    await client.generate("x", timeout=5)
        async with async_client(s, transport, tls=files(ours)) as client:
            assert (await client.generate("x")).outputs[0].text == "yes"
        assert len(s.runtime.requests) == 1


@pytest.mark.parametrize("mutual", [False, True])
async def test_plain_text_to_a_tls_port_gets_no_answer(ours: Path, mutual: bool) -> None:
    async with served("yes", **settings(ours, mutual=mutual)) as s:
        for url in s.urls.values():
            port = int(url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            try:
                answer = await asyncio.wait_for(reader.read(), 5)
            except ConnectionResetError:
                answer = b""
            assert b"200" not in answer
            writer.transport.abort()
        assert s.runtime.requests == []


def test_a_process_with_keys_and_client_certificates_on_both_ports(ours: Path, checkpoint_folder: Path) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings(ours, mutual=True).items()]
    with ServerProcess("--model", str(checkpoint_folder), "--api-key", "sesame", *flags) as server:
        assert server.rest_url.startswith("https://127.0.0.1:")
        known = ssl.create_default_context(cafile=ours / "ca.pem")
        with httpx.Client(verify=known, trust_env=False) as http, pytest.raises(httpx.TransportError):
            http.get(server.rest_url + "/livez")  # probes, too, need a certificate
        known.load_cert_chain(ours / "client.pem", ours / "client.key")
        with httpx.Client(verify=known, trust_env=False) as http:
            assert http.get(server.rest_url + "/readyz").status_code == 200
        credentials = grpc.ssl_channel_credentials((ours / "ca.pem").read_bytes())
        with grpc.secure_channel(server.grpc_target, credentials) as channel, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(timeout=2)
        texts = set()
        for url in (server.rest_url, f"grpcs://{server.grpc_target}"):
            with FlanClient(url, api_key="sesame", tls=files(ours, ours)) as client:
                texts.add(client.generate("the cat", max_tokens=8).outputs[0].text)
            with FlanClient(url, tls=files(ours, ours)) as client, pytest.raises(Unauthorized):
                client.generate("the cat")
        assert len(texts) == 1
        assert "sesame" not in "\n".join(server.lines)
