"""What promtool says of the `/metrics` of the really started server, after requests of several outcomes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve.client import FlanClient
from serve.errors import ServeError
from tests.server.process import ServerProcess
from tests.server.promtool import lint

# A colon stands for a recording rule by Prometheus' custom, but these are vLLM's names, and gateways and autoscalers
# ask for them letter by letter: to please the linter would make them useless.
ALIASES = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
OF_ALIASES = [f"{name} metric names should not contain ':'" for name in ALIASES]


@pytest.fixture(scope="module")
def exposition(checkpoint_folder: Path) -> Iterator[str]:
    with ServerProcess("--model", str(checkpoint_folder), "--api-key", "k", "--max-output-tokens", "32") as process:
        for target in (process.rest_url, f"grpc://{process.grpc_target}"):
            with FlanClient(target, api_key="k") as client:
                client.generate("the cat", n=2)
                client.generate("the cat", mode="cot", samples=3)
                client.score("the cat", candidates=["yes", "no"])
                client.tokenize("{x}")
                with pytest.raises(ServeError):
                    client.generate("the cat", temperature=9)
            with FlanClient(target, api_key="wrong") as client, pytest.raises(ServeError):
                client.generate("the cat")
        headers = {"authorization": "Bearer k"}
        for path, body in (
            ("/v1/completions", {"prompt": "the cat"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the cat"}], "model": 'no"\\\n'}),
            ("/generate", {"inputs": "the cat"}),
        ):
            httpx.post(process.rest_url + path, json=body, headers=headers)
        yield httpx.get(f"{process.rest_url}/metrics").text


def test_only_the_colons_of_vllms_names_are_complained_of(exposition: str) -> None:
    assert lint(exposition) == (3, OF_ALIASES)


def test_of_our_own_names_there_is_nothing_to_say(exposition: str) -> None:
    own = "".join(line for line in exposition.splitlines(keepends=True) if "vllm:" not in line)
    assert len(re.findall("^# TYPE flan_", own, re.MULTILINE)) == len(re.findall("^# TYPE ", own, re.MULTILINE)) > 15
    assert lint(own) == (0, [])


def test_every_family_has_its_help_and_every_request_its_outcome(exposition: str) -> None:
    for family in re.findall(r"^# TYPE (\S+)", exposition, re.MULTILINE):
        assert re.search(rf"^# HELP {family} \S", exposition, re.MULTILINE), family
    counted = re.findall(r'^flan_requests_total\{.*outcome="(\w+)".*\} (\d+)', exposition, re.MULTILINE)
    totals = {outcome: sum(int(n) for o, n in counted if o == outcome) for outcome, _ in counted}
    assert totals["invalid"] == 3
    assert totals["unauthorized"] == 2
    assert sum(totals.values()) == 2 * 6 + 3
    assert 'no"' not in exposition


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("# HELP x_total Says.\n# TYPE x_total counter\nx_total 1\n", 0),
        ("# TYPE x_total counter\nx_total 1\n", 3),  # no help
        ("# HELP x Says.\n# TYPE x counter\nx 1\n", 3),  # a counter without _total
        ("# HELP x_total Says.\n# TYPE x_total counter\nx_total one\n", 1),
    ],
)
def test_the_linter_sees_mistakes(text: str, code: int) -> None:
    assert lint(text)[0] == code
