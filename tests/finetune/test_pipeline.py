"""The text stream: what it renders is what the server renders, and a resumed stream goes on with the same examples."""

from __future__ import annotations

import io
import json
import time
from itertools import islice
from pathlib import Path

import pytest

from finetune.example import TextExample
from finetune.exemplars import normalised
from finetune.inspection import inspect_mixture
from finetune.pipeline import HeldoutExample, TextStream, build_text_stream
from finetune.templates import TEMPLATE_TYPES
from serve.prompts import render, render_target
from serve.prompts.formats import COT_TRIGGER, OPTIONS_HEADER, QUESTION_LABEL
from serve.request import Mode

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(
    not (SHARED_DATA / "train").is_dir(), reason=f"the public data sets are not at {SHARED_DATA}"
)


@pytest.fixture(scope="module")
def demo() -> TextStream:
    return build_text_stream("demo", [SHARED_DATA], seed=0)


def smoke(seed: int = 0) -> TextStream:
    return build_text_stream("smoke", [], seed=seed)


def test_smoke_streams_without_any_data_folder() -> None:
    examples = list(islice(smoke(), 2000))
    assert {example.template_type for example in examples} == set(TEMPLATE_TYPES)
    assert len({example.task for example in examples}) == 11
    assert all(example.inputs.strip() and example.targets.strip() for example in examples)


def test_types_show_what_their_names_say() -> None:
    for example in islice(smoke(1), 2000):
        has_options = OPTIONS_HEADER in example.inputs
        is_few_shot = example.inputs.count(QUESTION_LABEL) > 1
        if example.template_type in ("zs_opt", "fs_opt"):
            assert has_options
        if example.template_type in ("zs_noopt", "fs_noopt"):
            assert not has_options
        assert is_few_shot == example.template_type.startswith("fs_"), example
        assert (COT_TRIGGER in example.inputs) == (example.template_type == "cot")
        if example.template_type in ("cot", "fs_cot"):
            assert "The answer is" in example.targets


def test_training_inputs_are_the_bytes_that_the_server_renders() -> None:
    stream = smoke(2)
    for _ in range(500):
        row, instance = stream.next_instance()
        fields = (instance.instruction, instance.input, instance.options, instance.exemplars)
        rationale = row["rationale"] if instance.mode is Mode.COT else None
        expected = TextExample(
            render(instance.mode, *fields),
            render_target(instance.mode, row["output"], rationale),
            instance.task,
            instance.template_type,
        )
        assert instance.render() == expected


def test_the_query_is_never_its_own_exemplar() -> None:
    stream = smoke(3)
    seen = 0
    for _ in range(1500):
        _, instance = stream.next_instance()
        query = instance.instruction if instance.input is None else instance.input
        texts = [normalised(exemplar.input) for exemplar in instance.exemplars]
        assert len(set(texts)) == len(texts) <= 3
        assert normalised(query) not in texts
        seen += bool(texts)
    assert seen > 300


@pytest.mark.parametrize("stop", [0, 1, 7, 250])
def test_a_resumed_stream_goes_on_with_the_same_examples(stop: int) -> None:
    straight = smoke(5)
    expected = list(islice(straight, stop + 200))
    first = smoke(5)
    assert list(islice(first, stop)) == expected[:stop]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = smoke(5)
    next(resumed)
    resumed.load_state_dict(state)
    assert list(islice(resumed, 200)) == expected[stop:]
    assert resumed.manifest() == straight.manifest()
    assert len(json.dumps(state)) < 1000


def test_a_state_of_another_stream_is_refused() -> None:
    state = smoke(1).state_dict()
    with pytest.raises(ValueError, match="the state is of seed 1, the stream has 2"):
        smoke(2).load_state_dict(state)
    with pytest.raises(ValueError, match="lacks: nothing"):
        smoke(1).load_state_dict(state | {"counts": {"nothing": 3}})


def test_manifest_counts_what_was_drawn() -> None:
    stream = smoke(4)
    drawn = [example.task for example in islice(stream, 600)]
    manifest = {entry["task"]: entry for entry in stream.manifest()}
    assert sum(entry["count"] for entry in manifest.values()) == 600
    assert all(entry["count"] == drawn.count(name) for name, entry in manifest.items())
    assert sum(entry["weight"] for entry in manifest.values()) == pytest.approx(1, abs=1e-4)
    assert manifest["addition"]["epochs"] is None
    assert all(entry["licence"] for entry in manifest.values())


def test_heldout_examples_are_requests_that_were_never_trained_on() -> None:
    stream = smoke(6)
    for task, rows in stream.rows.items():
        train = set() if rows.task.generator else {normalised(row["key"]) for row in rows.train}
        assert not train & {normalised(row["key"]) for row in rows.held_out}
        examples = stream.heldout_examples(task, 5)
        assert examples == stream.heldout_examples(task, 5)
        assert len(examples) == min(5, len(rows.held_out))
        for example in examples:
            assert HeldoutExample.from_json(json.loads(json.dumps(example.to_json()))) == example
            assert example.accepted[0] == example.output
            assert render(Mode(example.mode), example.instruction, example.input, example.options, example.exemplars)


def test_heldout_examples_of_one_type() -> None:
    stream = smoke(6)
    chains = stream.heldout_examples("smoke_odd_one_out", 3, template_type="fs_cot")
    assert {example.mode for example in chains} == {"cot"}
    assert all(1 <= len(example.exemplars) <= 3 and example.rationale for example in chains)
    with pytest.raises(ValueError, match="unknown template type fs_cott; did you mean fs_cot"):
        stream.heldout_examples("smoke_odd_one_out", template_type="fs_cott")
    with pytest.raises(ValueError, match="task smoke_plural cannot have the type cot"):
        stream.heldout_examples("smoke_plural", template_type="cot")
    with pytest.raises(KeyError, match="no task plural"):
        stream.heldout_examples("plural")


def test_exemplars_are_dropped_from_the_front_until_they_fit(tmp_path: Path) -> None:
    text = '[types]\nfs_noopt = 1\n[[member]]\ntask = "smoke_reverse"\n'
    lengths = {}
    for limit in (100, 300, 2000):
        path = tmp_path / f"limit{limit}.toml"
        path.write_text(f"max_input_chars = {limit}\nnum_exemplars = [3, 3]\n{text}")
        examples = list(islice(build_text_stream(path, [], seed=0), 60))
        few_shot = [example for example in examples if example.template_type == "fs_noopt"]
        assert all(len(example.inputs) <= limit for example in few_shot)
        lengths[limit] = sum(example.inputs.count(QUESTION_LABEL) - 1 for example in few_shot) / len(examples)
    assert lengths[100] == 0
    assert 0 < lengths[300] < 3
    assert lengths[2000] == 3


def test_num_options_shows_the_right_one_and_others() -> None:
    for example in smoke(6).heldout_examples("smoke_topics", template_type="zs_opt"):
        assert len(example.options) == 2
        assert example.output in example.options


def test_own_options_stand_with_each_exemplar() -> None:
    examples = smoke(6).heldout_examples("smoke_odd_one_out", template_type="fs_opt")
    assert len(examples) >= 5
    for example in examples:
        assert all(OPTIONS_HEADER in exemplar.input for exemplar in example.exemplars)
    closed = smoke(6).heldout_examples("smoke_phrases", template_type="fs_opt")
    assert not any(OPTIONS_HEADER in exemplar.input for example in closed for exemplar in example.exemplars)


class _Words:
    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"<{number}>" for number in ids]


@pytest.mark.parametrize("tokenizer", [None, _Words()])
def test_inspect_prints_stages_table_and_lengths(tokenizer: _Words | None) -> None:
    out = io.StringIO()
    inspect_mixture("smoke", [], 3, 0, tokenizer, out)
    report = out.getvalue()
    assert report.count("--- example") == 3
    for part in ("row", "template", "rendered", "target", "licence", "smoke_stories", "11 tasks; generated 100.0%"):
        assert part in report
    assert ("tokens of the input" in report) == (tokenizer is not None)
    assert f"lengths in {'words' if tokenizer is None else 'tokens'} over 2,000 examples" in report


@needs_shared_data
def test_demo_is_permissive_short_and_fast(demo: TextStream) -> None:
    assert all(entry["permissive"] for entry in demo.manifest())
    names = {entry["task"] for entry in demo.manifest()}
    assert not any(f"task{number}" in name for name in names for number in (278, 1504))
    started = time.perf_counter()
    examples = list(islice(demo, 6000))
    assert 6000 / (time.perf_counter() - started) > 2000
    assert max(len(example.inputs) for example in examples) < 600
    assert max(len(example.targets) for example in examples) < 260
    kinds = [example.template_type for example in examples]
    assert 0.5 < sum(kind.startswith("zs") for kind in kinds) / 6000 < 0.72
    assert 0.12 < sum(kind in ("fs_opt", "fs_noopt") for kind in kinds) / 6000 < 0.25
    assert 0.15 < sum(kind in ("cot", "fs_cot") for kind in kinds) / 6000 < 0.27


@needs_shared_data
def test_demo_train_and_held_out_are_apart(demo: TextStream) -> None:
    checked = 0
    for rows in demo.rows.values():
        held_out = {normalised(row["key"]) for row in rows.held_out}
        count = 300 if rows.task.generator else rows.num_train
        assert not any(normalised(rows.train_row(position)["key"]) in held_out for position in range(count))
        checked += bool(held_out)
    assert checked == 43  # all 46 tasks but the three of countries


@needs_shared_data
def test_demo_antonym_tasks_do_not_leak_into_each_other(demo: TextStream) -> None:
    names = ("ii_antonyms", "short_wordnet_antonyms")
    for one, other in (names, names[::-1]):
        held_out = {(row["input"], row["output"]) for row in demo.rows[one].held_out}
        assert not held_out & {(row["input"], row["output"]) for row in demo.rows[other].train}
        assert demo.rows[other].left_out["held out elsewhere"] > 0


@needs_shared_data
def test_flan2022_reads_everything_and_keeps_ecqa_out_of_commonsenseqa() -> None:
    stream = build_text_stream("flan2022", [SHARED_DATA], seed=0)
    assert len(stream.rows) == 156
    assert stream.rows["cot_ecqa"].left_out["held out elsewhere"] >= 700
    assert stream.rows["mnli"].left_out == {}
    assert stream.rows["cot_gsm8k"].num_train + len(stream.rows["cot_gsm8k"].held_out) == 7473
    examples = list(islice(stream, 3000))
    assert {example.template_type for example in examples} == set(TEMPLATE_TYPES)
    assert not any("<|endoftext|>" in example.targets for example in examples)
