"""Chats: the documented Flan rendering for models without a chat template, and our modes as turns for those with one.

Rendered: one user turn is the prompt itself. Otherwise the system text first, each turn with a visible label, and the
assistant's label last.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.prompts import cot, few_shot, instruction
from serve.prompts.formats import ASSISTANT_LABEL, USER_LABEL, join_parts, options_block
from serve.request import ChatMessage, Exemplar, Mode

_LABELS = {"user": USER_LABEL, "assistant": ASSISTANT_LABEL}


def render(messages: Sequence[ChatMessage]) -> str:
    """
    >>> render([ChatMessage("user", "Name a colour.")])
    'Name a colour.'
    >>> render([ChatMessage("system", "Be brief."), ChatMessage("user", "Name a colour.")])
    'Be brief.\\n\\nName a colour.'
    >>> render([ChatMessage("user", "Hi"), ChatMessage("assistant", "Hello."), ChatMessage("user", "Bye")])
    'User: Hi\\n\\nAssistant: Hello.\\n\\nUser: Bye\\n\\nAssistant:'
    """
    system = [message.content for message in messages if message.role == "system"]
    turns = [message for message in messages if message.role != "system"]
    if len(turns) == 1 and turns[0].role == "user":
        return join_parts(*system, turns[0].content)
    labelled = [f"{_LABELS[turn.role]} {turn.content.strip()}" for turn in turns]
    return join_parts(*system, *labelled, ASSISTANT_LABEL)


def turns(
    mode: Mode,
    instruction_text: str,
    input: str | None = None,
    options: Sequence[str] = (),
    exemplars: Sequence[Exemplar] = (),
) -> tuple[ChatMessage, ...]:
    """A request in `mode` (not raw) for a model that was tuned on chats: each exemplar is a question and its answer.

    So the model's own turns show the form of the answer, and no labels stand in the text, which it would repeat. The
    instruction opens the first turn.

    >>> [turn.content for turn in turns(Mode.FEW_SHOT, "Give the opposite.", "hot", (), [Exemplar("big", "small")])]
    ['Give the opposite.\\n\\nbig', 'small', 'hot']
    """
    if not exemplars:
        render_alone = cot.render if mode is Mode.COT else instruction.render
        return (ChatMessage("user", render_alone(instruction_text, input, options)),)
    header, query = few_shot.header_and_query(instruction_text, input)
    told: list[ChatMessage] = []
    for exemplar in exemplars:
        answer = cot.render_answer(exemplar.output, exemplar.rationale) if mode is Mode.COT else exemplar.output.strip()
        question = exemplar.input.strip() if told else join_parts(header, exemplar.input)
        told += [ChatMessage("user", question), ChatMessage("assistant", answer)]
    asked = "\n".join(part for part in (query.strip(), options_block(options)) if part)
    return (*told, ChatMessage("user", asked))
