"""The documented Flan rendering of a chat, for models without a chat template.

One user turn is the prompt itself. Otherwise: the system text first, each turn with a visible label, and the
assistant's label last.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.prompts.formats import ASSISTANT_LABEL, USER_LABEL, join_parts
from serve.request import ChatMessage

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
