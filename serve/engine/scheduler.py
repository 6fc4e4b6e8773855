"""Decides what each step does; computes nothing (no torch here).

There are no phases. A step first gives room to the sequences that run, then takes in newcomers in the order they
came, then decodes all that run. It holds at most one bounded piece of other work - an encode batch *or* a chunk of
scoring, in turn - so nobody who runs waits longer than one such piece for its next token.

When room runs out, newcomers wait; if those who run still need more, the youngest gives up its rows and goes back to
the head of the queue with its tokens. The oldest always goes on, so everybody ends.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from serve.engine.cache import CacheOperation, Pool, Room, SavedPrompts
from serve.engine.config import EngineSettings
from serve.engine.sequence import Prompt, ScoreJob, Sequence, TokenIds


@dataclass(frozen=True, slots=True)
class ScoreChunk:
    """The candidates `first`..`last` - 1 of a job, to be scored in one go."""

    job: ScoreJob
    first: int
    last: int

    @property
    def candidates(self) -> tuple[TokenIds, ...]:
        return tuple(self.job.candidates[self.first : self.last])


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does, in this order."""

    operations: tuple[CacheOperation, ...]  # row copies, before anything is computed
    encode: tuple[Prompt, ...]  # prompts to encode in one ragged batch
    score: ScoreChunk | None  # never together with `encode`
    decode: tuple[Sequence, ...]  # by capacity, then row: the order of the self pool
    prompts: tuple[Prompt, ...]  # by capacity, then row: the order of the cross pool
    started: tuple[str, ...]  # requests whose first prompt this step takes in
    encoder_cache_hits: int  # prompts taken in without encoding them

    @property
    def encode_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.encode)


class Scheduler:
    """The queue, those who run, and the two pools."""

    def __init__(self, settings: EngineSettings, *, self_bytes_per_token: int, cross_bytes_per_token: int) -> None:
        self._settings = settings
        self.room = Room(settings.cache_bytes)
        self.self_pool: Pool[Sequence] = Pool("self", self_bytes_per_token, self.room)
        self.cross_pool: Pool[Prompt] = Pool("cross", cross_bytes_per_token, self.room)
        self.saved = SavedPrompts(settings.encoder_cache_bytes, self.room)
        self.waiting: deque[Sequence | ScoreJob] = deque()
        self.running: list[Sequence] = []
        self.scoring: deque[ScoreJob] = deque()
        self._prompts: dict[TokenIds, Prompt] = {}
        self._started: set[str] = set()
        self._unstarted: Counter[str] = Counter()  # requests of which nothing has begun: how much of each waits
        self._score_next = False  # whose turn: encoding or scoring

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.scoring or self.room.operations)

    @property
    def requests_waiting(self) -> int:
        """Requests of which nothing has begun yet."""
        return len(self._unstarted)

    def fits(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether such a request could run if it were alone."""
        needed = self.cross_pool.row_bytes(prompt_tokens)
        if max_tokens > 0:
            needed += self.self_pool.row_bytes(max_tokens)
        return needed <= self.room.total_bytes

    def add(self, item: Sequence | ScoreJob) -> None:
        self.waiting.append(item)
        if item.request_id not in self._started:
            self._unstarted[item.request_id] += 1

    def remove(self, item: Sequence | ScoreJob, *, clear: bool = False) -> None:
        """Take out a sequence or job wherever it is; its room is free at once. `clear`: its rows are not finite."""
        if item.prompt is None:
            self.waiting.remove(item)
            self._unstarted[item.request_id] -= 1
            if self._unstarted[item.request_id] <= 0:
                del self._unstarted[item.request_id]
            return
        if isinstance(item, Sequence):
            self.running.remove(item)
            self.self_pool.free(item, clear=clear)
        else:
            self.scoring.remove(item)
        self._release_prompt(item, clear=clear)

    def forget_request(self, request_id: str) -> None:
        """The request has ended."""
        self._started.discard(request_id)

    def plan(self) -> StepPlan:
        """Decide the next step. Everything it decides is already booked when it returns."""
        preempted = self._make_room_for_running()
        may_score, may_encode = self._turns()
        encode: list[Prompt] = []
        started: list[str] = []
        hits = 0
        if not preempted:  # or the newcomers would take the room that was just made
            encode, started, hits = self._admit(may_encode=may_encode)
        score = self._next_chunk() if may_score and not encode else None
        operations = tuple(self.room.operations)
        self.room.operations.clear()
        return StepPlan(
            operations=operations,
            encode=tuple(encode),
            score=score,
            decode=tuple(holder for rows in self.self_pool.rows().values() for holder in rows),
            prompts=tuple(holder for rows in self.cross_pool.rows().values() for holder in rows),
            started=tuple(started),
            encoder_cache_hits=hits,
        )

    def _turns(self) -> tuple[bool, bool]:
        """(may score, may encode): encoding and scoring alternate while both have work."""
        if not self.scoring:
            return False, True
        may_score = self._score_next
        self._score_next = not self._score_next
        waits = bool(self.waiting)
        return may_score or not waits, not may_score

    def _make_room_for_running(self) -> bool:
        """Give a larger row to each running sequence that needs one, oldest first; True if somebody was preempted."""
        needy = [s for s in self.running if s.slot is not None and s.position >= s.slot.capacity]
        preempted = False
        for sequence in sorted(needy, key=lambda s: s.order):
            while sequence.slot is not None and not self.self_pool.can_grow(sequence):
                everybody: list[Sequence | ScoreJob] = [*self.running, *self.scoring]
                self._preempt(max(everybody, key=lambda item: item.order))
                preempted = True
            if sequence.slot is not None:
                self.self_pool.grow(sequence)
        return preempted

    def _preempt(self, item: Sequence | ScoreJob) -> None:
        """Take back the rows of `item` and put it at the head of the queue; what it has produced stays with it."""
        self.remove(item)
        if isinstance(item, Sequence):
            item.position = 0
        self.waiting.appendleft(item)

    def _admit(self, *, may_encode: bool) -> tuple[list[Prompt], list[str], int]:
        """Take in newcomers, first come first served, until slots, room or the encode budget run out.

        Returns:
            The prompts to encode, the requests that begin, and how many prompts needed no encoding.
        """
        encode: list[Prompt] = []
        started: list[str] = []
        tokens = hits = 0
        while self.waiting and len(self.running) + len(self.scoring) < self._settings.max_running_sequences:
            item = self.waiting[0]
            prompt = self._prompts.get(item.prompt_ids)
            known = prompt is not None or item.prompt_ids in self.saved
            if not known:
                if not may_encode:
                    break
                if encode and tokens + len(item.prompt_ids) > self._settings.encode_tokens_per_step:
                    break
            if self._bytes_to_admit(item, prompt) > self.room.free_bytes:
                break
            self.waiting.popleft()
            if prompt is None:
                prompt = self._take_in_prompt(item.prompt_ids)
            if not known:
                encode.append(prompt)
                tokens += len(prompt.token_ids)
            elif isinstance(item, ScoreJob) or (item.sample == 0 and not item.token_ids):
                hits += 1
            self._begin(item, prompt)
            if item.request_id not in self._started:
                self._started.add(item.request_id)
                del self._unstarted[item.request_id]
                started.append(item.request_id)
        return encode, started, hits

    def _bytes_to_admit(self, item: Sequence | ScoreJob, prompt: Prompt | None) -> int:
        needed = 0 if prompt is not None else self.cross_pool.row_bytes(len(item.prompt_ids))
        if isinstance(item, Sequence):
            needed += self.self_pool.row_bytes(len(item.token_ids) + 1)
        return needed

    def _take_in_prompt(self, token_ids: TokenIds) -> Prompt:
        """Give a prompt its row, filled from the saved ones where it is there."""
        prompt = Prompt(token_ids)
        self.cross_pool.allocate(prompt, len(token_ids))
        self._prompts[token_ids] = prompt
        if token_ids in self.saved and prompt.slot is not None:
            self.saved.restore(token_ids, prompt.slot)
            prompt.encoded = True
        return prompt

    def _begin(self, item: Sequence | ScoreJob, prompt: Prompt) -> None:
        item.prompt = prompt
        prompt.users += 1
        if isinstance(item, Sequence):
            self.self_pool.allocate(item, len(item.token_ids) + 1)
            self.running.append(item)
        else:
            self.scoring.append(item)

    def _release_prompt(self, item: Sequence | ScoreJob, *, clear: bool) -> None:
        """`item` needs its prompt no more; the last one out keeps it aside for an identical prompt to come."""
        prompt = item.prompt
        item.prompt = None
        if prompt is None or prompt.slot is None:
            return
        prompt.users -= 1
        prompt.suspect = prompt.suspect or clear
        if prompt.users > 0:
            return
        del self._prompts[prompt.token_ids]
        if prompt.encoded and not prompt.suspect:
            num_bytes = self.cross_pool.exact_bytes(len(prompt.token_ids))
            self.saved.save(prompt.token_ids, prompt.slot, num_bytes)
        self.cross_pool.free(prompt, clear=prompt.suspect)

    def _next_chunk(self) -> ScoreChunk | None:
        """The next candidates of the oldest job that fit the step's bound; at least one."""
        if not self.scoring:
            return None
        job = self.scoring[0]
        first = last = len(job.logprobs)
        tokens = 0
        while last < len(job.candidates):
            tokens += len(job.candidates[last])
            if last > first and tokens > self._settings.encode_tokens_per_step:
                break
            last += 1
        return ScoreChunk(job, first, last)
