"""The Dockerfile and the manifests tell the same story; hadolint has nothing to say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serve import config
from tests.deploy import manifests
from tests.deploy.manifests import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instruction(name: str) -> str:
    """The last use of an instruction, continuation lines joined."""
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    found: list[str] = re.findall(rf"^{name} (.*)$", text, flags=re.MULTILINE)
    assert found, f"no {name}"
    return found[-1].strip()


def test_hadolint() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_server_is_process_one() -> None:
    """Exec form: in shell form SIGTERM reaches a shell and never the server."""
    assert json.loads(instruction("ENTRYPOINT")) == ["flan-serve"]
    assert "\nCMD" not in DOCKERFILE


def test_the_image_agrees_with_the_pod() -> None:
    spec, container = manifests.pod("base"), manifests.server("base")
    context = spec["securityContext"]
    assert instruction("USER") == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert instruction("EXPOSE").split() == [str(port["containerPort"]) for port in container["ports"]]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(json.loads(instruction("VOLUME"))) <= mounts
    variables = dict(pair.split("=", 1) for pair in instruction("ENV").split())
    assert variables["HOME"] in mounts
    assert {name for name in variables if name.startswith(config.ENV_PREFIX)} == {"FLAN_SERVE_HOST"}


def test_the_base_is_pinned_and_one() -> None:
    (default,) = re.findall(r"^ARG BASE_IMAGE=(.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", default)
    stages = re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE)
    assert stages == ["${BASE_IMAGE}"] * 3, "a venv works only with the Python that made it"


def test_the_context_is_what_the_wheel_needs() -> None:
    """An allow list: a checkpoint, a key or a .git folder beside the sources never enters the build."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source.rstrip("/")
        for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, flags=re.MULTILINE)
        for source in sources.split()
    }
    assert copied == allowed
    for name in copied:
        assert (ROOT / name).exists()


@pytest.mark.parametrize("script", ["build-image.sh"])
def test_scripts_parse_and_stop_at_errors(script: str) -> None:
    path = ROOT / "deploy" / script
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", path], timeout=10, check=True)
