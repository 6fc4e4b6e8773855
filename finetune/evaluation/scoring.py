"""How an answer is judged, and what a model has to beat.

Exact match after normalisation: case, runs of white space, a closing full stop and surrounding quotes do not count.
Baselines, per task and on the same questions: *majority* always gives the commonest expected answer of the questions
themselves (so it knows the label distribution, which a model does not), *chance* draws evenly from a question's
options, *copy* gives the input back.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from finetune.pipeline import HeldoutExample
from serve.prompts.cot import last_number
from serve.request import Mode


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server said. `answer` is the cot answer, or the whole text in other modes; None = no answer marker."""

    text: str
    answer: str | None
    rationale: str | None = None


def normalise(text: str) -> str:
    """
    >>> normalise(' "Positive".')
    'positive'
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(" \"'").rstrip(".").strip(" \"'")


def is_right(answer: str | None, question: HeldoutExample) -> bool:
    """Whether `answer` is one of the question's accepted answers, by the task's metric.

    Raises:
        ValueError: a metric that has no rule here.
    """
    if answer is None:
        return False
    if question.metric in ("exact_match", "any_exact_match"):
        return normalise(answer) in {normalise(text) for text in question.accepted}
    if question.metric == "numeric_match":
        number = _number(answer)
        return number is not None and number in [_number(text) for text in question.accepted]
    if question.metric == "set_match":  # a list in any order
        return _items(answer) in [_items(text) for text in question.accepted]
    raise ValueError(f"task {question.task} is scored by {question.metric!r}, for which there is no rule")


def _items(text: str) -> list[str]:
    return sorted(normalise(item) for item in text.split(","))


def _number(text: str) -> Decimal | None:
    found = last_number(normalise(text))
    return None if found is None else Decimal(found)


def is_same_rationale(given: str | None, expected: str | None) -> bool:
    return given is not None and expected is not None and normalise(given) == normalise(expected)


@dataclass(slots=True)
class TaskScore:
    """Counts of one task in one mode; the properties are shares of `questions`, 0…1.

    `direct_right` counts the same questions asked without a chain of thought (None: not asked).
    """

    task: str
    mode: Mode
    questions: int = 0
    right: int = 0
    answered: int = 0
    rationale_present: int = 0
    rationale_right: int = 0
    right_with_right_rationale: int = 0
    majority: float = 0.0
    chance: float = 0.0
    copy: float = 0.0
    direct_right: int | None = None
    examples: list[tuple[HeldoutExample, Reply]] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return self.right / self.questions

    @property
    def baseline(self) -> float:
        """The strongest of the three baselines."""
        return max(self.majority, self.chance, self.copy)

    @property
    def margin(self) -> float:
        """Accuracy above the strongest baseline, in points of 100."""
        return 100 * (self.accuracy - self.baseline)

    @property
    def right_given_right_rationale(self) -> float | None:
        return self.right_with_right_rationale / self.rationale_right if self.rationale_right else None

    @property
    def right_given_wrong_rationale(self) -> float | None:
        wrong = self.questions - self.rationale_right
        return (self.right - self.right_with_right_rationale) / wrong if wrong else None


def majority_share(expected: Iterable[str]) -> float:
    """
    >>> majority_share(["yes", "no", "Yes", "yes."])
    0.75
    """
    counts = Counter(normalise(text) for text in expected)
    return max(counts.values()) / sum(counts.values())


def score_task(questions: Sequence[HeldoutExample], replies: Sequence[Reply], *, num_examples: int = 2) -> TaskScore:
    """Score one task's questions of one mode; `replies` in the same order.

    Raises:
        ValueError: no questions (an empty task is an error, not a score), or another number of replies.
    """
    if not questions or len(questions) != len(replies):
        raise ValueError(f"{len(questions)} questions and {len(replies)} replies cannot be scored")
    score = TaskScore(questions[0].task, Mode(questions[0].mode), questions=len(questions))
    for question, reply in zip(questions, replies, strict=True):
        right = is_right(reply.answer, question)
        same = is_same_rationale(reply.rationale, question.rationale)
        score.right += right
        score.answered += reply.answer is not None
        score.rationale_present += bool(reply.rationale)
        score.rationale_right += same
        score.right_with_right_rationale += right and same
        score.copy += is_right(question.input, question)
        score.chance += 1 / len(question.options) if question.options else 0.0
    score.copy /= len(questions)
    score.chance /= len(questions)
    score.majority = majority_share(question.output for question in questions)
    score.examples = list(zip(questions, replies, strict=True))[:num_examples]
    return score
