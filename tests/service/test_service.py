"""A request's path over a scripted runtime: text, answers, votes, usage. (Under load: test_service_load.)"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import DeadlineExceeded, EngineFailure, InvalidRequest, NotFound, ServeError, Unavailable
from serve.metrics import Metrics, Protocol, RequestTracker, Route
from serve.output import Completion, FinishReason, TextDelta
from serve.request import Exemplar, GenerateRequest, Mode, ScoreRequest
from serve.response_stream import ResponseStream
from serve.sampling_params import SamplingFields
from serve.service import Service, ServiceSettings
from tests.service.scripted_runtime import EOS, ScriptedRuntime, scripted_service
from tests.service.test_metrics import outcomes, value
from tests.service.toy_tokenizers import byte_level, t5_like

TOKENIZER = t5_like()


def tracker_of(service: Service, route: Route = Route.GENERATE) -> RequestTracker:
    return service.metrics.track(Protocol.REST, route)


async def streamed(service: Service, request: GenerateRequest) -> tuple[list[TextDelta], Completion]:
    stream = await service.open(request, tracker_of(service))
    try:
        return [delta async for delta in stream], stream.completion
    finally:
        await stream.aclose()


async def collect(stream: ResponseStream, deltas: list[TextDelta]) -> None:
    """Read the stream into `deltas`, which has what came also when the stream raises."""
    async for delta in stream:
        deltas.append(delta)  # noqa: PERF401


async def generated(service: Service, **fields: Any) -> Completion:
    fields.setdefault("instruction", "yes or no?")
    return await service.generate(GenerateRequest(**fields), tracker_of(service))


def sampling(**fields: Any) -> SamplingFields:
    return SamplingFields(**fields)


@pytest.fixture
async def runtime() -> ScriptedRuntime:
    return ScriptedRuntime()


@pytest.fixture
async def service(runtime: ScriptedRuntime) -> AsyncIterator[Service]:
    service = scripted_service(runtime=runtime)
    yield service
    assert runtime.num_running == 0
    assert service.admission.slots_used == 0
    await service.close()


class TestText:
    @pytest.mark.parametrize("mode", list(Mode))
    async def test_the_joined_pieces_are_the_text(self, service: Service, runtime: ScriptedRuntime, mode: Mode) -> None:
        runtime.say(TOKENIZER, "so two and two. The answer is 4. Q: one", "no")
        request = GenerateRequest(
            mode=mode, instruction="yes?", sampling=sampling(n=2, stop=("e c",), logprobs=1, temperature=1.0)
        )
        deltas, completion = await streamed(service, request)
        unary = await service.generate(request, tracker_of(service))
        for index, output in enumerate(completion.outputs):
            own = [delta for delta in deltas if delta.index == index]
            assert "".join(delta.text for delta in own) == output.text == unary.outputs[index].text
            assert tuple(i for delta in own for i in delta.token_ids) == output.token_ids
            assert tuple(entry for delta in own for entry in delta.logprobs) == output.logprobs
            assert [delta.finish_reason for delta in own[:-1]] == [None] * (len(own) - 1)
            assert own[-1].finish_reason == output.finish_reason
            assert own[-1].stop_reason == output.stop_reason
        assert completion.outputs == unary.outputs
        assert completion.usage == unary.usage

    async def test_eos_ends_with_stop(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "Paris")
        completion = await generated(service)
        [output] = completion.outputs
        assert (output.text, output.finish_reason, output.stop_reason) == ("Paris", FinishReason.STOP, None)
        assert output.logprobs is None
        assert completion.usage.completion_tokens == 2  # EOS is a token that was made
        assert completion.usage.prompt_tokens == len(TOKENIZER.encode("yes or no?"))
        assert (completion.model, completion.mode, completion.max_tokens) == ("scripted", "instruction", 256)
        assert completion.request_id.startswith("req-")

    @pytest.mark.parametrize(("extra", "reason"), [(-1, "length"), (0, "length"), (1, "stop")])
    async def test_max_tokens(self, service: Service, runtime: ScriptedRuntime, extra: int, reason: str) -> None:
        runtime.say(TOKENIZER, "yes no yes no")
        completion = await generated(service, sampling=sampling(max_tokens=4 + extra))
        assert completion.outputs[0].finish_reason == reason
        assert completion.outputs[0].text == "yes no yes no"[: 13 if extra >= 0 else 10]
        assert completion.max_tokens == 4 + extra

    async def test_a_larger_max_tokens_is_clamped_and_told(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.script = [5]
        completion = await generated(service, sampling=sampling(max_tokens=10_000))
        assert (completion.max_tokens, completion.usage.completion_tokens) == (512, 512)

    async def test_a_stop_string_ends_the_sequence_and_its_room(
        self, service: Service, runtime: ScriptedRuntime
    ) -> None:
        runtime.say(TOKENIZER, "yes so the answer is no and no and no")
        completion = await generated(service, sampling=sampling(stop=("swer i",), logprobs=0))
        [output] = completion.outputs
        assert (output.text, output.finish_reason, output.stop_reason) == ("yes so the an", "stop", "swer i")
        # Tokens, logprobs and usage count up to and including the token that completed the stop string.
        assert output.token_ids == TOKENIZER.encode("yes so the answer is", add_special_tokens=False)
        assert output.logprobs is not None
        assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)
        assert completion.usage.completion_tokens == len(output.token_ids)
        assert runtime.tokens_made <= len(output.token_ids) + 1

    async def test_text_held_back_comes_at_the_end(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "yes the")
        deltas, completion = await streamed(
            service, GenerateRequest(instruction="yes", sampling=sampling(stop=("the end",)))
        )
        assert completion.outputs[0].text == "yes the"
        assert [delta.text for delta in deltas] == ["yes", " ", "the"]
        assert deltas[-1].finish_reason == "stop"
        assert deltas[-1].stop_reason is None

    async def test_special_tokens_show_only_when_asked(self, service: Service, runtime: ScriptedRuntime) -> None:
        sentinel = TOKENIZER.size - 1
        runtime.script = [*TOKENIZER.encode("yes", add_special_tokens=False), 0, 2, sentinel, EOS]
        hidden = (await generated(service)).outputs[0].text
        shown = (await generated(service, sampling=sampling(skip_special_tokens=False))).outputs[0].text
        assert (hidden, shown) == ("yes", "yes<pad><unk><extra_id_0></s>")

    async def test_ignore_eos_goes_on(self, service: Service, runtime: ScriptedRuntime) -> None:
        yes = TOKENIZER.encode("yes", add_special_tokens=False)[0]
        runtime.script = [yes, EOS, yes]
        completion = await generated(service, sampling=sampling(ignore_eos=True, max_tokens=5, logprobs=0))
        assert completion.outputs[0].token_ids == (yes, EOS, yes, yes, yes)
        assert completion.outputs[0].text == "yes yes yes yes"
        assert completion.outputs[0].finish_reason == "length"

    async def test_logprobs_have_texts_and_are_finite(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "yes")
        runtime.logprob = lambda index: -float("inf")
        completion = await generated(service, sampling=sampling(logprobs=2))
        logprobs = completion.outputs[0].logprobs
        assert logprobs is not None
        assert [(entry.text, entry.logprob) for entry in logprobs] == [(" yes", -9999.0), ("</s>", -9999.0)]
        assert [len(entry.top) for entry in logprobs] == [2, 2]
        assert logprobs[0].top[0].text == TOKENIZER.token_text(3)
        runtime.logprob = lambda index: float("nan")
        completion = await generated(service, sampling=sampling(logprobs=0))
        assert [entry.logprob for entry in completion.outputs[0].logprobs or ()] == [-9999.0, -9999.0]

    async def test_a_list_of_prompts_times_n(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "yes", "no", "one", "two")
        completion = await generated(
            service, instruction=None, mode=Mode.RAW, prompts=("a", "b"), sampling=sampling(n=2)
        )
        assert [output.text for output in completion.outputs] == ["yes", "no", "one", "two"]
        assert [output.index for output in completion.outputs] == [0, 1, 2, 3]
        assert completion.usage.prompt_tokens == 2 * len(TOKENIZER.encode("a"))

    async def test_an_unfinished_character_at_the_end_is_dropped(self) -> None:
        tokenizer = byte_level()
        runtime = ScriptedRuntime(list(tokenizer.encode("a😀")), eos_id=tokenizer.eos_id or 0, is_encoder_decoder=False)
        service = scripted_service(runtime=runtime, tokenizer=tokenizer)
        deltas, completion = await streamed(service, GenerateRequest(instruction="x", sampling=sampling(max_tokens=3)))
        assert completion.outputs[0].text == "a"
        assert not any("\ufffd" in delta.text for delta in deltas)
        await service.close()

    async def test_debug_shows_prompt_and_stop_list(self, service: Service, runtime: ScriptedRuntime) -> None:
        completion = await generated(service, input="a", debug=True, sampling=sampling(stop=("x",)))
        assert (completion.prompt, completion.stop) == ("yes or no?\n\na", ("x",))
        plain = await generated(service, input="a", sampling=sampling(stop=("x",)))
        assert (plain.prompt, plain.stop) == (None, None)

    async def test_exemplars_are_counted(self, service: Service) -> None:
        exemplars = tuple(Exemplar(f"{n} " + "cat " * 300, "dog") for n in range(10))
        completion = await generated(service, mode=Mode.FEW_SHOT, exemplars=exemplars)
        assert completion.exemplars_used + completion.exemplars_dropped == 10
        assert completion.exemplars_dropped > 0
        assert value(service.metrics, "flan_exemplars_dropped_total") == completion.exemplars_dropped

    async def test_timings(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "yes no")
        runtime.start_seconds, runtime.pace_seconds = 0.03, 0.01
        timings = (await generated(service)).timings
        assert timings.first_token_ms is not None
        assert 30 <= timings.queue_ms < timings.first_token_ms < timings.total_ms < 2000

    @given(data=st.data())
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_stream_equals_unary_for_anything(self, data: st.DataObject) -> None:
        words = TOKENIZER.encode("The answer is 4. 5 the answer is yes. no.", add_special_tokens=False)
        ids = st.lists(st.one_of(st.sampled_from(words), st.integers(0, TOKENIZER.size - 1)), max_size=25)
        scripts = data.draw(st.lists(ids, min_size=1, max_size=3))
        request = GenerateRequest(
            mode=data.draw(st.sampled_from(list(Mode))),
            instruction="yes",
            sampling=sampling(
                n=3,
                temperature=1.0,
                stop=tuple(data.draw(st.lists(st.text("ais. e", min_size=1, max_size=4), max_size=3))),
                min_tokens=data.draw(st.integers(0, 5)),
                max_tokens=data.draw(st.integers(5, 30)),
                skip_special_tokens=data.draw(st.booleans()),
                ignore_eos=data.draw(st.booleans()),
                logprobs=data.draw(st.sampled_from([None, 0, 2])),
            ),
        )

        async def run(tokens_per_delta: int) -> tuple[list[TextDelta], Completion]:
            runtime = ScriptedRuntime([[*script, EOS] for script in scripts], tokens_per_delta=tokens_per_delta)
            service = scripted_service(runtime=runtime)
            deltas, completion = await streamed(service, request)
            assert runtime.num_running == 0
            await service.close()
            return deltas, completion

        one, merged = asyncio.run(run(1)), asyncio.run(run(7))
        assert one[1].outputs == merged[1].outputs  # however many tokens a delta carries
        assert one[1].usage == merged[1].usage
        for deltas, completion in (one, merged):
            for output in completion.outputs:
                assert "".join(d.text for d in deltas if d.index == output.index) == output.text
                if output.logprobs is not None:
                    assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)
            assert completion.usage.completion_tokens == sum(len(output.token_ids) for output in completion.outputs)


class TestChainOfThought:
    async def test_the_first_answer_wins_and_the_rest_is_cut(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "so two and two. The answer is 12. Q: one? The answer is 7.")
        deltas, completion = await streamed(
            service, GenerateRequest(mode=Mode.COT, instruction="two?", sampling=sampling(logprobs=0))
        )
        [output] = completion.outputs
        assert output.text == "so two and two. The answer is 12."
        assert (output.rationale, output.answer, completion.answer) == ("so two and two.", "12", "12")
        assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, None)
        assert "".join(delta.text for delta in deltas) == output.text
        # It ended early: the token after the full stop is the last one that was made for it.
        assert runtime.tokens_made <= len(output.token_ids) + 1
        assert completion.usage.completion_tokens == len(output.token_ids)
        assert len(output.logprobs or ()) == len(output.token_ids)

    async def test_no_marker_no_answer(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "so 4 and 5 is 7")
        completion = await generated(service, mode=Mode.COT)
        assert (completion.answer, completion.outputs[0].rationale) == (None, "so 4 and 5 is 7")
        number = await generated(service, mode=Mode.COT, answer_format="number")
        assert number.answer == "7"

    async def test_a_marker_beats_a_later_number(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "The answer is 4. so 5")
        assert (await generated(service, mode=Mode.COT, answer_format="number")).answer == "4"

    async def test_other_modes_are_not_taken_apart(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "The answer is 4. The answer is 5.")
        completion = await generated(service)
        assert completion.outputs[0].text == "The answer is 4. The answer is 5."
        assert (completion.answer, completion.outputs[0].answer, completion.outputs[0].rationale) == (None, None, None)
        assert (completion.votes, completion.tie) == ((), None)

    async def test_min_tokens_goes_on_but_shows_nothing_more(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "The answer is 4. so so so so so so")
        completion = await generated(service, mode=Mode.COT, sampling=sampling(min_tokens=8))
        assert completion.outputs[0].text == "The answer is 4."
        assert completion.usage.completion_tokens == 9

    async def test_a_stop_string_inside_the_answer(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "so. The answer is 4 cat. yes")
        completion = await generated(service, mode=Mode.COT, sampling=sampling(stop=(" cat",)))
        assert (completion.outputs[0].text, completion.answer) == ("so. The answer is 4", "4")
        assert completion.outputs[0].stop_reason == " cat"

    async def test_samples_vote(self, service: Service, runtime: ScriptedRuntime) -> None:
        says = ("so. The answer is 7.", "no. The answer is 5.", "The answer is $5.", "yes", "The answer is 5.0.")
        runtime.say(TOKENIZER, *says)
        completion = await generated(service, mode=Mode.COT, samples=5)
        assert (completion.answer, completion.tie) == ("5", False)
        assert [(vote.answer, vote.count) for vote in completion.votes] == [("5", 3), ("7", 1), (None, 1)]
        assert sum(vote.weight for vote in completion.votes) == pytest.approx(1.0)
        # Votes need logprobs; the client asked for none and gets none.
        assert runtime.requests[0].sampling.logprobs == 0
        assert all(output.logprobs is None for output in completion.outputs)
        assert runtime.requests[0].sampling.temperature == 0.7

    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
    async def test_a_tie_and_permutations(
        self, service: Service, runtime: ScriptedRuntime, order: tuple[int, ...]
    ) -> None:
        says = ["The answer is 5.", "The answer is 5.0.", "The answer is 7.", "The answer is 7."]
        values = [-0.5, -0.6, -0.1, -2.0]
        runtime.say(TOKENIZER, *(says[n] for n in order))
        runtime.logprob = lambda index: values[order[index]]
        completion = await generated(service, mode=Mode.COT, samples=4)
        assert (completion.answer, completion.tie) == ("5", True)
        assert [(vote.answer, vote.count) for vote in completion.votes] == [("5", 2), ("7", 2)]

    async def test_all_null(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "yes", "no")
        completion = await generated(service, mode=Mode.COT, samples=2)
        assert (completion.answer, completion.tie) == (None, False)
        assert [(vote.answer, vote.count) for vote in completion.votes] == [(None, 2)]


class TestFaults:
    async def test_one_sequence_fails_the_others_finish(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "yes no", "one two")
        runtime.fail_sequences = {0: 1}
        completion = await generated(service, sampling=sampling(n=2))
        assert [output.finish_reason for output in completion.outputs] == ["error", "stop"]
        assert [output.text for output in completion.outputs] == ["yes", "one two"]
        assert outcomes(service.metrics) == {"error": 1}

    async def test_a_failed_sample_does_not_vote(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "The answer is 4.", "The answer is 5.")
        runtime.fail_sequences = {0: 1}
        completion = await generated(service, mode=Mode.COT, samples=2)
        assert (completion.answer, completion.tie) == ("5", False)
        assert [vote.count for vote in completion.votes] == [1]

    async def test_all_fail(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "yes no")
        runtime.fail_sequences = {0: 1, 1: 0}
        with pytest.raises(EngineFailure, match="scripted fault"):
            await generated(service, sampling=sampling(n=2))
        assert outcomes(service.metrics) == {"error": 1}

    async def test_a_failure_after_some_text(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.say(TOKENIZER, "yes no yes no")
        runtime.fail_at_step = 2
        stream = await service.open(GenerateRequest(instruction="yes"), tracker_of(service))
        deltas: list[TextDelta] = []
        with pytest.raises(EngineFailure):
            await collect(stream, deltas)
        assert [delta.text for delta in deltas] == ["yes", " no"]
        assert [delta async for delta in stream] == []  # told once, then it is over
        with pytest.raises(RuntimeError, match="last delta"):
            _ = stream.completion
        await stream.aclose()

    async def test_a_bug_in_the_runtime_is_an_engine_failure(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.script = lambda request, index: 1 // 0  # type: ignore[assignment, return-value]
        with pytest.raises(EngineFailure, match="internal error") as caught:
            await generated(service)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert outcomes(service.metrics) == {"error": 1}

    async def test_a_runtime_that_ends_early_is_an_engine_failure(
        self, service: Service, runtime: ScriptedRuntime
    ) -> None:
        runtime.script = [5]
        stream = await service.open(GenerateRequest(instruction="yes"), tracker_of(service))
        await anext(stream)
        [tokens] = runtime.open_streams
        tokens.unfinished.clear()
        with pytest.raises(EngineFailure, match="before its last token"):
            await anext(stream)
        await stream.aclose()


class TestRefusals:
    async def test_names_of_models(self, service: Service) -> None:
        for name in (None, "scripted", "default", "tgi", "dummy"):
            await generated(service, model=name)
        with pytest.raises(NotFound, match="scripted") as caught:
            await generated(service, model="gpt-4")
        assert caught.value.field == "model"
        assert outcomes(service.metrics) == {"stop": 5, "invalid": 1}

    async def test_an_invalid_request_never_reaches_the_runtime(
        self, service: Service, runtime: ScriptedRuntime
    ) -> None:
        with pytest.raises(InvalidRequest):
            await service.open(GenerateRequest(instruction=" "), tracker_of(service))
        assert runtime.requests == []
        assert outcomes(service.metrics) == {"invalid": 1}

    async def test_before_the_model_is_loaded(self) -> None:
        service = Service(ServiceSettings(), Metrics())
        request = GenerateRequest(instruction="yes")
        for call in (
            service.generate(request, tracker_of(service)),
            service.score(ScoreRequest(instruction="a", candidates=("b",)), tracker_of(service)),
            service.tokenize("a", tracker=tracker_of(service)),
        ):
            with pytest.raises(Unavailable, match="loading") as caught:
                await call
            assert caught.value.retry_after_seconds is not None
        with pytest.raises(Unavailable):
            service.model_card()
        with pytest.raises(Unavailable):
            service.token_text(3)
        assert (service.readiness(), service.liveness()) == ("loading", None)
        assert value(service.metrics, "flan_engine_up") == 0
        assert outcomes(service.metrics) == {"refused": 3}
        await service.close()

    async def test_a_big_request_is_prepared_off_the_loop(self, service: Service, runtime: ScriptedRuntime) -> None:
        worst, done = 0.0, False

        async def watch() -> None:
            nonlocal worst
            loop = asyncio.get_running_loop()
            while not done:
                before = loop.time()
                await asyncio.sleep(0.005)
                worst = max(worst, loop.time() - before)

        watcher = asyncio.create_task(watch())
        with pytest.raises(InvalidRequest, match="the limit is 2048"):
            await generated(service, instruction="yes " * 200_000)
        done = True
        await watcher
        assert worst < 0.5


class TestScore:
    async def test_scores(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.candidate_logprob = lambda ids: -1.0 if len(ids) > 2 else -2.0
        request = ScoreRequest(instruction="{yes}?", candidates=("no", "yes no"))
        scores = await service.score(request, tracker_of(service, Route.SCORE))
        assert [(c.text, c.logprob, c.num_tokens) for c in scores.candidates] == [("no", -2.0, 2), ("yes no", -1.0, 3)]
        assert scores.best == 1
        assert sum(c.probability for c in scores.candidates) == pytest.approx(1.0)
        assert scores.candidates[1].probability == pytest.approx(0.731, abs=1e-3)
        assert (scores.usage.completion_tokens, scores.usage.unknown_tokens) == (0, 2)
        assert scores.model == "scripted"
        assert outcomes(service.metrics) == {"stop": 1}

    async def test_extreme_sums_stay_finite(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.candidate_logprob = lambda ids: -float("inf") if len(ids) == 2 else -5000.0
        request = ScoreRequest(instruction="a", candidates=("no", "yes no"))
        scores = await service.score(request, tracker_of(service, Route.SCORE))
        assert [c.logprob for c in scores.candidates] == [-9999.0, -5000.0]
        assert [c.probability for c in scores.candidates] == [0.0, 1.0]

    async def test_a_failure(self, service: Service, runtime: ScriptedRuntime) -> None:
        runtime.kill()
        with pytest.raises(ServeError):
            await service.score(ScoreRequest(instruction="a", candidates=("b",)), tracker_of(service, Route.SCORE))
        assert outcomes(service.metrics) == {"error": 1}


class TestTokenize:
    async def test_it_equals_the_prompt_of_raw_mode(self, service: Service) -> None:
        text = "yes {no} </s>\n\ncat"
        found = await service.tokenize(text, tracker=tracker_of(service, Route.TOKENIZE))
        completion = await generated(service, mode=Mode.RAW, instruction=text)
        assert found.num_tokens == completion.usage.prompt_tokens
        assert found.unknown_tokens == completion.usage.unknown_tokens == 3
        bare = await service.tokenize(text, add_special_tokens=False, tracker=tracker_of(service, Route.TOKENIZE))
        assert (*bare.token_ids, EOS) == found.token_ids

    async def test_an_empty_text_is_no_error(self, service: Service) -> None:
        assert (await service.tokenize("", tracker=tracker_of(service))).token_ids == (EOS,)

    async def test_refusals(self, service: Service) -> None:
        with pytest.raises(InvalidRequest) as caught:
            await service.tokenize("\ud800", tracker=tracker_of(service, Route.TOKENIZE))
        assert caught.value.field == "text"
        with pytest.raises(NotFound):
            await service.tokenize("a", model="other", tracker=tracker_of(service, Route.TOKENIZE))

    async def test_it_has_a_deadline_like_every_request(self, service: Service) -> None:
        with pytest.raises(DeadlineExceeded):
            await service.tokenize("a", timeout_seconds=0.0, tracker=tracker_of(service, Route.TOKENIZE))
        assert outcomes(service.metrics) == {"deadline": 1}


async def test_the_model_card(service: Service) -> None:
    card = service.model_card()
    assert (card.id, card.runtime, card.dtype, card.architecture) == (
        "scripted",
        "scripted",
        "float32",
        "T5ForConditionalGeneration",
    )
    assert (card.max_input_tokens, card.max_output_tokens, card.is_encoder_decoder) == (2048, 512, True)
    assert card.modes == ("raw", "instruction", "few_shot", "cot")
    assert set(card.names) == {"scripted", "default", "tgi", "dummy"}
    assert service.token_text(EOS) == "</s>"
    assert value(
        service.metrics,
        "flan_model_info",
        model="scripted",
        runtime="scripted",
        device="cpu",
        dtype="float32",
        architecture="T5ForConditionalGeneration",
    )


async def test_generation_config_lies_between_request_and_server(runtime: ScriptedRuntime) -> None:
    service = Service(ServiceSettings(), Metrics())
    service.attach(runtime, TOKENIZER, generation_config={"repetition_penalty": 1.2})
    await generated(service)
    await generated(service, sampling=sampling(repetition_penalty=1.0))
    assert [request.sampling.repetition_penalty for request in runtime.requests] == [1.2, 1.0]
    await service.close()
