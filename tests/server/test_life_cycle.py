"""Start, probes while loading, drain, signals and exit codes of the real process."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.client import FlanClient
from tests.server.process import ServerProcess, make_checkpoint, own_environment


def rest(server: ServerProcess, path: str, **body: object) -> httpx.Response:
    return httpx.post(server.rest_url + path, json=body, timeout=30)


def test_the_ready_line_says_where(server: ServerProcess) -> None:
    assert server.rest_url.startswith("http://127.0.0.1:")
    assert server.grpc_target.startswith("127.0.0.1:")
    assert server.model == "toy-t5"
    assert httpx.get(server.rest_url + "/readyz").status_code == 200
    with grpc.insecure_channel(server.grpc_target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service="flan.v1.FlanService"), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_ready_line_is_one_write_and_all_of_the_output() -> None:
    """Where a pipe is shared, nobody's text can get into the line; Python is unbuffered, as in our image."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps writes apart
    command = [sys.executable, "-u", "-m", "serve", "--port", "0", "--grpc-port", "0"]
    environ = own_environment()
    with ours, subprocess.Popen(command, stdout=theirs.fileno(), stderr=subprocess.DEVNULL, env=environ) as process:
        theirs.close()
        ours.settimeout(60)
        try:
            line = ours.recv(4096)
            process.send_signal(signal.SIGTERM)
            after = ours.recv(4096)
        finally:
            process.kill()
    address = rb"127\.0\.0\.1:\d+"
    assert re.fullmatch(rb"ready rest=http://%b grpc=%b model=flan-demo runtime=torch\n" % (address, address), line)
    assert after == b""


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(checkpoint_folder: Path) -> None:
    with ServerProcess("--model", str(checkpoint_folder), "--max-output-tokens", "4000") as server:
        pieces: list[str] = []
        started = threading.Event()

        def read_stream() -> None:
            with FlanClient(server.rest_url) as client:
                stream = client.stream(mode="raw", instruction="the cat", max_tokens=4000, ignore_eos=True)
                for delta in stream:
                    pieces.append(delta.text)
                    started.set()
                assert stream.completion.usage.completion_tokens == 4000

        reader = threading.Thread(target=read_stream)
        reader.start()
        assert started.wait(20)
        server.signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while httpx.get(server.rest_url + "/readyz").status_code != 503:
            assert time.monotonic() < deadline
        assert httpx.get(server.rest_url + "/livez").status_code == 200
        refused = rest(server, "/v1/generate", instruction="hello")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        reader.join(30)
        code, _ = server.exit_code(5)
    assert code == 0
    assert len(pieces) > 1


def test_a_stuck_request_does_not_hold_up_the_exit_beyond_the_grace(checkpoint_folder: Path) -> None:
    argv = ("--model", str(checkpoint_folder), "--max-output-tokens", "200000", "--shutdown-grace-seconds", "1")
    with ServerProcess(*argv) as server:
        body = {"mode": "raw", "instruction": "the cat", "max_tokens": 200000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", server.rest_url + "/v1/generate", json=body, timeout=30) as response:
            pieces = response.iter_bytes()  # kept: httpx closes the response with its iterator
            next(pieces)  # and then never read again
            server.signal(signal.SIGTERM)
            code, seconds = server.exit_code(10)
    assert code == 0
    assert seconds < 1 + 2


def test_a_second_signal_exits_now(checkpoint_folder: Path) -> None:
    with ServerProcess("--model", str(checkpoint_folder), "--max-output-tokens", "200000") as server:
        body = {"mode": "raw", "instruction": "the cat", "max_tokens": 200000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", server.rest_url + "/v1/generate", json=body, timeout=30) as response:
            pieces = response.iter_bytes()
            next(pieces)
            server.signal(signal.SIGTERM)
            time.sleep(0.3)
            server.signal(signal.SIGTERM)
            code, seconds = server.exit_code(5)
    assert code != 0
    assert seconds < 2


def test_bad_settings_exit_2_with_every_error() -> None:
    with ServerProcess("--portt", "1", "--dtype", "f32", wait=False) as server:
        code, _ = server.exit_code(30)
    assert code == 2
    text = "\n".join(server.lines)
    assert "--portt" in text
    assert "--dtype: must be one of" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("config.json", "config.json is missing"),
        ("tokenizer.json", "neither tokenizer.json nor spiece.model"),
        ("model.safetensors", "safetensors"),
    ],
)
def test_a_missing_file_exits_1_and_is_named(tmp_path: Path, damage: str, message: str) -> None:
    folder = make_checkpoint(tmp_path / "broken")
    (folder / damage).unlink()
    with ServerProcess("--model", str(folder), wait=False) as server:
        code, _ = server.exit_code(30)
    assert code == 1
    assert message in "\n".join(server.lines)


def test_a_missing_tensor_exits_1_and_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_decoder_layers": 3}))
    with ServerProcess("--model", str(folder), wait=False) as server:
        code, _ = server.exit_code(30)
    assert code == 1
    assert "decoder.block.2." in "\n".join(server.lines)


def test_print_config_prints_and_stops() -> None:
    env = {"FLAN_SERVE_API_KEY": "geheim", "FLAN_SERVE_MAX_OUTPUT_TOKENS": "99"}
    with ServerProcess("--print-config", "--keepalive-seconds", "2", env=env, wait=False) as server:
        code, _ = server.exit_code(30)
    assert code == 0
    printed = tomllib.loads("\n".join(server.lines))
    assert (printed["max-input-tokens"], printed["max-output-tokens"], printed["keepalive-seconds"]) == (2048, 99, 2.0)
    assert (printed["port"], printed["grpc-port"], printed["api-key"]) == (0, 0, ["***"])
    assert "geheim" not in "\n".join(server.lines)
