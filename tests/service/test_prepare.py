from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import InvalidRequest
from serve.exemplars import MAX_EXEMPLARS
from serve.prepare import (
    MAX_CANDIDATES,
    MAX_OPTIONS,
    MAX_PROMPTS,
    SELF_CONSISTENCY_TEMPERATURE,
    num_characters,
    prepare,
    prepare_score,
)
from serve.prompt_fitting import PrepareContext
from serve.request import (
    ChatMessage,
    Exemplar,
    GenerateRequest,
    Mode,
    PreparedRequest,
    PreparedScore,
    ScoreRequest,
)
from serve.sampling_params import SamplingDefaults, SamplingFields
from serve.tokenizer import Tokenizer
from tests.service.test_tokenizer import T5_FOLDER, needs_t5
from tests.service.toy_tokenizers import byte_fallback, byte_level, t5_like

TOKENIZER = t5_like()
SETS = {"pets": tuple(Exemplar(f"cat {n}", f"dog {n}", f"step {n}") for n in range(5))}
CONTEXT = PrepareContext(TOKENIZER, max_input_tokens=60, exemplar_sets=SETS)
EOS = 1


def prepared(context: PrepareContext = CONTEXT, **fields: Any) -> PreparedRequest:
    fields.setdefault("instruction", None if {"prompts", "messages"} & set(fields) else "yes or no?")
    return prepare(GenerateRequest(**fields), context, "r1")


def scored(context: PrepareContext = CONTEXT, **fields: Any) -> PreparedScore:
    fields.setdefault("instruction", "yes or no?")
    fields.setdefault("candidates", ("yes", "no"))
    return prepare_score(ScoreRequest(**fields), context, "r1")


def refused_field(**fields: Any) -> str | None:
    with pytest.raises(InvalidRequest) as caught:
        prepared(**fields)
    assert caught.value.message
    return caught.value.field


class TestPromptFields:
    @pytest.mark.parametrize("instruction", [None, "", " ", "\n\t "])
    @pytest.mark.parametrize("mode", list(Mode))
    def test_a_missing_or_blank_instruction_is_refused_by_name(self, mode: Mode, instruction: str | None) -> None:
        assert refused_field(mode=mode, instruction=instruction) == "instruction"

    @needs_t5
    def test_nothing_but_characters_that_vanish_is_an_empty_prompt(self) -> None:
        context = PrepareContext(Tokenizer.load(T5_FOLDER))
        assert refused_field(context=context, mode=Mode.RAW, instruction="\u200b\x01\ufeff") == "instruction"

    def test_each_mode_renders_its_form(self) -> None:
        one = (Exemplar("cat", "dog", "so"),)
        shown = {
            mode: prepared(mode=mode, input="hello", exemplars=one if mode in (Mode.FEW_SHOT, Mode.COT) else ())
            .prompts[0]
            .text
            for mode in (Mode.INSTRUCTION, Mode.FEW_SHOT, Mode.COT)
        }
        assert shown[Mode.INSTRUCTION] == "yes or no?\n\nhello"
        assert shown[Mode.FEW_SHOT] == "yes or no?\n\nQ: cat\nA: dog\n\nQ: hello\nA:"
        assert shown[Mode.COT] == "yes or no?\n\nQ: cat\nA: so. The answer is dog.\n\nQ: hello\nA:"
        assert prepared(mode=Mode.RAW).prompts[0].text == "yes or no?"

    def test_raw_takes_the_instruction_alone(self) -> None:
        assert refused_field(mode=Mode.RAW, input="x") == "input"
        assert refused_field(mode=Mode.RAW, options=("yes",)) == "options"
        assert prepared(mode=Mode.RAW, input=" ").prompts[0].text == "yes or no?"

    def test_options(self) -> None:
        assert prepared(options=("yes", "no")).prompts[0].text == "yes or no?\n\nOPTIONS:\n- yes\n- no"
        assert refused_field(options=("yes", " ")) == "options"
        assert refused_field(options=("yes",) * (MAX_OPTIONS + 1)) == "options"

    @pytest.mark.parametrize("bad", ["a\x00", "\ud800"])
    @pytest.mark.parametrize(
        ("name", "fields"),
        [
            ("instruction", lambda text: {"instruction": text}),
            ("input", lambda text: {"input": text}),
            ("options", lambda text: {"options": ("a", text)}),
            ("exemplars", lambda text: {"mode": Mode.FEW_SHOT, "exemplars": (Exemplar(text, "b"),)}),
            ("exemplars", lambda text: {"mode": Mode.COT, "exemplars": (Exemplar("a", "b", text),)}),
            ("prompt", lambda text: {"prompts": ("a", text)}),
            ("messages", lambda text: {"messages": (ChatMessage("user", text),)}),
            ("stop", lambda text: {"sampling": SamplingFields(stop=(text,))}),
        ],
    )
    def test_what_is_no_text_is_refused_by_name(self, name: str, fields: Any, bad: str) -> None:
        assert refused_field(**fields(bad)) == name

    def test_the_request_goes_over_whole(self) -> None:
        request = prepare(
            GenerateRequest(instruction="yes", debug=True, answer_format="number"), CONTEXT, "id", timeout_seconds=2.5
        )
        assert (request.request_id, request.debug, request.answer_format) == ("id", True, "number")
        assert (request.timeout_seconds, request.mode) == (2.5, Mode.INSTRUCTION)


class TestTokens:
    def test_the_encoder_input_ends_in_exactly_one_eos(self) -> None:
        for fields in (
            {"instruction": "yes </s> no </s>"},
            {"prompts": ("yes",)},
            {"prompts": ((5, 6, EOS),)},
            {"prompts": ((5, 6),)},
            {"prompts": ((5, 6, EOS, EOS),)},
            {"prompts": ("yes " * 40,), "truncate_prompt_tokens": 7},
            {"prompts": ((5, 6, 7, 8, EOS),), "truncate_prompt_tokens": 3},
        ):
            ids = prepared(**fields).prompts[0].token_ids
            assert ids[-1] == EOS
            assert ids.count(EOS) == 1

    def test_truncation_keeps_the_last_tokens_and_counts_eos(self) -> None:
        [prompt] = prepared(prompts=((5, 6, 7, 8),), truncate_prompt_tokens=3).prompts
        assert prompt.token_ids == (7, 8, EOS)
        whole = prepared(prompts=("yes no yes no",)).prompts[0].token_ids
        assert prepared(prompts=("yes no yes no",), truncate_prompt_tokens=3).prompts[0].token_ids == whole[-3:]
        assert prepared(prompts=("yes no",), truncate_prompt_tokens=99).prompts[0].token_ids == (*whole[:2], EOS)
        assert prepared(prompts=("yes " * 200,), truncate_prompt_tokens=60).prompt_tokens == 60
        assert refused_field(prompts=("yes",), truncate_prompt_tokens=0) == "truncate"

    def test_one_requests_truncation_never_changes_anothers(self) -> None:
        def ids(number: int) -> tuple[int, ...]:
            truncate = 3 + number % 7 if number % 2 else None
            [prompt] = prepared(prompts=("yes no " * 9,), truncate_prompt_tokens=truncate).prompts
            return prompt.token_ids

        with ThreadPoolExecutor(32) as threads:
            found = list(threads.map(ids, range(1000)))
        whole = found[0]
        assert len(whole) == 19
        assert found == [whole if number % 2 == 0 else whole[-3 - number % 7 :] for number in range(1000)]

    def test_a_decoder_only_prompt_has_its_own_template_and_no_eos(self) -> None:
        context = PrepareContext(byte_fallback(), is_encoder_decoder=False)
        ids = prepared(context, mode=Mode.RAW, instruction="ab").prompts[0].token_ids
        assert ids[0] == 1
        assert 2 not in ids
        assert prepared(context, prompts=((5, 6),)).prompts[0].token_ids == (5, 6)
        assert refused_field(context=PrepareContext(byte_level(), is_encoder_decoder=False), prompts=((),)) == "prompt"

    @pytest.mark.parametrize("prompt", ["", " ", "\n", (), (EOS,)])
    def test_an_empty_prompt_is_refused(self, prompt: Any) -> None:
        assert refused_field(prompts=("yes", prompt)) == "prompt"
        assert refused_field(prompts=(prompt,), truncate_prompt_tokens=5) == "prompt"

    @pytest.mark.parametrize("token_id", [-1, TOKENIZER.size, 10**12])
    def test_a_token_id_that_there_is_not(self, token_id: int) -> None:
        assert refused_field(prompts=((5, token_id),)) == "prompt"

    def test_several_prompts(self) -> None:
        request = prepared(prompts=("yes", (5, 6), "no"), sampling=SamplingFields(n=2))
        assert [prompt.text for prompt in request.prompts] == ["yes", None, "no"]
        assert request.num_sequences == 6
        assert request.prompt_tokens == 2 + 3 + 2
        assert refused_field(prompts=("yes",) * (MAX_PROMPTS + 1)) == "prompt"
        assert refused_field(prompts=("yes",) * MAX_PROMPTS, sampling=SamplingFields(n=64)) == "n"

    def test_messages(self) -> None:
        chat = (ChatMessage("system", "yes"), ChatMessage("user", "no"))
        assert prepared(messages=chat).prompts[0].text == "yes\n\nno"
        assert refused_field(messages=(ChatMessage("user", " "),)) == "messages"

    def test_unknown_tokens_are_counted(self) -> None:
        assert prepared(instruction='{"a": 1} < 3').prompts[0].unknown_tokens == 3
        assert prepared(prompts=((2, 5, 2),)).prompts[0].unknown_tokens == 2

    def test_too_long_says_limit_and_count(self) -> None:
        with pytest.raises(InvalidRequest, match=r"201 tokens; the limit is 60") as caught:
            prepared(instruction="yes " * 200)
        assert caught.value.field == "instruction"
        assert prepared(instruction="yes " * 59).prompt_tokens == 60
        assert refused_field(instruction="yes " * 60) == "instruction"
        assert refused_field(prompts=((5,) * 60,)) == "prompt"
        assert refused_field(messages=(ChatMessage("user", "yes " * 60),)) == "messages"

    def test_megabytes_are_refused_without_counting_to_the_end(self) -> None:
        started = time.monotonic()
        for fields in (
            {"instruction": "yes " * 2_500_000},
            {"instruction": "a", "input": "yes " * 2_500_000},
            {"prompts": ("yes " * 2_500_000,)},
            {"messages": (ChatMessage("user", "yes " * 2_500_000),)},
        ):
            with pytest.raises(InvalidRequest, match=r"about 2\d{6} tokens; the limit is 60"):
                prepared(**fields)
        with pytest.raises(InvalidRequest, match="a candidate has about"):
            scored(candidates=("yes " * 2_500_000,))
        assert time.monotonic() - started < 5

    def test_a_long_text_that_is_short_in_tokens_fits(self) -> None:
        assert prepared(mode=Mode.RAW, instruction="yes" + " " * 50_000 + "no").prompt_tokens == 3


class TestContext:
    """Of a decoder-only model: prompt and answer together."""

    CONTEXT = PrepareContext(byte_level(), is_encoder_decoder=False, context_length=20)

    def test_max_tokens_are_what_the_prompt_leaves(self) -> None:
        request = prepared(self.CONTEXT, prompts=("abc",), sampling=SamplingFields(max_tokens=50, min_tokens=30))
        assert (request.sampling.max_tokens, request.sampling.min_tokens) == (17, 17)

    def test_a_full_one_names_what_to_shorten(self) -> None:
        long = "b" * 20
        assert refused_field(context=self.CONTEXT, mode=Mode.RAW, instruction=long) == "instruction"
        assert refused_field(context=self.CONTEXT, instruction="a", input=long) == "input"
        assert refused_field(context=self.CONTEXT, prompts=("a", long)) == "prompt"
        assert refused_field(context=self.CONTEXT, messages=(ChatMessage("user", long),)) == "messages"

    @pytest.mark.parametrize(("prompt", "candidate", "field"), [(17, 4, "candidates"), (20, 1, "instruction")])
    def test_a_prompt_and_each_candidate_fit_together(self, prompt: int, candidate: int, field: str) -> None:
        fits = scored(self.CONTEXT, mode=Mode.RAW, instruction="a" * 16, candidates=("b" * 4, "c"))
        assert len(fits.candidate_token_ids) == 2
        with pytest.raises(InvalidRequest) as caught:
            scored(self.CONTEXT, mode=Mode.RAW, instruction="a" * prompt, candidates=("c", "b" * candidate))
        assert caught.value.field == field


class TestSampling:
    def test_samples_are_for_cot_alone(self) -> None:
        for mode in (Mode.RAW, Mode.INSTRUCTION, Mode.FEW_SHOT):
            assert refused_field(mode=mode, samples=1) == "samples"
        for samples in (0, -1, 65):
            assert refused_field(mode=Mode.COT, samples=samples) == "samples"

    def test_samples_make_sequences_that_differ(self) -> None:
        request = prepared(mode=Mode.COT, samples=5)
        assert (request.samples, request.num_sequences) == (5, 5)
        assert request.sampling.temperature == SELF_CONSISTENCY_TEMPERATURE
        assert prepared(mode=Mode.COT, samples=1).sampling.greedy
        assert prepared(mode=Mode.COT).samples == 1

    def test_whoever_says_a_temperature_for_samples_is_obeyed(self) -> None:
        said = prepared(mode=Mode.COT, samples=3, sampling=SamplingFields(temperature=0.0))
        assert said.sampling.greedy
        config = SamplingDefaults(generation_config={"temperature": 1.1})
        assert prepared(replace(CONTEXT, defaults=config), mode=Mode.COT, samples=3).sampling.temperature == 1.1

    def test_samples_and_n_exclude_each_other(self) -> None:
        assert refused_field(mode=Mode.COT, samples=3, sampling=SamplingFields(n=2)) == "n"
        assert refused_field(mode=Mode.COT, samples=3, sampling=SamplingFields(n=65)) == "n"
        assert prepared(mode=Mode.COT, samples=3, sampling=SamplingFields(n=1)).num_sequences == 3
        assert prepared(mode=Mode.COT, samples=1, sampling=SamplingFields(n=4)).num_sequences == 4

    def test_ranges_are_checked_against_the_tokenizer(self) -> None:
        last = TOKENIZER.size - 1
        assert prepared(sampling=SamplingFields(logit_bias={last: 1.0})).sampling.logit_bias == {last: 1.0}
        assert refused_field(sampling=SamplingFields(logit_bias={last + 1: 1.0})) == "logit_bias"
        assert refused_field(sampling=SamplingFields(stop=("",))) == "stop"


class TestExemplars:
    def test_only_in_the_modes_that_show_them(self) -> None:
        for mode in (Mode.RAW, Mode.INSTRUCTION):
            assert refused_field(mode=mode, exemplars=(Exemplar("a", "b"),)) == "exemplars"
            assert refused_field(mode=mode, exemplar_set="pets") == "exemplar_set"
            assert refused_field(mode=mode, num_exemplars=1) == "num_exemplars"

    def test_a_set_by_name_and_its_first_k(self) -> None:
        context = replace(CONTEXT, max_input_tokens=500)
        whole = prepared(context, mode=Mode.FEW_SHOT, exemplar_set="pets")
        assert (whole.exemplars_used, whole.exemplars_dropped) == (5, 0)
        two = prepared(context, mode=Mode.FEW_SHOT, exemplar_set="pets", num_exemplars=2)
        assert two.prompts[0].text == "Q: cat 0\nA: dog 0\n\nQ: cat 1\nA: dog 1\n\nQ: yes or no?\nA:"
        none = prepared(context, mode=Mode.FEW_SHOT, exemplar_set="pets", num_exemplars=0)
        assert none.exemplars_used == 0
        assert prepared(context, mode=Mode.COT, exemplar_set="pets", num_exemplars=99).exemplars_used == 5

    def test_what_cannot_be_meant(self) -> None:
        few = Mode.FEW_SHOT
        assert refused_field(mode=few, exemplar_set="pet") == "exemplar_set"
        assert refused_field(mode=few, exemplar_set="pets", exemplars=(Exemplar("a", "b"),)) == "exemplar_set"
        assert refused_field(mode=few, num_exemplars=2) == "num_exemplars"
        assert refused_field(mode=few, exemplar_set="pets", num_exemplars=-1) == "num_exemplars"
        assert refused_field(mode=few, exemplars=(Exemplar(" ", "b"),)) == "exemplars"
        assert refused_field(mode=few, exemplars=(Exemplar("a", ""),)) == "exemplars"
        assert refused_field(mode=few, exemplars=(Exemplar("a", "b"),) * (MAX_EXEMPLARS + 1)) == "exemplars"

    def test_an_unknown_set_names_the_nearest(self) -> None:
        with pytest.raises(InvalidRequest, match="did you mean 'pets'"):
            prepared(mode=Mode.FEW_SHOT, exemplar_set="pet")

    def test_the_query_is_never_its_own_exemplar(self) -> None:
        context = replace(CONTEXT, max_input_tokens=500)
        asked = prepared(context, mode=Mode.FEW_SHOT, input=" ＣＡＴ \n 2 ", exemplar_set="pets", num_exemplars=5)
        assert asked.exemplars_used == 4
        assert "dog 2" not in str(asked.prompts[0].text)
        assert asked.exemplars_dropped == 0
        # Of k from a larger set, k others are shown.
        asked = prepared(context, mode=Mode.FEW_SHOT, input="cat 0", exemplar_set="pets", num_exemplars=2)
        assert asked.exemplars_used == 2
        assert "cat 2" in str(asked.prompts[0].text)
        # Without an input the instruction is the query.
        asked = prepared(context, mode=Mode.COT, instruction="Cat 1", exemplar_set="pets")
        assert asked.exemplars_used == 4

    def test_the_first_ones_are_dropped_until_it_fits(self) -> None:
        context = replace(CONTEXT, max_input_tokens=40)
        request = prepared(context, mode=Mode.FEW_SHOT, input="hello", exemplar_set="pets")
        assert 0 < request.exemplars_used < 5
        assert request.exemplars_used + request.exemplars_dropped == 5
        assert request.prompt_tokens <= 40
        text = str(request.prompts[0].text)
        assert "cat 4" in text
        assert "cat 0" not in text
        assert text.startswith("yes or no?")
        assert text.endswith("Q: hello\nA:")

    def test_never_the_instruction_or_the_input(self) -> None:
        query = "yes " * 45
        request = prepared(mode=Mode.FEW_SHOT, input=query, exemplar_set="pets")
        assert (request.exemplars_used, request.exemplars_dropped) == (0, 5)
        assert query.strip() in str(request.prompts[0].text)
        assert refused_field(mode=Mode.FEW_SHOT, input="yes " * 60, exemplar_set="pets") == "input"

    def test_exemplars_of_megabytes_are_not_tokenized_whole(self) -> None:
        huge = tuple(Exemplar(f"{n} " + "yes " * 20_000, "no") for n in range(100))
        request = prepared(mode=Mode.FEW_SHOT, exemplars=(*huge, Exemplar("cat", "dog")))
        assert (request.exemplars_used, request.exemplars_dropped) == (1, 100)

    @given(
        sizes=st.lists(st.integers(1, 30), max_size=12),
        limit=st.integers(20, 150),
        mode=st.sampled_from(list(Mode)[2:]),
    )
    @settings(max_examples=150, deadline=None)
    def test_as_many_as_fit_and_no_more(self, sizes: list[int], limit: int, mode: Mode) -> None:
        exemplars = tuple(Exemplar(f"{n} " + "cat " * size, "dog", "so") for n, size in enumerate(sizes))
        context = replace(CONTEXT, max_input_tokens=limit)
        roomy = replace(CONTEXT, max_input_tokens=10_000)
        if prepared(roomy, mode=mode).prompt_tokens > limit:
            return
        request = prepared(context, mode=mode, exemplars=exemplars)
        kept = request.exemplars_used
        assert request.prompt_tokens <= limit
        assert request.exemplars_dropped == len(sizes) - kept
        if kept < len(sizes):
            one_more = prepared(roomy, mode=mode, exemplars=exemplars[len(sizes) - kept - 1 :])
            assert one_more.prompt_tokens > limit


class TestScore:
    def test_candidates_end_in_eos(self) -> None:
        request = scored(candidates=("yes", "no </s>"))
        assert [ids[-1] for ids in request.candidate_token_ids] == [EOS, EOS]
        assert request.candidate_token_ids[1].count(EOS) == 1
        assert request.candidate_token_ids[0] == TOKENIZER.encode("yes")
        assert request.prompt == prepared().prompts[0]

    def test_decoder_only_candidates_have_neither_template_nor_eos(self) -> None:
        context = PrepareContext(byte_fallback(), is_encoder_decoder=False)
        request = scored(context, candidates=("ab",))
        assert request.candidate_token_ids[0] == byte_fallback().encode("ab", add_special_tokens=False)

    @pytest.mark.parametrize("candidates", [(), ("yes", ""), (" ",), ("a",) * (MAX_CANDIDATES + 1), ("a " * 600,)])
    def test_bad_candidates_are_refused_by_name(self, candidates: tuple[str, ...]) -> None:
        with pytest.raises(InvalidRequest) as caught:
            scored(candidates=candidates)
        assert caught.value.field == "candidates"

    def test_prompt_rules_hold_here_too(self) -> None:
        for fields, name in (
            ({"instruction": " "}, "instruction"),
            ({"exemplar_set": "pets"}, "exemplar_set"),
            ({"candidates": ("\ud800",)}, "candidates"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                scored(**fields)
            assert caught.value.field == name
        few = scored(mode=Mode.FEW_SHOT, exemplar_set="pets")
        assert len(few.prompt.token_ids) <= CONTEXT.max_input_tokens


def test_all_text_of_a_request_counts_for_its_size() -> None:
    small = num_characters(GenerateRequest(instruction="a"), CONTEXT, 10_000)
    big = "x" * 10_000
    requests: list[GenerateRequest | ScoreRequest] = [
        GenerateRequest(instruction=big),
        GenerateRequest(instruction="a", input=big),
        GenerateRequest(instruction="a", options=(big,)),
        GenerateRequest(instruction="a", exemplars=(Exemplar("a", "b", big),)),
        GenerateRequest(prompts=(big,)),
        GenerateRequest(prompts=((5,) * 10_000,)),
        GenerateRequest(messages=(ChatMessage("user", big),)),
        ScoreRequest(instruction="a", candidates=("a",) * 1000),
    ]
    assert small < 100
    assert all(num_characters(request, CONTEXT, 10_000) >= 10_000 for request in requests)
    named = replace(CONTEXT, exemplar_sets={"big": (Exemplar(big, "b"),)})
    assert num_characters(GenerateRequest(instruction="a", exemplar_set="big"), named, 10_000) > 10_000
