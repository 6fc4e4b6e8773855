"""The image, really built and really run, as the demo overlay's pod would be: hardened, probed, drained.

Needs root and Debian's buildah, podman, runc, conmon and mmdebstrap. `make image-test` runs it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator

import grpc
import httpx
import pytest

from protos.flan.v1 import generation_pb2, generation_pb2_grpc
from serve.engine.native import build
from serve.engine.native.library import level
from tests.deploy import manifests
from tests.deploy.containers import TOOLS, Podman, pod_arguments, running, wait_for_probe
from tests.deploy.manifests import ROOT

pytestmark = [pytest.mark.container, pytest.mark.timeout(1200)]

# Loopback and free ports: tests do not listen where others may call.
PORTS = {"FLAN_SERVE_HOST": "127.0.0.1", "FLAN_SERVE_PORT": "0", "FLAN_SERVE_GRPC_PORT": "0"}
DRAIN_MARGIN_SECONDS = 2.0


STORY_TOKENS = 6000  # seconds of them: podman takes its time to stop a container
LONG = {"FLAN_SERVE_MAX_OUTPUT_TOKENS": str(STORY_TOKENS)}


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert missing == [], f"apt-get install -y --no-install-recommends {' '.join(missing)}"
    return Podman(tmp_path_factory.mktemp("podman"))


@pytest.fixture(scope="module")
def image(podman: Podman) -> str:
    return podman.build()


def test_what_the_image_says_of_itself(podman: Podman, image: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert image == f"localhost/flan-serve:{version}"
    found = podman.inspect(image)
    config = found["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["flan-serve"]
    assert set(config["ExposedPorts"]) == {"8000/tcp", "50051/tcp"}
    assert set(config["Volumes"]) == {"/home/flan", "/tmp"}
    assert config["Labels"]["org.opencontainers.image.version"] == version
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert found["Size"] < 2_000_000_000


def test_what_is_in_the_image(podman: Podman, image: str) -> None:
    """The wheel has its data files, serving's packages are there, and nothing of the sources' folder is."""
    program = """
import hashlib, importlib.metadata, importlib.resources, json, os
from serve.engine.native.library import level
names = {d.name.lower() for d in importlib.metadata.distributions()}
root = importlib.resources.files("serve")
print(json.dumps({
    "demo": sorted(p.name for p in (root / "demo").iterdir()),
    "static": sorted(p.name for p in (root / "rest" / "static").iterdir()),
    "typed": (root / "py.typed").is_file(),
    "names": sorted(names),
    "home": os.listdir("/home/flan"),
    "left": [path for path in ("/src", "/build", "/dist", "/opt/build") if os.path.exists(path)],
    "sources": {
        str(path.relative_to(root.parent)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("serve", "protos") for path in (root.parent / name).rglob("*.py")
    },
    "kernels": level().name,
    "uid": os.getuid(),
}))
"""
    out = podman.output(
        "run", "--rm", "--pull=never", "--network", "none", "--entrypoint", "python", image, "-c", program
    )
    found = json.loads(out.splitlines()[-1])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found["demo"])
    assert found["static"] == sorted(path.name for path in (ROOT / "serve/rest/static").iterdir())
    assert {"playground.html", "playground.css", "playground.js"} <= set(found["static"])
    assert found["typed"]
    assert {"torch", "grpcio", "fastapi", "flan-serve"} <= set(found["names"])
    assert not {"pytest", "locust", "ruff", "vllm", "tensorboard"} & set(found["names"])
    assert not any(name.startswith("nvidia") for name in found["names"])
    assert found["home"] == [name for name in found["home"] if name.startswith(".")]
    assert found["left"] == []
    assert found["sources"] == {
        str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("serve", "protos")
        for path in (ROOT / name).rglob("*.py")
    }, "the image was built from other sources, perhaps from a cache"
    assert found["kernels"] == _level_here(), "compiled when the wheel was built, for every processor"
    assert found["uid"] == 10001


def _level_here() -> str:
    assert build.library_path().is_file(), "run `make venv`, which compiles them"
    return level().name


def test_it_serves_and_drains_as_a_pod(podman: Podman, image: str) -> None:
    """Hardened as the manifest says; both protocols answer; SIGTERM in mid-stream loses nothing."""
    container = manifests.server("overlays/demo")
    with running(podman, image, *pod_arguments("overlays/demo", PORTS | LONG)) as server:
        wait_for_probe(server.rest, container["startupProbe"])
        wait_for_probe(server.rest, container["livenessProbe"])
        answer = httpx.post(f"{server.rest}/v1/generate", json={"instruction": "What is 2 + 3?"}, timeout=30)
        assert answer.status_code == 200
        assert answer.json()["outputs"][0]["text"]
        with grpc.insecure_channel(server.grpc) as channel:
            stub = generation_pb2_grpc.FlanServiceStub(channel)
            reply = stub.Generate(generation_pb2.GenerateRequest(instruction="What is 2 + 3?"), timeout=30)
        assert reply.outputs[0].text == answer.json()["outputs"][0]["text"]
        assert "flan_requests_total{" in httpx.get(f"{server.rest}/metrics").text
        _drain(podman, server.rest, server.name, server.process)


def _drain(podman: Podman, rest: str, name: str, process: subprocess.Popen[str]) -> None:
    grace = float(manifests.settings("overlays/demo")["FLAN_SERVE_SHUTDOWN_GRACE_SECONDS"])
    body = {"instruction": "Tell a long story.", "max_tokens": STORY_TOKENS, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{rest}/v1/generate", json=body, timeout=60) as stream:
        lines: Iterator[str] = stream.iter_lines()
        first = next(line for line in lines if line.startswith("data:"))
        asked = time.monotonic()
        stopping = threading.Thread(target=podman.output, args=("stop", "-t", "60", name))
        stopping.start()
        statuses: set[int] = set()
        while time.monotonic() - asked < 10 and statuses != {503}:
            try:
                statuses = {httpx.get(f"{rest}/readyz", timeout=5).status_code}
                assert httpx.get(f"{rest}/livez", timeout=5).status_code == 200, "the kubelet would kill it now"
            except httpx.ConnectError:
                break  # already gone: the stream was faster than the look
            time.sleep(0.02)
        frames = [first, *(line for line in lines if line.startswith("data:"))]
    stopping.join(timeout=70)
    assert process.wait(timeout=10) == 0
    assert time.monotonic() - asked <= grace + DRAIN_MARGIN_SECONDS
    assert frames[-1] == "data: [DONE]", "the running stream was cut"
    assert json.loads(frames[-2][5:])["usage"]["completion_tokens"] == STORY_TOKENS
    assert statuses == {503}, "readiness did not turn while draining"


def test_it_starts_without_any_network(podman: Podman, image: str) -> None:
    """No interface but loopback, no DNS, a read-only root: the demo checkpoint needs none of it."""
    with running(podman, image, *pod_arguments("overlays/demo", {}), network="none") as server:
        assert server.rest.endswith(":8000")
        podman.output("stop", "-t", "40", server.name)
        assert server.process.wait(timeout=10) == 0
