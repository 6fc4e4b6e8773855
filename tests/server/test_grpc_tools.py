"""`buf curl`, a client that knows the contract by reflection alone, on every method: plain, with keys, over TLS."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protos.generate import tool
from tests.rpc.certificates import make_certificates
from tests.server.process import ServerProcess

KEY = "grpc-key-of-this-test"
REVIEW = {"instruction": "Is this review positive or negative?", "input": "I loved the story, it was charming."}
INVALID_ARGUMENT, NOT_FOUND, UNAUTHENTICATED = 3, 5, 16


@dataclass(frozen=True)
class Curl:
    """`buf curl` with the options that this server asks for."""

    url: str
    options: tuple[str, ...] = ()

    def run(
        self, path: str, *messages: Any, options: tuple[str, ...] | None = None
    ) -> subprocess.CompletedProcess[str]:
        given = self.options if options is None else options
        return subprocess.run(
            [tool("buf"), "curl", "--protocol", "grpc", *given, "--data", "@-", f"{self.url}{path}"],
            input=" ".join(map(json.dumps, messages)), capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def ask(self, method: str, *messages: Any) -> list[Any]:
        """The responses to a call of a method of FlanService, as JSON."""
        done = self.run(f"/flan.v1.FlanService/{method}", *messages)
        assert (done.returncode, done.stderr) == (0, "")
        return json_values(done.stdout)

    def refused(self, method: str, message: Any, *, options: tuple[str, ...] | None = None) -> tuple[int, Any]:
        """(gRPC status code, the error's JSON)."""
        done = self.run(f"/flan.v1.FlanService/{method}", message, options=options)
        assert done.returncode >= 8, done.stderr  # below: a mistake of the command line
        return done.returncode >> 3, json.loads(done.stderr)


def json_values(text: str) -> list[Any]:
    """JSON documents one behind the other."""
    decoder, found, rest = json.JSONDecoder(), [], text.lstrip()
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].lstrip()
    return found


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def plain() -> Iterator[Curl]:
    with ServerProcess() as process:
        yield Curl(f"http://{process.grpc_target}")


@pytest.fixture(scope="module")
def guarded(certificates: Path) -> Iterator[Curl]:
    files = ("--tls-cert", str(certificates / "server.pem"), "--tls-key", str(certificates / "server.key"))
    with ServerProcess("--api-key", KEY, *files) as process:
        ca = ("--cacert", str(certificates / "ca.pem"))
        # Reflection needs the key as every method does; `*` sends it there, too.
        yield Curl(
            f"https://{process.grpc_target}", (*ca, "-H", f"authorization: Bearer {KEY}", "--reflect-header", "*")
        )


@pytest.fixture(params=["plain", "guarded"])
def curl(request: pytest.FixtureRequest) -> Curl:
    found: Curl = request.getfixturevalue(request.param)
    return found


def test_services_and_methods_are_listed(curl: Curl) -> None:
    done = curl.run("", options=(*curl.options, "--list-services"))
    assert set(done.stdout.split()) >= {"flan.v1.FlanService", "grpc.health.v1.Health"}
    done = curl.run("", options=(*curl.options, "--list-methods"))
    names = ("Generate", "GenerateStream", "GenerateMany", "Score", "Tokenize", "GetModel")
    assert set(done.stdout.split()) >= {f"flan.v1.FlanService/{name}" for name in names}


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
def test_both_versions_of_reflection_are_spoken(curl: Curl, protocol: str) -> None:
    options = (*curl.options, "--reflect-protocol", protocol)
    done = curl.run("/flan.v1.FlanService/GetModel", {}, options=options)
    assert json.loads(done.stdout)["id"] == "flan-demo"


def test_generate(curl: Curl) -> None:
    [answer] = curl.ask("Generate", {**REVIEW, "logprobs": 1, "requestId": "mine", "stop": ["never said"], "seed": "7"})
    [output] = answer["outputs"]
    assert (output["text"], output["finishReason"]) == ("positive", "FINISH_REASON_STOP")
    assert (answer["requestId"], answer["mode"], answer["model"]) == ("mine", "MODE_INSTRUCTION", "flan-demo")
    assert answer["usage"]["completionTokens"] == len(output["logprobs"])
    [cot] = curl.ask("Generate", {"mode": "MODE_COT", "samples": 3, "seed": 1, "instruction": "Join cat and dog."})
    assert sum(vote["count"] for vote in cot["votes"]) == 3


def test_names_of_fields_as_in_the_contract_and_as_in_json(curl: Curl) -> None:
    [snake] = curl.ask("Generate", {**REVIEW, "max_tokens": 1, "request_id": "a"})
    [camel] = curl.ask("Generate", {**REVIEW, "maxTokens": "1", "requestId": "a"})
    assert snake["outputs"] == camel["outputs"]
    assert snake["maxTokens"] == camel["maxTokens"] == 1


def test_a_stream_joins_to_the_whole(curl: Curl) -> None:
    # 200 tokens: an engine that is faster than its clients has several for each piece, on a busy machine 20 of them
    asked = {"mode": "MODE_COT", "instruction": "Take the last letters of Paul Maria and join them.", "minTokens": 200}
    [whole] = curl.ask("Generate", asked)
    *deltas, final = curl.ask("GenerateStream", asked)
    assert len(deltas) > 1
    assert "".join(event["delta"].get("text", "") for event in deltas) == whole["outputs"][0]["text"]
    assert [event["delta"].get("finishReason") for event in deltas] == [None] * (len(deltas) - 1) + [
        "FINISH_REASON_STOP"
    ]
    assert final["final"]["usage"] == whole["usage"]
    assert final["final"]["answer"] == whole["answer"]


def test_many_requests_over_one_call(curl: Curl) -> None:
    bad = {"instruction": "x", "temperature": 9, "requestId": "bad"}
    answers = curl.ask("GenerateMany", *({**REVIEW, "requestId": f"r{i}"} for i in range(5)), bad)
    found = {answer["requestId"]: answer for answer in answers}
    assert found.keys() == {"r0", "r1", "r2", "r3", "r4", "bad"}
    assert found.pop("bad")["error"]["field"] == "temperature"
    assert {answer["response"]["outputs"][0]["text"] for answer in found.values()} == {"positive"}


def test_score(curl: Curl) -> None:
    [answer] = curl.ask("Score", {**REVIEW, "candidates": ["negative", "positive"]})
    assert answer["best"] == 1
    assert sum(candidate["probability"] for candidate in answer["candidates"]) == pytest.approx(1)
    assert all(candidate["logprob"] < 0 < candidate["numTokens"] for candidate in answer["candidates"])


def test_tokenize(curl: Curl) -> None:
    [answer] = curl.ask("Tokenize", {"text": "the {cat}"})
    assert answer["numTokens"] == len(answer["tokenIds"])
    assert answer["unknownTokens"] == 2
    [bare] = curl.ask("Tokenize", {"text": "the {cat}", "addSpecialTokens": False})
    assert bare["tokenIds"] == answer["tokenIds"][:-1]


def test_get_model(curl: Curl) -> None:
    [answer] = curl.ask("GetModel", {})
    assert (answer["id"], answer["runtime"], answer["maxInputTokens"]) == ("flan-demo", "torch", 2048)
    assert answer["modes"] == ["MODE_RAW", "MODE_INSTRUCTION", "MODE_FEW_SHOT", "MODE_COT"]


def test_health(curl: Curl) -> None:
    for service in ("", "flan.v1.FlanService"):
        done = curl.run("/grpc.health.v1.Health/Check", {"service": service})
        assert json.loads(done.stdout) == {"status": "SERVING"}
    done = curl.run("/grpc.health.v1.Health/Check", {"service": "other"})
    assert done.returncode >> 3 == NOT_FOUND


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
def test_errors_name_their_field_in_the_details(curl: Curl, method: str) -> None:
    code, error = curl.refused(method, {"instruction": "x", "temperature": 3})
    assert (code, error["code"]) == (INVALID_ARGUMENT, "invalid_argument")
    assert "temperature" in error["message"]
    assert {"google.rpc.BadRequest", "google.rpc.ErrorInfo"} == {detail["type"] for detail in error["details"]}
    code, error = curl.refused(method, {"instruction": "x", "model": "gpt-4"})
    assert (code, error["code"]) == (NOT_FOUND, "not_found")


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "GenerateMany", "Score", "Tokenize", "GetModel"])
def test_every_method_needs_the_key(guarded: Curl, method: str) -> None:
    """Told by a client that has the schema from elsewhere, for reflection needs the key, too."""
    schema = ("--schema", str(Path(__file__).parent.parent.parent / "protos"))
    for header in ((), ("-H", "authorization: Bearer wrong"), ("-H", f"authorization: Basic {KEY}")):
        code, error = guarded.refused(method, {}, options=(*guarded.options[:2], *schema, *header))
        assert (code, error["code"]) == (UNAUTHENTICATED, "unauthenticated")
        assert KEY not in json.dumps(error)


def test_reflection_needs_the_key_and_health_does_not(guarded: Curl) -> None:
    ca = guarded.options[:2]
    done = guarded.run("/flan.v1.FlanService/GetModel", {}, options=(*ca, "-H", f"authorization: Bearer {KEY}"))
    assert (done.returncode, done.stdout) == (1, "")
    done = guarded.run(
        "/grpc.health.v1.Health/Check", {}, options=(*ca, "--reflect-header", f"authorization: Bearer {KEY}")
    )
    assert json.loads(done.stdout) == {"status": "SERVING"}


def test_a_certificate_that_nobody_vouches_for_is_refused(guarded: Curl) -> None:
    schema = ("--schema", str(Path(__file__).parent.parent.parent / "protos"))
    done = guarded.run("/flan.v1.FlanService/GetModel", {}, options=(*guarded.options[2:4], *schema))
    assert done.returncode != 0
    assert "certificate" in done.stderr
    done = guarded.run("/flan.v1.FlanService/GetModel", {}, options=(*guarded.options[2:4], *schema, "--insecure"))
    assert json.loads(done.stdout)["id"] == "flan-demo"
