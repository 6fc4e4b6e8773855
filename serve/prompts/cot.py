"""Chain of thought: how reasoning is asked for, how it is written in training targets, how it is taken apart.

Zero exemplars: the trigger sentence ends the prompt. With exemplars: Q:/A: pairs whose answers show the rationale
and then "The answer is X."; the query's answer is left open.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from serve.prompts import few_shot
from serve.prompts.formats import ANSWER_MARKER, COT_TRIGGER, join_parts, options_block
from serve.request import Exemplar

_MARKER = re.compile(r"\b(?:the\s+)?(?:final\s+)?answer\s+is\b\s*:?", re.IGNORECASE)
# A full stop, question or exclamation mark that ends the answer: white space or the end follows. A stop after a
# single capital letter or a title ("U.S. Army", "Dr. King") does not end a sentence; one inside 3.14 has no space.
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_NOT_AN_END = re.compile(r"(?:^|[\s.(])(?:[A-Z]|Dr|Mr|Mrs|Ms|St|Jr|Sr|Prof|vs|No|Mt)\.$")
_NUMBER = re.compile(r"[-+]?\$?\s?\d[\d,]*(?:\.\d+)?")
_ANSWER_EDGES = " \t\n:\"'"


def render(
    instruction: str,
    input: str | None = None,
    options: Sequence[str] = (),
    exemplars: Sequence[Exemplar] = (),
) -> str:
    """
    >>> render("How many legs have two cats?")
    "How many legs have two cats?\\n\\nLet's think step by step."
    >>> render("How many legs have two cats?", exemplars=[Exemplar("1+1+1?", "3", "1+1 is 2, and 1 more is 3.")])
    'Q: 1+1+1?\\nA: 1+1 is 2, and 1 more is 3. The answer is 3.\\n\\nQ: How many legs have two cats?\\nA:'
    """
    if not exemplars:
        return join_parts(instruction, input, options_block(options), COT_TRIGGER)
    return few_shot.render_pairs(
        instruction, input, options, exemplars, lambda exemplar: render_answer(exemplar.output, exemplar.rationale)
    )


def render_answer(output: str, rationale: str | None) -> str:
    """The answer as a chain: what an exemplar shows and what a training target is.

    >>> render_answer("12", "3 times 4 is 12")
    '3 times 4 is 12. The answer is 12.'
    """
    chain = (rationale or "").strip()
    if chain and chain[-1] not in ".!?":
        chain += "."
    answer = output.strip().rstrip(".")
    return f"{chain} {ANSWER_MARKER} {answer}.".strip()


@dataclass(frozen=True, slots=True)
class CotParts:
    """A chain-of-thought text taken apart. `text` ends with the answer's sentence; what came after is cut.

    `complete` is True once nothing that follows can change `text`.
    """

    text: str
    rationale: str
    answer: str | None
    complete: bool


def split(text: str, *, ended: bool = True) -> CotParts:
    """Take a chain apart at the first answer marker.

    With `ended` False the text is still growing: a stop at its very end is not yet taken as the answer's end.

    >>> split("3 times 4 is 12. The answer is 12. Q: And 5? The answer is 7.")
    CotParts(text='3 times 4 is 12. The answer is 12.', rationale='3 times 4 is 12.', answer='12', complete=True)
    >>> split("I do not know").answer is None
    True
    """
    marker = _MARKER.search(text)
    if marker is None:
        return CotParts(text, text.strip(), None, False)
    end = _answer_end(text, marker.end(), ended)
    stop = len(text) if end is None else end
    answer = text[marker.end() : stop].strip(_ANSWER_EDGES).rstrip(".!?").strip(_ANSWER_EDGES)
    return CotParts(text[:stop], text[: marker.start()].strip(), answer or None, end is not None)


def last_number(text: str) -> str | None:
    """The last number of a text, for `answer_format: "number"` where no marker was written.

    >>> last_number("so 3 boxes cost $1,250.50 in all")
    '1250.50'
    """
    found = _NUMBER.findall(text)
    return re.sub(r"[,$\s]", "", found[-1]) if found else None


def _answer_end(text: str, start: int, ended: bool) -> int | None:
    """Index just after the answer's sentence, or None while it may still go on."""
    newline = text.find("\n", _skip_space(text, start))
    for match in _SENTENCE_END.finditer(text, _skip_space(text, start)):
        if newline != -1 and match.end() > newline:
            return newline
        at_end = match.end() == len(text)
        if at_end and not ended:
            return None
        sentence = text[start : match.end()].strip(_ANSWER_EDGES + "(.)")
        if not at_end and len(sentence) > 1 and _NOT_AN_END.search(text[start : match.end()]):
            continue
        return match.end()
    return newline if newline != -1 else None


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start
