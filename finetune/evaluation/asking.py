"""Put questions to a running server, many at a time, through the public client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from finetune.evaluation.scoring import Reply
from finetune.pipeline import HeldoutExample
from serve.client import AsyncFlanClient
from serve.output import Completion
from serve.request import Mode


async def ask_all(
    client: AsyncFlanClient,
    questions: Sequence[HeldoutExample],
    *,
    concurrency: int = 32,
    max_tokens: int = 96,
    on_reply: Callable[[], object] | None = None,
) -> list[Reply]:
    """Greedy replies in the questions' order; at most `concurrency` requests are under way at once."""
    gate = asyncio.Semaphore(concurrency)

    async def ask(question: HeldoutExample) -> Reply:
        async with gate:
            completion = await client.generate(
                mode=Mode(question.mode),
                instruction=question.instruction,
                input=question.input,
                options=question.options,
                exemplars=question.exemplars,
                max_tokens=max_tokens,
            )
        if on_reply is not None:
            on_reply()
        return to_reply(completion, Mode(question.mode))

    return list(await asyncio.gather(*(ask(question) for question in questions)))


def to_reply(completion: Completion, mode: Mode) -> Reply:
    output = completion.outputs[0]
    if mode is Mode.COT:
        return Reply(output.text, output.answer, output.rationale)
    return Reply(output.text, output.text)
