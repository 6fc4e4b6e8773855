"""Held-out questions of a mixture, asked of a running server.

Every task's held-out rows are asked in the forms that the mixture trains (zero-shot, few-shot, chain of thought), and
a task's chain-of-thought questions are asked once more without a chain, to see what the chain is worth. The server
renders the prompts from the native request fields; the trainer and its model take no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from finetune.evaluation.asking import ask_all
from finetune.evaluation.scoring import Reply, TaskScore, is_right, score_task
from finetune.pipeline import HeldoutExample, TextStream
from serve.client import AsyncFlanClient
from serve.request import Mode

MIN_QUESTIONS = 15  # a task and mode with fewer is left out of the table


def draw(stream: TextStream, count: int) -> list[HeldoutExample]:
    """About `count` questions, shared evenly over the tasks that have held-out rows; the same for the same stream.

    A task with fewer rows than its share gives the rest to the others. Tasks with a chain-of-thought form give half
    of their share in that form.

    Raises:
        ValueError: no task of the mixture has held-out rows.
    """
    rows = {task: len(task_rows.held_out) for task, task_rows in stream.rows.items() if task_rows.held_out}
    if not rows:
        raise ValueError(f"no task of the mixture {stream.spec.name} has held-out rows")
    questions: list[HeldoutExample] = []
    remaining, open_tasks = count, len(rows)
    for task, available in sorted(rows.items(), key=lambda item: item[1]):
        share = min(available, -(-remaining // open_tasks))
        questions.extend(_of_task(stream, task, share))
        remaining -= share
        open_tasks -= 1
    return questions


def _of_task(stream: TextStream, task: str, share: int) -> list[HeldoutExample]:
    """`share` questions, drawn as in training; where the task has chains, every second one is a chain."""
    drawn = stream.heldout_examples(task, share)
    if not any(question.rationale for question in drawn):
        return drawn
    chains = stream.heldout_examples(task, share, template_type="cot")
    plain = stream.heldout_examples(task, share, template_type="zs_noopt")
    return [(chains if number % 2 == 0 else plain)[number] for number in range(share)]


def by_task_and_mode(questions: Sequence[HeldoutExample]) -> Iterator[list[HeldoutExample]]:
    def key(question: HeldoutExample) -> tuple[str, str]:
        return question.task, question.mode

    for _, group in groupby(sorted(questions, key=key), key=key):
        members = list(group)
        if len(members) >= MIN_QUESTIONS:
            yield members


async def evaluate(
    client: AsyncFlanClient,
    questions: Sequence[HeldoutExample],
    *,
    concurrency: int = 32,
    max_tokens: int = 96,
    on_reply: Callable[[], object] | None = None,
) -> list[TaskScore]:
    """Ask and score; one TaskScore a task and mode."""
    groups = list(by_task_and_mode(questions))
    flat = [question for group in groups for question in group]
    without_chain = [
        replace(question, mode=str(Mode.INSTRUCTION))
        for question in flat
        if question.mode == Mode.COT and question.rationale
    ]
    replies = await ask_all(
        client, [*flat, *without_chain], concurrency=concurrency, max_tokens=max_tokens, on_reply=on_reply
    )
    direct = dict(zip(map(_identity, without_chain), replies[len(flat) :], strict=True))
    scores = []
    position = 0
    for group in groups:
        score = score_task(group, replies[position : position + len(group)])
        position += len(group)
        if score.mode is Mode.COT:
            score.direct_right = _count_right(group, direct)
        scores.append(score)
    return scores


def num_requests(questions: Sequence[HeldoutExample]) -> int:
    """How many requests `evaluate` will send."""
    flat = [question for group in by_task_and_mode(questions) for question in group]
    return len(flat) + sum(1 for question in flat if question.mode == Mode.COT and question.rationale)


def _identity(question: HeldoutExample) -> tuple[str, str, str | None]:
    return question.task, question.instruction, question.input


def _count_right(group: Sequence[HeldoutExample], direct: dict[tuple[str, str, str | None], Reply]) -> int:
    return sum(is_right(direct[_identity(q)].answer, q) for q in group if _identity(q) in direct)
