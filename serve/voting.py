"""Self-consistency: samples vote on answers.

Answers are compared normalised (numbers as numbers), the most frequent wins, null never beats an answer. A tie goes
to the higher summed log-probability, then to the lower index. The result depends on the set of samples, not their
order.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serve.output import Vote

_CURRENCIES = "$€£¥₹"
_EDGES = " \t\n.,:;!?\"'()[]“”‘’*"
_NUMBER = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+|\d+)?(?:\.(\d*))?")
_MINUS_SIGNS = str.maketrans("−‒–﹣", "----")


@dataclass(frozen=True, slots=True)
class Ballot:
    """One sample's answer. `logprob` is the sum over its tokens."""

    index: int
    answer: str | None
    logprob: float


@dataclass(frozen=True, slots=True)
class Result:
    """`answer` None: nobody gave one. `votes`: the winner first, null last."""

    answer: str | None
    votes: tuple[Vote, ...]
    tie: bool


def vote(ballots: Sequence[Ballot]) -> Result:
    """
    >>> vote([Ballot(0, "7", -1.0), Ballot(1, "5", -2.0), Ballot(2, "$5.00", -3.0)]).answer
    '5'
    >>> vote([Ballot(0, None, -1.0), Ballot(1, None, -1.0), Ballot(2, "4", -9.0)]).answer
    '4'
    """
    groups: dict[str | None, list[Ballot]] = {}
    for ballot in sorted(ballots, key=lambda ballot: ballot.index):
        groups.setdefault(None if ballot.answer is None else normalise(ballot.answer), []).append(ballot)
    ranked = sorted(groups.items(), key=lambda item: _rank(item[0], item[1]))
    top = max((ballot.logprob for ballot in ballots), default=0.0)
    total = math.fsum(math.exp(ballot.logprob - top) for ballot in ballots)
    votes = tuple(
        Vote(
            answer=None if key is None else _spelling(group),
            count=len(group),
            weight=math.fsum(math.exp(ballot.logprob - top) for ballot in group) / total,
        )
        for key, group in ranked
    )
    counts = [len(group) for key, group in ranked if key is not None]
    return Result(votes[0].answer if votes else None, votes, len(counts) > 1 and counts[0] == counts[1])


def normalise(answer: str) -> str:
    """The form in which answers are compared.

    >>> [normalise(text) for text in ("5", "5.0", "$5", "5,000", "5000.00", "(B)", " Yes. ")]
    ['5', '5', '5', '5000', '5000', 'b', 'yes']
    """
    text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    number = _number(text)
    if number is not None:
        return number
    bare = text.strip(_EDGES)
    number = _number(bare)
    if number is not None:
        return number
    return bare if bare else text


def _number(text: str) -> str | None:
    """A canonical decimal number, or None. String work, so that no digit of a long number is rounded away."""
    digits = "".join(_ascii_digit(character) for character in text.translate(_MINUS_SIGNS))
    sign, digits = (digits[0], digits[1:].lstrip()) if digits[:1] in ("-", "+") else ("", digits)
    digits = digits.strip(_CURRENCIES).strip()
    found = _NUMBER.fullmatch(sign + digits)
    if found is None or not (found[2] or found[3]):
        return None
    whole = (found[2] if found[2] is not None else "").replace(",", "").lstrip("0")
    fraction = (found[3] if found[3] is not None else "").rstrip("0")
    value = (whole if whole else "0") + (f".{fraction}" if fraction else "")
    return f"-{value}" if found[1] == "-" and value != "0" else value


def _ascii_digit(character: str) -> str:
    value = unicodedata.decimal(character, None)
    return character if value is None else str(value)


def _rank(key: str | None, group: list[Ballot]) -> tuple[bool, int, float, int]:
    return (key is None, -len(group), -math.fsum(ballot.logprob for ballot in group), group[0].index)


def _spelling(group: list[Ballot]) -> str:
    """How the group's answer is shown: its most frequent spelling, then the shortest, then the first by alphabet."""
    spellings = Counter(ballot.answer.strip() for ballot in group if ballot.answer is not None)
    return min(spellings, key=lambda text: (-spellings[text], len(text), text))
