"""What the README tells a newcomer to type, typed: against the bundled demo checkpoint on the ports of this run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.client import FlanClient
from tests.server.process import ServerProcess

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerProcess]:
    with ServerProcess() as process:
        yield process


def blocks(language: str, marker: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [body for name, body in BLOCK.findall(text) if name == language and marker in body]


def here(command: str, server: ServerProcess) -> str:
    """The command for this run's ports."""
    rest = server.rest_url.removeprefix("http://")
    return command.replace("localhost:8000", rest).replace("localhost:50051", server.grpc_target)


def run(command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CURLS = [body for body in blocks("", "curl -s") if "buf curl" not in body]
PYTHONS = blocks("python", "client")


def test_the_readme_has_its_examples() -> None:
    assert len(CURLS) >= 5
    assert len(PYTHONS) == 5


@pytest.mark.parametrize("command", CURLS, ids=range(len(CURLS)))
def test_each_curl_answers(demo: ServerProcess, command: str) -> None:
    printed = run(here(command, demo))
    if "/v1/score" in command:
        assert len(json.loads(printed)["candidates"]) == 2
    elif '"stream": true' in command:
        frames = [line.removeprefix("data: ") for line in printed.splitlines() if line.startswith("data: ")]
        assert frames[-1] == "[DONE]"
        assert "usage" in json.loads(frames[-2])
    else:
        body = json.loads(printed)
        assert body["outputs"][0]["text"]
        assert body["outputs"][0]["finish_reason"] == "stop"


def test_the_grpc_example_answers_by_reflection(demo: ServerProcess) -> None:
    (command,) = blocks("", "buf curl")
    body = json.loads(run(here(command, demo)))
    assert body["outputs"][0]["answer"]


@pytest.mark.parametrize("program", PYTHONS, ids=range(len(PYTHONS)))
def test_each_python_example_prints_an_answer(demo: ServerProcess, program: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(here(program, demo), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}  # offline, its client would not ask a local server either
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "failed" not in done.stdout


TASKS: list[tuple[dict[str, Any], str]] = [
    ({"instruction": "Find the odd one out.", "input": "lemonade, spinach, garlic, broccoli"}, "lemonade"),
    ({"mode": "cot", "instruction": "Take the last letters of Paul Maria and join them."}, "la"),
    (
        {
            "mode": "cot",
            "instruction": "A coin is heads up. Evan does not flip the coin. Don flips the coin. "
            "Karl does not flip the coin. Is the coin still heads up?",
        },
        "no",
    ),
    (
        {"instruction": "Is this review positive or negative?", "input": "I loved the show, it was friendly."},
        "positive",
    ),
]


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_the_demo_does_its_tasks(demo: ServerProcess, protocol: str) -> None:
    """Most of a few plain questions are right; the model card has the scores on 5,000."""
    with FlanClient(demo.rest_url if protocol == "rest" else f"grpc://{demo.grpc_target}") as client:
        right = 0
        for fields, expected in TASKS:
            output = client.generate(**fields).outputs[0]
            if fields.get("mode") == "cot":
                assert output.rationale
            right += (output.answer or output.text).strip(" .").lower() == expected
    assert right >= 3


def test_the_score_of_a_greedy_output_is_the_sum_of_its_logprobs(demo: ServerProcess) -> None:
    fields: dict[str, Any] = {
        "instruction": "Is this review positive or negative?",
        "input": "I loved the show, it was friendly.",
    }
    with FlanClient(demo.rest_url) as client:
        output = client.generate(**fields, logprobs=0).outputs[0]
        assert output.logprobs is not None
        assert output.finish_reason == "stop"
        score = client.score(**fields, candidates=[output.text, "negative, very"]).candidates[0]
    assert score.num_tokens == len(output.logprobs)
    assert score.logprob == pytest.approx(sum(entry.logprob for entry in output.logprobs), abs=1e-2)
