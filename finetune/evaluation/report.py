"""Scores as a Markdown table and as JSON, and their place in a model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.evaluation.scoring import TaskScore
from serve.request import Mode

BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"


def markdown(scores: Sequence[TaskScore], *, command: str) -> str:
    """The tables of a report: every task and mode, then what the rationales are worth, then replies to look at."""
    asked = sum(score.questions for score in scores)
    ahead = [s for s in scores if 100 * (s.accuracy - s.majority) >= 15]
    lines = [
        f"{asked:,} held-out questions, asked of the running server by `{command}`; greedy, exact match after "
        "normalisation, in percent. *majority* knows the label distribution of the questions; *chance* draws from "
        "the options; *copy* gives the input back; *margin* is points above the best of the three.",
        "",
        f"{len({s.task for s in ahead})} tasks stand at least 15 points above the majority baseline.",
        "",
        "| task | mode | questions | accuracy | majority | chance | copy | margin |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        *(_row(score) for score in sorted(scores, key=lambda s: (-s.margin, s.task))),
    ]
    chains = [score for score in scores if score.mode is Mode.COT]
    if chains:
        lines += [
            "",
            "Chain of thought: *present* = a rationale was written; *right* = it is the reference rationale word for "
            "word; the next two are the answer's accuracy where the rationale was right and where it was not; "
            "*direct* = the same questions asked without a chain.",
            "",
            "| task | present | right | answer, right | answer, wrong | direct | with chain |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(_chain_row(score) for score in sorted(chains, key=lambda s: s.task)),
        ]
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _row(s: TaskScore) -> str:
    return (
        f"| {s.task} | {s.mode} | {s.questions} | {_percent(s.accuracy)} | {_percent(s.majority)} | "
        f"{_percent(s.chance) if s.chance else '–'} | {_percent(s.copy)} | {s.margin:+.1f} |"
    )


def _chain_row(s: TaskScore) -> str:
    direct = None if s.direct_right is None else s.direct_right / s.questions
    cells = (
        s.rationale_present / s.questions,
        s.rationale_right / s.questions,
        s.right_given_right_rationale,
        s.right_given_wrong_rationale,
        direct,
        s.accuracy,
    )
    return f"| {s.task} | " + " | ".join(_percent(cell) for cell in cells) + " |"


def to_json(scores: Sequence[TaskScore]) -> list[dict[str, Any]]:
    """What goes into flan.json under `scores`."""
    return [
        {
            "task": s.task,
            "mode": str(s.mode),
            "questions": s.questions,
            "accuracy": round(s.accuracy, 4),
            "majority": round(s.majority, 4),
            "chance": round(s.chance, 4),
            "copy": round(s.copy, 4),
            "rationale_present": round(s.rationale_present / s.questions, 4) if s.mode is Mode.COT else None,
            "rationale_right": round(s.rationale_right / s.questions, 4) if s.mode is Mode.COT else None,
            "direct_accuracy": None if s.direct_right is None else round(s.direct_right / s.questions, 4),
        }
        for s in scores
    ]


def put_into_card(card: Path, text: str) -> None:
    """Replace what stands between the markers of a model card; add the section when the card has none."""
    content = card.read_text(encoding="utf-8") if card.is_file() else ""
    section = f"{BEGIN}\n{text.strip()}\n{END}"
    if BEGIN in content and END in content:
        head, rest = content.split(BEGIN, 1)
        content = head + section + rest.split(END, 1)[1]
    else:
        content = f"{content.rstrip()}\n\n## Scores\n\n{section}\n"
    card.write_text(content, encoding="utf-8")
