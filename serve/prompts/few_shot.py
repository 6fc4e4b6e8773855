"""The few-shot form: the task, solved cases as Q:/A: pairs, then the query with its answer left open.

The options stand with the query only; an exemplar that needs its own choices carries them in its input. Without an
`input` the instruction itself is the query, and no line stands above the exemplars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serve.prompts.formats import ANSWER_LABEL, QUESTION_LABEL, join_parts, options_block
from serve.request import Exemplar


def render(
    instruction: str,
    input: str | None = None,
    options: Sequence[str] = (),
    exemplars: Sequence[Exemplar] = (),
) -> str:
    """
    >>> render("Give the opposite.", "hot", exemplars=[Exemplar("big", "small")])
    'Give the opposite.\\n\\nQ: big\\nA: small\\n\\nQ: hot\\nA:'
    """
    return render_pairs(instruction, input, options, exemplars, lambda exemplar: exemplar.output.strip())


def render_pairs(
    instruction: str,
    input: str | None,
    options: Sequence[str],
    exemplars: Sequence[Exemplar],
    answer_text: Callable[[Exemplar], str],
) -> str:
    """Q:/A: pairs with each exemplar's answer as `answer_text` gives it."""
    header, query = header_and_query(instruction, input)
    pairs = [
        f"{QUESTION_LABEL} {exemplar.input.strip()}\n{ANSWER_LABEL} {answer_text(exemplar)}" for exemplar in exemplars
    ]
    question = "\n".join(part for part in (f"{QUESTION_LABEL} {query.strip()}", options_block(options)) if part)
    return join_parts(header, *pairs, f"{question}\n{ANSWER_LABEL}")


def header_and_query(instruction: str, input: str | None) -> tuple[str | None, str]:
    """What stands above the exemplars, and the question behind them."""
    return (None, instruction) if input is None or not input.strip() else (instruction, input)
