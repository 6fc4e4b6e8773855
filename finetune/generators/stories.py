"""Short made-up stories: who is where, who has what, and two-step number stories with their chain."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from finetune.generators.material import pick_many, table, with_article

Row = dict[str, Any]

_WHERE = ("{name} is in the {thing}.", "{name} went to the {thing}.", "{name} works in the {thing}.")
_HAS = ("{name} has {a_thing}.", "{name} bought {a_thing}.", "{name} found {a_thing}.")


def story_question(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """Two or three facts about people, and a question that one of them answers with a word of the story."""
    count = rng.randint(2, 3)
    names = pick_many(rng, "first_names", count)
    about_places = rng.random() < 0.5
    things = pick_many(rng, "places" if about_places else "objects", count)
    facts = [
        rng.choice(_WHERE if about_places else _HAS).format(name=name, thing=thing, a_thing=with_article(thing))
        for name, thing in zip(names, things, strict=True)
    ]
    index = rng.randrange(count)
    asks_name = rng.random() < 0.4
    if about_places:
        question = f"Who is in the {things[index]}?" if asks_name else f"Where is {names[index]}?"
    else:
        question = f"Who has the {things[index]}?" if asks_name else f"What does {names[index]} have?"
    story = " ".join(facts)
    return {
        "input": f"{story} {question}",
        "output": names[index] if asks_name else things[index],
        "rationale": f"The story says: {facts[index]}",
        "key": f"{story} {question}",
        "story": story,
        "question": question,
    }


def word_problem(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """A story in two steps of addition and subtraction, no number above `max_number` (30)."""
    problem = rng.choice(table("word_problems")["problem"])
    first_sign, second_sign = problem["steps"]
    limit = int(settings.get("max_number", 30))
    start = rng.randint(4, limit - 8)
    middle, first = _step(rng, start, first_sign, limit)
    end, second = _step(rng, middle, second_sign, limit)
    name, name2 = pick_many(rng, "first_names", 2)
    things = pick_many(rng, "countables", 1)[0]
    text = problem["text"].format(name=name, name2=name2, a=start, b=first, c=second, things=things)
    rationale = f"{start} {first_sign} {first} = {middle}. {middle} {second_sign} {second} = {end}."
    return {
        "input": text,
        "output": str(end),
        "rationale": rationale,
        "key": f"{problem['steps']} {start} {first} {second}",
    }


def _step(rng: random.Random, value: int, sign: str, limit: int) -> tuple[int, int]:
    """The value after one step and the number added or taken, which is at least 1."""
    if sign == "+":
        number = rng.randint(1, max(1, min(10, limit - value)))
        return value + number, number
    number = rng.randint(1, max(1, min(10, value - 1)))
    return value - number, number
