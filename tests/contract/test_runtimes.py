"""What every runtime promises, asked of each in the same words (serve.runtimes.base, SPEC 2, 3 and 6)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from serve.errors import EngineFailure
from serve.output import FinishReason
from tests.contract.cases import CASES, EOS, Served, collect, ids_of, request, scoring, started

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=CASES)
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with started(request.param, tmp_path_factory.mktemp("model")) as one:
        yield one


async def test_streams_every_sequence_to_its_end(served: Served) -> None:
    stream = served.runtime.generate(request(*served.prompts(5, 9), n=3, max_tokens=8))
    await stream.started()
    deltas = await collect(stream)
    assert sorted(deltas) == list(range(6))
    for parts in deltas.values():
        assert len(ids_of(parts)) == 8
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [FinishReason.LENGTH]
    assert len({ids_of(deltas[index]) for index in range(3)}) == 1, "greedy samples are alike"


async def test_greedy_is_transformers_alone_and_in_a_crowd(served: Served) -> None:
    prompts = served.prompts(2, 3, 17, 40, 90)
    expected = [served.greedy(prompt, 24) for prompt in prompts]
    assert all(len(set(text)) > 5 for text in expected), "the model says too little to tell anything"
    alone = [(await served.texts(prompt, max_tokens=24))[0] for prompt in prompts]
    crowd = await asyncio.gather(*(served.texts(prompt, max_tokens=24) for prompt in prompts))
    assert alone == expected
    assert [texts[0] for texts in crowd] == expected


async def test_a_seed_means_the_same_text_whatever_runs_beside_it(served: Served) -> None:
    [prompt, *others] = served.prompts(6, 11, 20, 31)
    asked = {"temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 16}
    alone = await served.texts(prompt, **asked)
    crowd = asyncio.gather(*(served.texts(other, temperature=1.0, max_tokens=30) for other in others))
    assert await served.texts(prompt, **asked) == alone
    await crowd
    assert len(set(alone)) == 3
    assert await served.texts(prompt, **{**asked, "seed": 8}) != alone
    assert (await served.texts(prompt, **{**asked, "n": 1}))[0] == alone[0]


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1, -1])
async def test_every_64_bit_seed_is_one(served: Served, seed: int) -> None:
    [prompt] = served.prompts(6)
    texts = [(await served.texts(prompt, temperature=1.0, seed=seed))[0] for _ in range(2)]
    assert texts[0] == texts[1]


async def test_unseeded_requests_differ(served: Served) -> None:
    [prompt] = served.prompts(6)
    texts = await asyncio.gather(*(served.texts(prompt, temperature=1.5, max_tokens=20) for _ in range(3)))
    assert len({text[0] for text in texts}) == 3


async def test_top_k_of_one_is_greedy(served: Served) -> None:
    [prompt] = served.prompts(6)
    assert await served.texts(prompt, temperature=1.0, top_k=1) == await served.texts(prompt)
    assert await served.texts(prompt, temperature=1.0, top_p=1e-6) == await served.texts(prompt)


async def test_eos_ends_a_sequence_and_is_in_it(served: Served) -> None:
    [prompt] = served.prompts(6)
    asked = request(prompt, ignore_eos=False, logit_bias={EOS: 100.0}, logprobs=0)
    deltas = (await collect(served.runtime.generate(asked)))[0]
    assert ids_of(deltas) == (EOS,)
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert sum(len(delta.logprobs) for delta in deltas) == 1


async def test_ignore_eos_makes_it_an_ordinary_token(served: Served) -> None:
    [prompt] = served.prompts(6)
    assert await served.texts(prompt, ignore_eos=True, logit_bias={EOS: 100.0}, max_tokens=5) == [(EOS,) * 5]
    texts = await served.texts(prompt, ignore_eos=True, logit_bias={EOS: 100.0}, max_tokens=5, min_tokens=3)
    assert texts == [(EOS,) * 5]


async def test_min_tokens_holds_eos_back(served: Served) -> None:
    [prompt] = served.prompts(6)
    [text] = await served.texts(prompt, ignore_eos=False, logit_bias={EOS: 100.0}, min_tokens=3)
    assert text.index(EOS) == 3
    assert len(text) == 4


async def test_logit_bias(served: Served) -> None:
    [prompt] = served.prompts(6)
    assert await served.texts(prompt, logit_bias={77: 100.0}, max_tokens=4) == [(77,) * 4]
    [plain] = await served.texts(prompt)
    [without] = await served.texts(prompt, logit_bias={plain[0]: -100.0})
    assert plain[0] not in without


async def test_the_repetition_penalty_is_over_generated_tokens_only(served: Served) -> None:
    prompt = (*served.prompts(30)[0][:-1], *served.greedy(served.prompts(30)[0], 6), EOS)
    prompt = prompt[:-1] if served.is_causal else prompt
    expected = served.greedy(prompt, 20, penalty=0.5)
    assert expected != served.greedy(prompt, 20), "the penalty changes nothing here"
    assert await served.texts(prompt, repetition_penalty=0.5, max_tokens=20) == [expected]


async def test_logprobs_are_the_models(served: Served) -> None:
    [prompt] = served.prompts(8)
    deltas = (await collect(served.runtime.generate(request(prompt, logprobs=3))))[0]
    text = ids_of(deltas)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.token_id for entry in entries] == list(text)
    expected = served.logits(prompt, text).log_softmax(-1)
    for place, entry in enumerate(entries):
        best = expected[place].topk(3)
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=2e-3)
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=2e-3)
        assert entry.top[0][0] == int(best.indices[0])


async def test_logprobs_of_zero_have_no_alternatives(served: Served) -> None:
    [prompt] = served.prompts(8)
    deltas = (await collect(served.runtime.generate(request(prompt, logprobs=0))))[0]
    assert all(entry.top == () for delta in deltas for entry in delta.logprobs)
    plain = (await collect(served.runtime.generate(request(prompt))))[0]
    assert all(delta.logprobs == () for delta in plain)


async def test_the_score_of_a_greedy_text_is_the_sum_of_its_logprobs(served: Served) -> None:
    [prompt] = served.prompts(12)
    deltas = (await collect(served.runtime.generate(request(prompt, logprobs=0, max_tokens=9))))[0]
    made = math.fsum(entry.logprob for delta in deltas for entry in delta.logprobs)
    [(score, count)] = await served.runtime.score(scoring(prompt, ids_of(deltas)))
    assert count == 9
    assert score == pytest.approx(made, abs=1e-2)


async def test_scores_do_not_depend_on_order_or_number(served: Served) -> None:
    prompt, *candidates = served.prompts(12, 1, 3, 8, 20)
    together = await served.runtime.score(scoring(prompt, *candidates))
    reverse = await served.runtime.score(scoring(prompt, *reversed(candidates)))
    [alone] = await served.runtime.score(scoring(prompt, candidates[2]))
    for candidate, (value, count), (again, _) in zip(candidates, together, reversed(reverse), strict=True):
        logprobs = served.logits(prompt, candidate).log_softmax(-1)
        expected = sum(float(logprobs[place, token_id]) for place, token_id in enumerate(candidate))
        assert count == len(candidate)
        assert value == pytest.approx(expected, abs=1e-2)
        assert again == pytest.approx(value, abs=1e-3)
    assert alone[0] == pytest.approx(together[2][0], abs=1e-3)


async def test_one_request_id_may_be_used_twice_at_once(served: Served) -> None:
    [prompt] = served.prompts(6)
    one, two = await asyncio.gather(*(collect(served.runtime.generate(request(prompt, name="same"))) for _ in "ab"))
    assert ids_of(one[0]) == ids_of(two[0])


async def test_finish_ends_one_sequence_and_no_other(served: Served) -> None:
    [prompt] = served.prompts(6)
    stream = served.runtime.generate(request(prompt, n=3, max_tokens=60))
    deltas: dict[int, list[int]] = {}
    finished = False
    async for delta in stream:
        assert not (finished and delta.index == 1), "more of a sequence that was ended"
        deltas.setdefault(delta.index, []).extend(delta.token_ids)
        if delta.index == 1 and not finished:
            stream.finish(1)
            finished = True
    assert finished
    [alone] = await served.texts(prompt, max_tokens=60)
    assert tuple(deltas[0]) == tuple(deltas[2]) == alone
    await idle(served)


async def test_closing_a_stream_frees_its_room(served: Served) -> None:
    [prompt] = served.prompts(6)
    stream = served.runtime.generate(request(prompt, n=4, max_tokens=400))
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await idle(served)


async def test_a_stream_that_nobody_holds_ends(served: Served) -> None:
    [prompt] = served.prompts(6)
    stream = served.runtime.generate(request(prompt, n=2, max_tokens=400))
    await anext(stream)
    del stream
    await idle(served)


async def test_a_cancelled_score_leaves_nothing(served: Served) -> None:
    prompt, candidate = served.prompts(40, 100)
    task = asyncio.ensure_future(served.runtime.score(scoring(prompt, *([candidate] * 20))))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(served)
    assert len((await served.texts(prompt))[0]) == 12


@pytest.mark.parametrize("prompt", [(10**6,), ()])
async def test_a_prompt_that_cannot_run_ends_alone(served: Served, prompt: tuple[int, ...]) -> None:
    good = asyncio.ensure_future(served.texts(*served.prompts(6), max_tokens=30))
    stream = served.runtime.generate(request(prompt))
    await stream.started()
    [delta] = (await collect(stream))[0]
    assert delta.finish_reason is FinishReason.ERROR
    assert delta.error
    assert await good == [served.greedy(served.prompts(6)[0], 30)]
    with pytest.raises(EngineFailure):
        await served.runtime.score(scoring(prompt, (5, 6)))
    assert served.runtime.health() is None


async def test_the_loop_stays_free(served: Served) -> None:
    prompts = served.prompts(*([60] * 8))
    running = asyncio.ensure_future(served.texts(*prompts, max_tokens=20))
    loop, worst = asyncio.get_running_loop(), 0.0
    while not running.done():
        before = loop.time()
        await asyncio.sleep(0.005)
        worst = max(worst, loop.time() - before)
    assert worst < 0.5
    await running


async def test_steps_are_reported(served: Served) -> None:
    served.stats.clear()
    await served.texts(*served.prompts(20, 30, seed=5), max_tokens=10)  # prompts that no cache knows
    await asyncio.sleep(0.1)
    assert sum(step.encode_tokens for step in served.stats) == 50
    assert max(step.decode_sequences for step in served.stats) == 2
    assert all(0.0 <= share <= 1.0 for step in served.stats for _, share in step.cache_usage)


async def test_health_after_the_others(served: Served) -> None:
    assert served.runtime.health() is None
    info = served.runtime.info
    assert info.runtime == served.name.partition("+")[0]
    assert info.is_encoder_decoder is not served.is_causal
    assert (info.dtype, info.device) == ("float32", "cpu")


async def idle(served: Served) -> None:
    """Wait until a step is reported that leaves nothing running. A short request makes one if none comes by itself."""
    async with asyncio.timeout(30):
        while True:
            served.stats.clear()
            await served.texts(*served.prompts(4), max_tokens=2)
            await asyncio.sleep(0.05)
            if served.stats and served.stats[-1].sequences_running <= int(served.is_vllm):
                return


async def test_stopping_fails_waiters_and_newcomers(served: Served) -> None:
    """The last one: it stops the runtime."""
    [prompt] = served.prompts(6)
    stream = served.runtime.generate(request(prompt, max_tokens=400))
    await anext(stream)
    await served.runtime.stop()
    await served.runtime.stop()
    with pytest.raises(EngineFailure, match="stopped"):
        await collect(stream)
    assert served.runtime.health() is not None
    with pytest.raises(EngineFailure):
        await anext(served.runtime.generate(request(prompt)))
    with pytest.raises(EngineFailure):
        await served.runtime.score(scoring(prompt, (5,)))
