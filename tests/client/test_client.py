"""FlanClient and AsyncFlanClient over both transports: the same API and the same results."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Any

import pytest

from serve.client import (
    AsyncCompletionStream,
    AsyncFlanClient,
    AsyncManyResults,
    CompletionStream,
    FlanClient,
    ManyResults,
    TlsFiles,
)
from serve.client.calls import DEFAULT_MAX_BODY_MIB
from serve.config import Settings
from serve.errors import Unavailable
from serve.request import Exemplar, Mode
from tests.client.harness import TRANSPORTS, async_client, served, timeless
from tests.rpc.certificates import make_certificates

REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"instruction": "x"},
    "everything": {
        "mode": Mode.FEW_SHOT,
        "instruction": "Is it so?",
        "input": "the cat",
        "options": ("yes", "no"),
        "exemplars": [Exemplar("the dog", "no"), {"input": "one", "output": "yes", "rationale": "so"}],
        "model": "default",
        "debug": True,
        "max_tokens": 10**12,
        "min_tokens": 0,
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 3,
        "repetition_penalty": 1.1,
        "seed": -(2**63),
        "n": 3,
        "stop": "is",
        "logprobs": 2,
        "ignore_eos": False,
        "skip_special_tokens": True,
        "logit_bias": {4: -1.5, 5: 100},
    },
    "length": {"instruction": "x", "max_tokens": 2},
    "stop list": {"instruction": "x", "stop": ["nothing", "answer"]},
    "votes": {"instruction": "x", "mode": "cot", "samples": 4, "answer_format": "number"},
    "votes with logprobs": {"instruction": "x", "mode": "cot", "samples": 3, "logprobs": 1},
    "unknown pieces": {"instruction": "a ~ b \u2028 {}", "mode": "raw"},
}
SAYINGS = ("hello world, so the answer is 5. The answer is 5.", "the answer is four", "The answer is 7. no")


@pytest.mark.parametrize("name", REQUESTS)
async def test_both_transports_and_both_clients_give_the_same(name: str) -> None:
    fields = REQUESTS[name] | {"request_id": "same"}
    async with served(*SAYINGS) as s:
        results = []
        for transport in TRANSPORTS:
            async with async_client(s, transport) as client:
                whole = await client.generate(**fields)
                async with client.stream(**fields) as stream:
                    deltas = [delta async for delta in stream]
                results += [whole, stream.completion]
                for output in whole.outputs:
                    pieces = [delta for delta in deltas if delta.index == output.index]
                    assert "".join(delta.text for delta in pieces) == output.text
                    assert pieces[-1].finish_reason == output.finish_reason

            def synchronous(url: str) -> list[Any]:
                with FlanClient(url) as client:
                    stream = client.stream(**fields)
                    list(stream)
                    return [client.generate(**fields), stream.completion]

            results += await asyncio.to_thread(synchronous, s.urls[transport])
        assert len(results) == 8
        first, *others = map(timeless, results)
        assert [other == first for other in others] == [True] * 7
        assert first.request_id == "same"
        prompts = {prepared.prompts for prepared in s.runtime.requests}
        assert len(prompts) == 1
        assert len({repr(prepared.sampling) for prepared in s.runtime.requests}) == 1


async def test_all_of_a_completion_arrives() -> None:
    async with served(*SAYINGS) as s:
        for transport in TRANSPORTS:
            async with async_client(s, transport) as client:
                votes = await client.generate(**REQUESTS["votes with logprobs"])
                assert votes.votes[0].count >= 1
                assert votes.tie is not None
                assert votes.outputs[0].rationale is not None
                assert votes.outputs[0].logprobs is not None
                assert len(votes.outputs[0].logprobs[0].top) == 1
                everything = await client.generate(**REQUESTS["everything"])
                assert (everything.max_tokens, everything.exemplars_used) == (512, 2)
                assert everything.prompt is not None
                assert everything.stop is not None
                assert "is" in everything.stop
                assert everything.outputs[0].stop_reason == "is"
                unknown = await client.generate(**REQUESTS["unknown pieces"])
                assert unknown.usage.unknown_tokens > 0
                assert unknown.timings.first_token_ms is not None
                assert unknown.created > 1_700_000_000


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_score_tokenize_model_health(transport: str) -> None:
    async with served("yes") as s, async_client(s, transport) as client:
        scores = await client.score("x", ["yes no", "no"], mode=Mode.RAW, request_id="mine")
        assert (scores.request_id, scores.best, [c.text for c in scores.candidates]) == ("mine", 1, ["yes no", "no"])
        assert sum(candidate.probability for candidate in scores.candidates) == pytest.approx(1.0)
        whole, bare = await client.tokenize("hello"), await client.tokenize("hello", add_special_tokens=False)
        assert whole.token_ids == (*bare.token_ids, 1)
        model = await client.model()
        assert (model.id, model.max_input_tokens, model.modes[0]) == ("scripted", 2048, "raw")
        assert await client.health()

        def synchronous() -> list[Any]:
            with FlanClient(s.urls[transport]) as twin:
                same = twin.score("x", ["yes no", "no"], mode="raw", request_id="mine")
                return [timeless(same), twin.tokenize("hello"), twin.model(), twin.health()]

        assert await asyncio.to_thread(synchronous) == [timeless(scores), whole, model, True]


async def test_both_transports_score_the_same() -> None:
    async with served("yes") as s:
        results = []
        for transport in TRANSPORTS:
            async with async_client(s, transport) as client:
                results.append(
                    (timeless(await client.score("x", ["yes", "no no"], request_id="r")), await client.model())
                )
        assert results[0] == results[1]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_tls_with_certificates_on_both_sides(transport: str, certificates: Path, tmp_path: Path) -> None:
    def file(name: str) -> str:
        return str(certificates / name)

    options: dict[str, Any] = {
        "tls_cert": file("server.pem"),
        "tls_key": file("server.key"),
        "tls_client_ca": file("ca.pem"),
    }
    async with served("yes", **options) as s:
        tls = TlsFiles(ca=file("ca.pem"), cert=file("client.pem"), key=file("client.key"))
        async with async_client(s, transport, tls=tls) as client:
            assert (await client.generate("x")).outputs[0].text == "yes"
            assert [result.error async for result in client.generate_many([{"instruction": "x"}] * 3)] == [None] * 3

        def synchronous(tls: TlsFiles) -> list[Any]:
            with FlanClient(s.urls[transport], tls=tls) as twin:
                return [twin.generate("x").outputs[0].text, *twin.generate_many([{"instruction": "x"}] * 3)]

        text, *results = await asyncio.to_thread(synchronous, tls)
        assert (text, [result.error for result in results]) == ("yes", [None] * 3)
        joined = tmp_path / "both.pem"
        joined.write_bytes(b"".join((certificates / name).read_bytes() for name in ("client.pem", "client.key")))
        text, *_ = await asyncio.to_thread(synchronous, TlsFiles(ca=file("ca.pem"), cert=str(joined)))
        assert text == "yes"
        async with async_client(s, transport, tls=TlsFiles(ca=file("ca.pem")), max_retries=0) as client:
            with pytest.raises(Unavailable):
                await client.generate("x", timeout=5)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_many_at_once(transport: str) -> None:
    async with served("hello world") as s, async_client(s, transport) as client:
        completions = await asyncio.gather(*(client.generate("x", request_id=f"r{n}") for n in range(150)))
        assert [completion.request_id for completion in completions] == [f"r{n}" for n in range(150)]
        assert {completion.outputs[0].text for completion in completions} == {"hello world"}


def test_the_default_limit_is_the_servers() -> None:
    assert Settings().max_body_mib == DEFAULT_MAX_BODY_MIB


def test_the_twins_have_the_same_methods() -> None:
    def methods(client: type) -> dict[str, list[str]]:
        members = inspect.getmembers(client, inspect.isfunction)
        return {name: list(inspect.signature(member).parameters) for name, member in members if name[0] != "_"}

    assert methods(FlanClient) == methods(AsyncFlanClient)
    expected = {"generate", "stream", "generate_many", "score", "tokenize", "model", "health", "close"}
    assert expected == set(methods(FlanClient))
    assert inspect.signature(FlanClient) == inspect.signature(AsyncFlanClient)
    assert methods(CompletionStream) == methods(AsyncCompletionStream) == {"close": ["self"]}
    assert methods(ManyResults) == methods(AsyncManyResults) == {"close": ["self"]}
