"""Texts to classify: questions by the type of their answer, reviews by their tone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from finetune.generators.material import mend_articles, pick, pick_many, table

Row = dict[str, Any]


def question_type(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """A question and the type of its answer: person, place, time, number, reason, method or definition."""
    patterns = table("question_patterns")
    types = sorted(patterns)
    answer = rng.choice(types)
    place, place2 = pick_many(rng, "places", 2)
    text = rng.choice(patterns[answer]).format(
        name=pick(rng, "first_names"),
        job=pick(rng, "jobs"),
        object=pick(rng, "objects"),
        city=pick(rng, "cities"),
        country=pick(rng, "countries"),
        animal=rng.choice(table("categories")["animal"]["words"]),
        color=rng.choice(table("categories")["color"]["words"]),
        place=place,
        place2=place2,
    )
    text = mend_articles(text)
    return {"input": text, "output": answer, "options": types, "key": text}


def review_sentiment(rng: random.Random, settings: Mapping[str, Any]) -> Row:
    """A short review, positive or negative."""
    patterns = table("review_patterns")
    answer, opposite = rng.choice([("positive", "negative"), ("negative", "positive")])
    adjective, adjective2 = pick_many(rng, f"{answer}_adjectives", 2)
    subject, subject2 = rng.sample(patterns["subjects"], 2)
    text = rng.choice(patterns[answer]).format(
        subject=subject,
        subject2=subject2,
        adjective=adjective,
        adjective2=adjective2,
        opposite=pick(rng, f"{opposite}_adjectives"),
    )
    text = mend_articles(text)
    text = text[0].upper() + text[1:]
    return {"input": text, "output": answer, "options": ["positive", "negative"], "key": text}
