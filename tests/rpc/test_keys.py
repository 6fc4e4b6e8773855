"""API keys and TLS."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.flan.v1 import generation_pb2 as pb
from protos.flan.v1.generation_pb2_grpc import FlanServiceStub
from serve.config import Settings
from tests.rpc.certificates import make_certificates
from tests.rpc.harness import served
from tests.rpc.statuses import refusal

KEYS = Settings(grpc_port=0, api_keys=("first-key", "second"))
TEXT = pb.TokenizeRequest(text="x")


@pytest.mark.parametrize("value", ["Bearer first-key", "bearer second", "BEARER    second"])
async def test_a_valid_key(value: str) -> None:
    async with served("yes", settings=KEYS) as s:
        assert (await s.stub.Tokenize(TEXT, metadata=(("authorization", value),))).num_tokens > 0


@pytest.mark.parametrize(
    "value", [None, "", "Bearer", "Bearer ", "Bearer first", "Bearer first-keyx", "first-key", "Basic first-key"]
)
async def test_no_valid_key(value: str | None) -> None:
    metadata = () if value is None else (("authorization", value),)
    async with served("yes", settings=KEYS) as s:
        for call in (
            s.stub.Tokenize(TEXT, metadata=metadata),
            s.stub.GenerateStream(pb.GenerateRequest(instruction="x"), metadata=metadata).read(),
            s.stub.GenerateMany(metadata=metadata).read(),
            s.stub.GetModel(pb.GetModelRequest(), metadata=metadata),
            s.channel.unary_unary("/flan.v1.FlanService/Nothing")(b"", metadata=metadata),  # type: ignore[arg-type]
        ):
            refused = await refusal(call)
            assert (refused.code, refused.reason) == (grpc.StatusCode.UNAUTHENTICATED, "unauthorized")
            assert "first" not in refused.message
        assert s.requests() == {
            ("grpc", route, "none", "unauthorized"): 1 for route in ("tokenize", "generate", "generate_many")
        }


async def test_health_is_open_and_reflection_is_not() -> None:
    async with served("yes", settings=KEYS) as s:
        check: Any = health_pb2_grpc.HealthStub(s.channel)
        assert (await check.Check(health_pb2.HealthCheckRequest())).status == 1

        async def list_services() -> AsyncIterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        reflect: Any = reflection_pb2_grpc.ServerReflectionStub(s.channel).ServerReflectionInfo
        assert (await refusal(reflect(list_services()).read())).code is grpc.StatusCode.UNAUTHENTICATED
        key = (("authorization", "Bearer second"),)
        assert (await reflect(list_services(), metadata=key).read()).list_services_response.service


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls"))


def tls_settings(folder: Path, **more: Any) -> Settings:
    return Settings(grpc_port=0, tls_cert=str(folder / "server.pem"), tls_key=str(folder / "server.key"), **more)


async def test_tls(certificates: Path) -> None:
    async with served("yes", settings=tls_settings(certificates)) as s:
        credentials = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes())
        async with grpc.aio.secure_channel(f"localhost:{s.port}", credentials) as channel:
            assert (await FlanServiceStub(channel).Tokenize(TEXT)).num_tokens > 0
        assert (await refusal(s.stub.Tokenize(TEXT, timeout=5))).code is grpc.StatusCode.UNAVAILABLE  # plain text


async def test_client_certificates_are_demanded(certificates: Path) -> None:
    def read(name: str) -> bytes:
        return (certificates / name).read_bytes()

    settings = tls_settings(certificates, tls_client_ca=str(certificates / "ca.pem"))
    async with served("yes", settings=settings) as s:
        own = grpc.ssl_channel_credentials(read("ca.pem"), read("client.key"), read("client.pem"))
        async with grpc.aio.secure_channel(f"localhost:{s.port}", own) as channel:
            assert (await FlanServiceStub(channel).Tokenize(TEXT)).num_tokens > 0
        without = grpc.ssl_channel_credentials(read("ca.pem"))
        async with grpc.aio.secure_channel(f"localhost:{s.port}", without) as channel:
            refused = await refusal(FlanServiceStub(channel).Tokenize(TEXT, timeout=5))
            assert refused.code is grpc.StatusCode.UNAVAILABLE
