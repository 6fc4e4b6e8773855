"""The zero-shot form: the task in words, the instance, the options."""

from __future__ import annotations

from collections.abc import Sequence

from serve.prompts.formats import join_parts, options_block


def render(instruction: str, input: str | None = None, options: Sequence[str] = ()) -> str:
    """
    >>> render("Is this review positive or negative?", "A warm, clever film.", ["positive", "negative"])
    'Is this review positive or negative?\\n\\nA warm, clever film.\\n\\nOPTIONS:\\n- positive\\n- negative'
    """
    return join_parts(instruction, input, options_block(options))
