"""What grpc_health_probe and the kubelet's own gRPC probe see of the really started server, from start to end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.rpc.certificates import make_certificates
from tests.server.health_probe import BAD_ARGUMENTS, CALL_FAILED, NO_CONNECTION, SERVING, UNHEALTHY, probe
from tests.server.process import ServerProcess

SERVICES = ("", "flan.v1.FlanService")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def mutual(certificates: Path, checkpoint_folder: Path) -> Iterator[ServerProcess]:
    """TLS on both sides, and a key that health does not need."""
    with ServerProcess(
        "--model", str(checkpoint_folder), "--api-key", "some-key",
        "--tls-cert", str(certificates / "server.pem"), "--tls-key", str(certificates / "server.key"),
        "--tls-client-ca", str(certificates / "ca.pem"),
    ) as process:  # fmt: skip
        yield process


@pytest.mark.parametrize("service", SERVICES)
def test_a_ready_server_is_serving(server: ServerProcess, service: str) -> None:
    assert probe(f"-addr={server.grpc_target}", f"-service={service}") == SERVING


def test_the_probe_as_a_program_exits_with_its_code(server: ServerProcess) -> None:
    command = [sys.executable, "-m", "tests.server.health_probe", f"-addr={server.grpc_target}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (SERVING, "status: SERVING\n")
    done = subprocess.run([*command, "-service=flan"], capture_output=True, text=True, timeout=60)
    assert done.returncode == CALL_FAILED


@pytest.mark.parametrize("service", ["other", "flan", "FlanService", "flan.v1.FlanService ", "grpc.health.v1.Health"])
def test_an_unknown_service_is_a_failed_call(
    server: ServerProcess, service: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe(f"-addr={server.grpc_target}", f"-service={service}") == CALL_FAILED
    assert "StatusCode.NOT_FOUND" in capsys.readouterr().err


def test_nobody_there_is_no_connection() -> None:
    assert probe(f"-addr=127.0.0.1:{free_port()}", "-connect-timeout=0.3") == NO_CONNECTION


def test_the_rest_port_is_no_grpc_port(server: ServerProcess) -> None:
    rest = server.rest_url.removeprefix("http://")
    assert probe(f"-addr={rest}", "-connect-timeout=0.5") in (NO_CONNECTION, CALL_FAILED)
    assert httpx.get(f"{server.rest_url}/livez").status_code == 200


def test_over_tls_with_both_certificates_and_without_a_key(mutual: ServerProcess, certificates: Path) -> None:
    tls = ["-tls", f"-tls-ca-cert={certificates / 'ca.pem'}"]
    own = [f"-tls-client-cert={certificates / 'client.pem'}", f"-tls-client-key={certificates / 'client.key'}"]
    address, brief = f"-addr={mutual.grpc_target}", "-connect-timeout=0.5"
    for service in SERVICES:
        assert probe(address, f"-service={service}", *tls, *own) == SERVING
    assert probe(address, *tls, *own, "-tls-server-name=localhost") == SERVING
    assert probe(address, *tls, *own, "-tls-server-name=elsewhere", brief) == NO_CONNECTION
    assert probe(address, "-tls", *own, brief) == NO_CONNECTION  # an authority that the probe does not know
    assert probe(address, brief) == NO_CONNECTION  # plain text
    assert probe(address, *tls, brief) in (NO_CONNECTION, CALL_FAILED)  # no certificate of its own
    assert probe(address, *own) == BAD_ARGUMENTS
    assert probe(address, "-rpc-timeout=soon") == BAD_ARGUMENTS


def test_not_serving_while_loading_serving_while_ready_not_serving_while_draining(checkpoint_folder: Path) -> None:
    """Beside it /readyz, which says the same: both ports are open before the weights load."""
    port = free_port()
    address = f"-addr=127.0.0.1:{port}"
    argv = ("--model", str(checkpoint_folder), "--grpc-port", str(port), "--shutdown-grace-seconds", "60")
    with ServerProcess(*argv, "--max-output-tokens", "8000", wait=False) as process:
        seen: list[int] = []
        began = time.monotonic()
        while SERVING not in seen:
            assert time.monotonic() - began < 60
            seen.append(probe(address, "-connect-timeout=0.2", "-rpc-timeout=10"))  # how fast is not the question here
        assert set(seen) == {NO_CONNECTION, UNHEALTHY, SERVING}
        assert seen == sorted(seen, key=[NO_CONNECTION, UNHEALTHY, SERVING].index)
        while not process.rest_url:
            assert time.monotonic() - began < 60
            time.sleep(0.01)
        body = {"instruction": "Where do cows live?", "n": 4, "max_tokens": 8000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{process.rest_url}/v1/generate", json=body, timeout=30) as answer:
            lines = answer.iter_lines()  # kept: httpx closes the response with its iterator
            assert next(lines)
            process.signal(signal.SIGTERM)
            while httpx.get(f"{process.rest_url}/readyz").status_code == 200:
                time.sleep(0.005)
            assert [probe(address, f"-service={service}") for service in SERVICES] == [UNHEALTHY, UNHEALTHY]
            assert list(lines)[-2] == "data: [DONE]"  # what ran has finished
        assert process.exit_code(30)[0] == 0
        assert probe(address, "-connect-timeout=0.3") == NO_CONNECTION
