"""Renders the kustomize overlays once and finds things in them."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
KUBERNETES = ROOT / "deploy" / "kubernetes"
TARGETS = ("base", "overlays/demo", "overlays/production")

Manifest = dict[str, Any]


@functools.cache
def render(target: str) -> tuple[Manifest, ...]:
    """What `kubectl kustomize` makes of a target; kubectl is the one pinned in pyproject.toml."""
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run(
        [kubectl, "kustomize", KUBERNETES / target], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "kustomize warns"
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(target: str, kind: str) -> list[Manifest]:
    return [manifest for manifest in render(target) if manifest["kind"] == kind]


def deployment(target: str) -> Manifest:
    (found,) = of_kind(target, "Deployment")
    return found


def pod(target: str) -> Manifest:
    spec: Manifest = deployment(target)["spec"]["template"]["spec"]
    return spec


def server(target: str) -> Manifest:
    (container,) = pod(target)["containers"]
    found: Manifest = container
    return found


def settings(target: str) -> dict[str, str]:
    """The variables of the pod's ConfigMap."""
    (source,) = server(target)["envFrom"]
    name = source["configMapRef"]["name"]
    (found,) = [m for m in of_kind(target, "ConfigMap") if m["metadata"]["name"] == name]
    data: dict[str, str] = found["data"]
    return data
