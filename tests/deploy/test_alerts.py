"""The alert rules: promtool's own tests, and that every series they name is one that the server has."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.metrics import Metrics, Outcome
from tests.deploy import manifests
from tests.server.promtool import promtool

UNIT_TESTS = Path(__file__).parent / "alerts_test.yaml"


def rules() -> list[dict[str, Any]]:
    (manifest,) = manifests.of_kind("overlays/production", "PrometheusRule")
    (group,) = manifest["spec"]["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


@pytest.fixture(scope="module", name="promtool")
def installed_promtool() -> str:
    return promtool()


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_promtool_agrees(promtool: str, tmp_path: Path) -> None:
    (manifest,) = manifests.of_kind("overlays/production", "PrometheusRule")
    rules_file = tmp_path / "rules.yaml"
    rules_file.write_text(yaml.safe_dump(manifest["spec"]))
    assert "SUCCESS: 9 rules found" in run(promtool, "check", "rules", rules_file)
    tests = yaml.safe_load(UNIT_TESTS.read_text(encoding="utf-8"))
    tests["rule_files"] = [str(rules_file)]
    for test in tests["tests"]:
        for expected in test["alert_rule_test"]:
            for alert in expected.get("exp_alerts", []):
                alert["exp_annotations"] = {}  # promtool compares them too; their words are not what is tested here
    bare = copy.deepcopy(manifest["spec"])
    for rule in bare["groups"][0]["rules"]:
        del rule["annotations"]
    rules_file.write_text(yaml.safe_dump(bare))
    tests_file = tmp_path / "tests.yaml"
    tests_file.write_text(yaml.safe_dump(tests))
    assert "SUCCESS" in run(promtool, "test", "rules", tests_file)


def test_every_alert_has_a_test_of_firing_and_of_silence() -> None:
    tests = yaml.safe_load(UNIT_TESTS.read_text(encoding="utf-8"))["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert len(names) == 9
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == names
    assert {check["alertname"] for check in checks if not check.get("exp_alerts")} == names


def test_every_series_exists() -> None:
    metrics = Metrics()
    families = {family.name: family for family in metrics.registry.collect()}
    for rule in rules():
        names = re.findall(r"\b(?:flan_|vllm:)\w+", rule["expr"])
        assert names, rule["alert"]
        for name in names:
            assert re.sub(r"_(bucket|total|count|sum)$", "", name) in families, f"{rule['alert']}: {name}"


def test_thresholds_lie_inside_the_buckets() -> None:
    """Above the last finite bucket a quantile is that bucket's edge, and the alert could never fire."""
    metrics = Metrics()
    checked = 0
    for rule in rules():
        for name, limit in re.findall(r"\(rate\((flan_\w+)_bucket\[\w+\]\)\)\) > ([\d.]+)", rule["expr"]):
            edges = metrics.registry._names_to_collectors[name]._upper_bounds  # type: ignore[attr-defined]
            assert float(limit) in edges, f"{rule['alert']}: {limit} is between two buckets of {name}"
            assert float(limit) < edges[-2]
            checked += 1
    assert checked == 3


def test_labels_and_outcomes_exist() -> None:
    outcomes = {value for rule in rules() for value in re.findall(r'outcome="(\w+)"', rule["expr"])}
    assert outcomes == {"error", "refused", "unauthorized"}
    assert outcomes <= {outcome.value for outcome in Outcome}
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert "for" in rule
        assert rule["annotations"].keys() == {"summary", "description"}
