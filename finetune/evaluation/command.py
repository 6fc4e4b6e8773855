"""`flan-finetune evaluate`: held-out questions through a running server, a table in the model card."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from finetune.evaluation import heldout, report
from finetune.evaluation.scoring import TaskScore
from finetune.pipeline import HeldoutExample, build_text_stream
from serve.client import AsyncFlanClient


def run(args: argparse.Namespace, data: Sequence[Path]) -> None:
    """Ask, print the tables, and write them where `args` says."""
    stream = build_text_stream(args.mixture, data, seed=args.seed)
    questions = heldout.draw(stream, args.questions)
    scores = asyncio.run(_ask(args, questions))
    text = report.markdown(scores, command=f"flan-finetune evaluate {args.mixture} --questions {args.questions}")
    print(text)
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_json(scores), indent=1) + "\n", encoding="utf-8")
    if args.checkpoint is not None:
        report.put_into_card(args.checkpoint / "README.md", text)
        _put_into_flan_json(args.checkpoint / "flan.json", scores)


async def _ask(args: argparse.Namespace, questions: list[HeldoutExample]) -> list[TaskScore]:
    progress = tqdm(total=heldout.num_requests(questions), unit="question", desc="asking", smoothing=0.05)
    async with AsyncFlanClient(args.url, api_key=args.api_key) as client:
        with progress:
            return await heldout.evaluate(
                client,
                questions,
                concurrency=args.concurrency,
                max_tokens=args.max_tokens,
                on_reply=progress.update,
            )


def _put_into_flan_json(path: Path, scores: list[TaskScore]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content["scores"] = report.to_json(scores)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
