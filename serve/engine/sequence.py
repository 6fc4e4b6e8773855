"""What the engine keeps of a request: one object a sequence, one a prompt that sequences share, one a scoring job."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from serve.engine.cache import Slot
from serve.sampling_params import SamplingParams

TokenIds = tuple[int, ...]


@dataclass(eq=False, slots=True)
class Prompt:
    """A prompt in the cross pool, shared by every sequence and scoring job with the same ids.

    `encoded` is set once its row holds its keys and values; `suspect` when they may not be finite (a sequence that
    used them ended so, or encoding them failed): such a row is zeroed, never kept.
    """

    token_ids: TokenIds
    users: int = 0
    encoded: bool = False
    suspect: bool = False
    slot: Slot | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """One decoding stream.

    `token_ids` are the generated tokens. `position` counts the decoder inputs whose keys and values are in the cache:
    input 0 is the start token, input p the generated token p - 1. After a preemption `position` is 0 again and the
    sequence runs through its own tokens (`replaying`) before it makes new ones.
    """

    request_id: str
    index: int
    prompt_ids: TokenIds
    params: SamplingParams
    seed: int
    order: int  # age: smaller is older
    token_ids: list[int] = field(default_factory=list)
    position: int = 0
    prompt: Prompt | None = None
    slot: Slot | None = None

    @property
    def replaying(self) -> bool:
        """Whether the next step's token is known already."""
        return self.position < len(self.token_ids)

    @property
    def sample(self) -> int:
        """The sequence's number among those of its prompt (j of index = prompt · n + j)."""
        return self.index % self.params.n


@dataclass(eq=False, slots=True)
class ScoreJob:
    """Candidates to score after one prompt. `logprobs[i]` is candidate i's sum, as far as they are done."""

    request_id: str
    prompt_ids: TokenIds
    candidates: SequenceOf[TokenIds]
    order: int
    logprobs: list[float] = field(default_factory=list)
    prompt: Prompt | None = None

    @property
    def done(self) -> bool:
        return len(self.logprobs) == len(self.candidates)
