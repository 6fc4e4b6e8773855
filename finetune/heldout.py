"""Held-out cases as requests: what evaluation asks a running server, and how the answer is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.request import Exemplar


@dataclass(frozen=True, slots=True)
class HeldoutExample:
    """A held-out case for evaluation: the native request fields, the expected output and how to score it.

    `accepted` holds every right answer, `output` first.
    """

    task: str
    template_type: str
    mode: str
    instruction: str
    input: str | None
    options: tuple[str, ...]
    exemplars: tuple[Exemplar, ...]
    output: str
    accepted: tuple[str, ...]
    rationale: str | None
    metric: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object, one line of an evaluation file."""
        exemplars = [
            {"input": exemplar.input, "output": exemplar.output, "rationale": exemplar.rationale}
            for exemplar in self.exemplars
        ]
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {"options": list(self.options), "accepted": list(self.accepted), "exemplars": exemplars}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> HeldoutExample:
        """The inverse of `to_json`."""
        exemplars = tuple(Exemplar(**exemplar) for exemplar in fields["exemplars"])
        lists = {"options": tuple(fields["options"]), "accepted": tuple(fields["accepted"]), "exemplars": exemplars}
        return cls(**{**fields, **lists})
