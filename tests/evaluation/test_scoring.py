"""Scores and baselines, on questions small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.evaluation import report
from finetune.evaluation.scoring import Reply, is_right, majority_share, score_task
from finetune.pipeline import HeldoutExample


def question(
    output: str, *, rationale: str | None = None, options: tuple[str, ...] = (), metric: str = "exact_match"
) -> HeldoutExample:
    return HeldoutExample(
        task="toy",
        template_type="cot" if rationale else "zs_opt",
        mode="cot" if rationale else "instruction",
        instruction="Do it.",
        input="yes",
        options=options,
        exemplars=(),
        output=output,
        accepted=(output, f"{output}!"),
        rationale=rationale,
        metric=metric,
    )


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [("Positive.", "positive", True), (' "12" ', "12", True), ("a  b", "A b", True), ("1.5", "15", False),
     (None, "x", False)],
)  # fmt: skip
def test_what_counts_as_right(answer: str | None, expected: str, right: bool) -> None:
    assert is_right(answer, question(expected)) is right


def test_every_accepted_answer_counts_and_lists_come_in_any_order() -> None:
    assert is_right("yes!", question("yes"))
    assert is_right("b, a", question("a, b", metric="set_match"))
    assert is_right("It is 12.0", question("12", metric="numeric_match"))
    assert not is_right("none", question("12", metric="numeric_match"))
    assert not is_right("b, a", question("a, b"))
    with pytest.raises(ValueError, match="no rule"):
        is_right("x", question("x", metric="bleu"))


def test_a_task_is_counted_against_its_three_baselines() -> None:
    questions = [question(text, options=("yes", "no")) for text in ("yes", "no", "no", "no")]
    replies = [Reply(text, text) for text in ("yes", "no", "yes", "perhaps")]
    score = score_task(questions, replies)
    assert (score.accuracy, score.majority, score.chance, score.copy) == (0.5, 0.75, 0.5, 0.25)
    assert score.margin == pytest.approx(-25.0)


def test_what_the_rationale_is_worth() -> None:
    questions = [question("4", rationale="2 and 2 is 4.")] * 4
    replies = [
        Reply("", "4", "2 and 2 is 4."),
        Reply("", "4", "2 and 2 is 4"),
        Reply("", "5", "2 and 2 is 5."),
        Reply("", None, None),
    ]
    score = score_task(questions, replies)
    assert (score.right, score.answered, score.rationale_present, score.rationale_right) == (2, 3, 3, 2)
    assert score.right_given_right_rationale == 1.0
    assert score.right_given_wrong_rationale == 0.0


def test_no_questions_is_an_error_not_a_score() -> None:
    with pytest.raises(ValueError, match="0 questions"):
        score_task([], [])


def test_majority_share_compares_normalised_answers() -> None:
    assert majority_share(["A", "a.", "b"]) == pytest.approx(2 / 3)


def test_the_report_goes_between_the_markers_of_a_card_once(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# Demo\n\nWords.\n")
    score = score_task([question("4", rationale="So.")] * 2, [Reply("", "4", "So.")] * 2)
    score.direct_right = 1
    for _ in range(2):
        report.put_into_card(card, report.markdown([score], command="flan-finetune evaluate demo"))
    text = card.read_text()
    assert text.startswith("# Demo\n\nWords.\n")
    assert text.count(report.BEGIN) == text.count("| toy | cot | 2 | 100.0 | 100.0 | – | 0.0 | +0.0 |") == 1
    assert "| toy | 100.0 | 100.0 | 100.0 | – | 50.0 | 100.0 |" in text
    assert report.to_json([score])[0]["direct_accuracy"] == 0.5
