"""Exemplars: solved cases of the same task, from its train rows, never the query itself.

Both training inputs and held-out requests take their exemplars here, with the same rules: all from one task; the query
left out, compared by its normalised key (its input, unless rows differ in more than that); k drawn by the caller's
seed; and where the whole would be too long, exemplars dropped from the front, as the server drops them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from finetune.templates import Template, TemplateError
from serve.prompts.formats import options_block
from serve.request import Exemplar

_TRIES_PER_EXEMPLAR = 8  # a draw can hit the query or a repeat; a tiny pool gives fewer exemplars, not an endless loop


def normalised(text: str) -> str:
    """What two texts are compared by: case and runs of white space do not count.

    >>> normalised("  A  Coin\\nis ") == normalised("a coin is")
    True
    """
    return " ".join(text.casefold().split())


def draw_exemplars(
    draw_row: Callable[[random.Random], Mapping[str, Any]],
    query: Mapping[str, Any],
    count: int,
    rng: random.Random,
) -> list[Mapping[str, Any]]:
    """`count` different rows that are not the query, or fewer where the pool has fewer.

    >>> pool = [{"key": "1"}, {"key": "2"}, {"key": "3"}]
    >>> sorted(row["key"] for row in draw_exemplars(lambda rng: rng.choice(pool), {"key": "2"}, 2, random.Random(0)))
    ['1', '3']
    """
    seen = {normalised(str(query["key"]))}
    drawn: list[Mapping[str, Any]] = []
    for _ in range(count * _TRIES_PER_EXEMPLAR):
        if len(drawn) == count:
            break
        row = draw_row(rng)
        text = normalised(str(row["key"]))
        if text not in seen:
            seen.add(text)
            drawn.append(row)
    return drawn


def to_exemplar(row: Mapping[str, Any], template: Template, query_instruction: str, task: str) -> Exemplar:
    """A row as an exemplar in the words of the query's template.

    Where the template has no input, the filled instruction is the exemplar's question, as it is the query's. Where it
    has one, the instruction stands once above all exemplars, so it must be the same for all of them: a template like
    `{instruction = "Is {word} in the list?", input = "{input}"}` has to say `types = ["zs_opt", "zs_noopt"]`.
    """
    instruction, input_text = template.fill(row, task)
    if input_text is not None and instruction != query_instruction:
        raise TemplateError(
            f"template {template.name} of task {task}: its instruction differs from row to row ({instruction!r} is not "
            f"{query_instruction!r}), so it cannot stand above exemplars; give it zero-shot types"
        )
    return Exemplar(instruction if input_text is None else input_text, str(row["output"]), row.get("rationale"))


def with_own_options(exemplar: Exemplar, options: Sequence[str]) -> Exemplar:
    """The exemplar with its choices in its question; a prompt shows apart from it the query's choices only.

    >>> with_own_options(Exemplar("a, b", "a"), ["a", "b"]).input
    'a, b\\nOPTIONS:\\n- a\\n- b'
    """
    block = options_block(options)
    return exemplar if block is None else replace(exemplar, input=f"{exemplar.input}\n{block}")


def fit(exemplars: Sequence[Exemplar], length_of: Callable[[Sequence[Exemplar]], int], limit: int) -> list[Exemplar]:
    """Drop exemplars from the front until `length_of` the rest is within `limit`; perhaps none is left.

    >>> cases = [Exemplar("a", "b"), Exemplar("c", "d")]
    >>> [case.input for case in fit(cases, lambda some: 10 * len(some), 15)]
    ['c']
    """
    kept = list(exemplars)
    while kept and length_of(kept) > limit:
        del kept[0]
    return kept
