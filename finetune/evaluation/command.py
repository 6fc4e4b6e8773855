"""`flan-finetune evaluate`: held-out questions through a running server, a table in the model card."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from pathlib import Path

from tqdm import tqdm

from finetune.evaluation import heldout, report
from finetune.evaluation.scoring import TaskScore
from finetune.pipeline import HeldoutExample, build_text_stream
from serve.client import AsyncFlanClient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mixture", help="mixture whose held-out rows are asked, e.g. demo")
    parser.add_argument("--data", type=Path, action="append", default=[], metavar="DIR", help="data folder; repeatable")
    parser.add_argument(
        "--url", default="grpc://127.0.0.1:50051", help="server, http:// or grpc:// (default: %(default)s)"
    )
    parser.add_argument("--questions", type=int, default=5000, metavar="N", help="questions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which questions and exemplars are drawn (default: 0)")
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="requests under way (default: 32)")
    parser.add_argument(
        "--max-tokens", type=int, default=96, metavar="N", help="longest reply, in tokens (default: 96)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=None, metavar="DIR",
        help="checkpoint folder whose model card and flan.json get the scores (default: only print)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the scores as JSON")


def run(args: argparse.Namespace) -> int:
    stream = build_text_stream(args.mixture, args.data, seed=args.seed)
    questions = heldout.draw(stream, args.questions)
    scores = asyncio.run(_ask(args, questions))
    text = report.markdown(scores, command=f"flan-finetune evaluate {args.mixture} --questions {args.questions}")
    print(text)
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_json(scores), indent=1) + "\n", encoding="utf-8")
    if args.checkpoint is not None:
        report.put_into_card(args.checkpoint / "README.md", text)
        _put_into_flan_json(args.checkpoint / "flan.json", scores)
    return 0


async def _ask(args: argparse.Namespace, questions: list[HeldoutExample]) -> list[TaskScore]:
    progress = tqdm(total=heldout.num_requests(questions), unit="question", desc="asking", smoothing=0.05)
    async with AsyncFlanClient(args.url, api_key=os.environ.get("FLAN_API_KEY")) as client:
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
