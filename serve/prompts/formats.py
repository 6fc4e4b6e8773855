"""The visible words of every prompt. They have this one home; serving and finetuning both import them.

T5's vocabulary folds newlines, tabs and runs of spaces into one space, so what separates parts for a T5 model is
words and punctuation, never white space. Newlines stay in the strings for models that can see them.
"""

from __future__ import annotations

from collections.abc import Sequence

PROMPT_FORMAT_VERSION = 1  # stored in flan.json; a change of any string below raises it

PART_SEPARATOR = "\n\n"
OPTIONS_HEADER = "OPTIONS:"
OPTION_PREFIX = "- "
QUESTION_LABEL = "Q:"
ANSWER_LABEL = "A:"
COT_TRIGGER = "Let's think step by step."
ANSWER_MARKER = "The answer is"
USER_LABEL = "User:"
ASSISTANT_LABEL = "Assistant:"


def join_parts(*parts: str | None) -> str:
    """Join the parts that are there, in order, with a blank line.

    >>> join_parts("Translate to German.", None, "Hello")
    'Translate to German.\\n\\nHello'
    """
    return PART_SEPARATOR.join(part.strip() for part in parts if part is not None and part.strip())


def options_block(options: Sequence[str]) -> str | None:
    """Flan's closed list of answers, or None when there is none.

    >>> options_block(["yes", "no"])
    'OPTIONS:\\n- yes\\n- no'
    """
    if not options:
        return None
    return "\n".join([OPTIONS_HEADER, *(f"{OPTION_PREFIX}{option.strip()}" for option in options)])
