"""Builds the image without a Docker engine or a registry, and runs it as the rendered pod would be run."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.deploy import manifests
from tests.deploy.manifests import ROOT

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flan-serve" / "image"
TOOLS = ("buildah", "podman", "runc", "mmdebstrap", "conmon")
# For podman inside a container without CAP_SYS_RESOURCE and with hybrid cgroups: Debian's crun cannot start there.
_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
pids_limit = 0
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


class Podman:
    """podman on a store of its own, so that nothing of the user's is touched."""

    def __init__(self, scratch: Path) -> None:
        conf = scratch / "containers.conf"
        conf.write_text(_CONTAINERS_CONF)
        self._environ = os.environ | {"CONTAINERS_CONF": str(conf), "STORAGE_DRIVER": "overlay"}
        self._store = ("--root", str(CACHE / "store" / "root"), "--runroot", str(CACHE / "store" / "run"))

    def build(self) -> str:
        """deploy/build-image.sh on a Debian root file system, its parts kept in CACHE; the result's tag."""
        environ = self._environ | {"BASE": "rootfs", "CACHE": str(CACHE), "STORE": str(CACHE / "store")}
        environ |= {"TORCH_INDEX_URL": os.environ.get("TORCH_INDEX_URL", "")}
        script = ROOT / "deploy" / "build-image.sh"
        done = subprocess.run([script], env=environ, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout.splitlines()[-1]

    def command(self, *arguments: str) -> list[str]:
        return ["podman", *self._store, *arguments]

    def output(self, *arguments: str, timeout: float = 120) -> str:
        done = subprocess.run(
            self.command(*arguments), env=self._environ, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def inspect(self, image: str) -> dict[str, Any]:
        (found,) = json.loads(self.output("image", "inspect", image))
        result: dict[str, Any] = found
        return result

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command("run", "--rm", "--pull=never", *arguments),
            env=self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def pod_arguments(target: str, environ: dict[str, str]) -> list[str]:
    """`podman run` options that mean what the overlay's pod means; `environ` goes over its settings."""
    spec, container = manifests.pod(target), manifests.server(target)
    context, own = spec["securityContext"], container["securityContext"]
    arguments = ["--user", f"{context['runAsUser']}:{context['runAsGroup']}"]
    arguments += [f"--cap-drop={name}" for name in own["capabilities"]["drop"]]
    if not own["allowPrivilegeEscalation"]:
        arguments += ["--security-opt", "no-new-privileges"]
    if own["readOnlyRootFilesystem"]:
        arguments += ["--read-only", "--read-only-tmpfs=false"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for mount in container["volumeMounts"]:
        assert "emptyDir" in volumes[mount["name"]], "only what a bare machine has"
        if mount["mountPath"] == "/dev/shm":
            continue  # podman makes it
        # an emptyDir belongs to the fsGroup and is group-writable
        arguments += ["--mount", f"type=tmpfs,destination={mount['mountPath']},tmpfs-mode=1777"]
    variables = manifests.settings(target) | {"OMP_NUM_THREADS": "1"} | environ
    for name, value in variables.items():
        arguments += ["--env", f"{name}={value}"]
    return arguments


@dataclass(frozen=True, slots=True)
class Server:
    process: subprocess.Popen[str]
    rest: str
    grpc: str
    name: str


@contextmanager
def running(podman: Podman, image: str, *arguments: str, network: str = "host") -> Iterator[Server]:
    """The server in a container, after its ready line; killed at the end if it still runs."""
    name = f"flan-test-{os.getpid()}-{time.monotonic_ns()}"
    with podman.start("--name", name, "--network", network, *arguments, image) as process:
        try:
            yield Server(process, *_read_ready_line(process), name)
        finally:
            if process.poll() is None:
                podman.output("kill", name)


def _read_ready_line(process: subprocess.Popen[str]) -> tuple[str, str]:
    """(REST URL, gRPC address); fails with the end of the log when the server ends first."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        if line.startswith("ready "):
            words = dict(word.split("=", 1) for word in line.split()[1:])
            return words["rest"], words["grpc"]
        seen.append(line)
    raise AssertionError("the server ended before it was ready:\n" + "".join(seen[-40:]))


def wait_for_probe(url: str, probe: dict[str, Any]) -> None:
    """Polls as the kubelet does, with the manifest's own period, timeout and threshold."""
    failures = 0
    while True:
        try:
            if httpx.get(url + probe["httpGet"]["path"], timeout=probe["timeoutSeconds"]).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        failures += 1
        assert failures < probe["failureThreshold"], f"{probe['httpGet']['path']} failed {failures} times"
        time.sleep(probe["periodSeconds"])
