"""The scheduler on paper: no torch in the process, random arrivals and departures, no row lost, nobody starved."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.cache import CopyRow, RestoreRow, SaveRow, capacity_for
from serve.engine.config import EngineSettings
from serve.engine.scheduler import Scheduler, StepPlan
from serve.engine.sequence import Prompt, ScoreJob, Sequence
from serve.sampling_params import SamplingParams

BYTES_PER_TOKEN = 1


def make_scheduler(**options: int) -> Scheduler:
    limits = {"cache_bytes": 4096, "encoder_cache_bytes": 256, "max_running_sequences": 8, **options}
    return Scheduler(
        EngineSettings(**limits), self_bytes_per_token=BYTES_PER_TOKEN, cross_bytes_per_token=BYTES_PER_TOKEN
    )


def make_sequence(order: int, *, prompt: int = 10, max_tokens: int = 20, name: str | None = None) -> Sequence:
    ids = (order,) * (prompt - 1) + (1,)
    return Sequence(name or f"r{order}", 0, ids, SamplingParams(max_tokens=max_tokens), seed=0, order=order)


class Paper:
    """Carries out plans on paper: every row holds the tokens that its holder should find there."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.rows: dict[tuple[str, int, int], list[object]] = {}
        self.saved: dict[tuple[int, ...], list[object]] = {}

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        for operation in plan.operations:
            match operation:
                case CopyRow(pool, source, target):
                    self.rows[pool, *target] = list(self.rows[pool, *source])
                case SaveRow(key, capacity, row, length):
                    self.saved[key] = self.rows["cross", capacity, row][:length]
                case RestoreRow(key, capacity, row):
                    self.rows["cross", capacity, row] = self.saved.pop(key)
                case _:
                    self.saved.pop(getattr(operation, "key", ()), None)
        for prompt in plan.encode:
            self.row(prompt)[:] = prompt.token_ids
            prompt.encoded = True
        job = None if plan.score is None else plan.score.job
        if plan.score is not None and job is not None:
            assert job.prompt is not None
            assert tuple(self.row(job.prompt)) == job.prompt_ids
            job.logprobs += [0.0] * len(plan.score.candidates)
        for sequence in plan.decode:
            self._decode(sequence)
        # Only now may anybody leave, as in the engine: it moves other rows.
        leaving: list[Sequence | ScoreJob] = [*plan.decode, *([] if job is None else [job])]
        for item in leaving:
            if finished(item):
                self.scheduler.remove(item)
        self.check(plan)
        return plan

    def row(self, holder: Prompt | Sequence) -> list[object]:
        assert holder.slot is not None
        pool = "cross" if isinstance(holder, Prompt) else "self"
        return self.rows.setdefault((pool, holder.slot.capacity, holder.slot.row), [])

    def _decode(self, sequence: Sequence) -> None:
        assert sequence.prompt is not None
        assert sequence.slot is not None
        assert sequence.position < sequence.slot.capacity
        assert tuple(self.row(sequence.prompt)) == sequence.prompt_ids
        row = self.row(sequence)
        del row[sequence.position :]  # a new row still shows what its last holder wrote
        expected = [(sequence.order, position) for position in range(sequence.position)]
        assert row == expected
        row.append((sequence.order, sequence.position))
        known = sequence.replaying
        sequence.position += 1
        if not known:
            sequence.token_ids.append(0)

    def check(self, plan: StepPlan) -> None:
        scheduler = self.scheduler
        assert scheduler.room.used_bytes == scheduler.self_pool.used_bytes + scheduler.cross_pool.used_bytes
        assert 0 <= scheduler.room.used_bytes <= scheduler.room.total_bytes
        assert scheduler.requests_waiting == len({item.request_id for item in scheduler.waiting} - scheduler._started)
        assert not (plan.encode and plan.score)
        limit = scheduler._settings.encode_tokens_per_step
        assert plan.encode_tokens <= limit or len(plan.encode) == 1
        for pool in (scheduler.self_pool, scheduler.cross_pool):
            for capacity, holders in pool.rows().items():
                slots = [holder.slot for holder in holders]
                assert [(slot.capacity, slot.row) for slot in slots if slot] == [
                    (capacity, i) for i in range(len(slots))
                ]


def test_without_torch_in_the_process() -> None:
    """The decisions need no tensor: this file's own random play runs where torch was never imported."""
    code = """
import sys
sys.modules["torch"] = None  # importing it would raise
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence
from serve.engine.config import EngineSettings
from serve.sampling_params import SamplingParams
import random
rng = random.Random(0)
scheduler = Scheduler(EngineSettings(cache_bytes=2000, encoder_cache_bytes=100, max_running_sequences=6,
                                     encode_tokens_per_step=100), self_bytes_per_token=1, cross_bytes_per_token=1)
alive, done, aborted = {}, 0, 0
for step in range(60_000):
    if step < 2000 and rng.random() < 0.4:
        prompt = tuple([rng.randrange(9)] * rng.randint(1, 300))
        sequence = Sequence(f"r{step}", 0, prompt, SamplingParams(max_tokens=rng.randint(1, 200)), 0, step)
        assert scheduler.fits(len(prompt), sequence.params.max_tokens)
        scheduler.add(sequence)
        alive[step] = sequence
    if alive and rng.random() < 0.1:
        scheduler.remove(alive.pop(rng.choice(list(alive))))
        aborted += 1
    plan = scheduler.plan()
    for sequence in plan.decode:
        known = sequence.replaying
        sequence.position += 1
        if not known:
            sequence.token_ids.append(0)
            if len(sequence.token_ids) == sequence.params.max_tokens:
                scheduler.remove(alive.pop(sequence.order))
                done += 1
    for prompt in plan.encode:
        prompt.encoded = True
    if not scheduler.has_work and step > 2000:
        break
assert not alive and scheduler.room.used_bytes == 0, (len(alive), scheduler.room.used_bytes)
assert done > 100 and aborted > 50, (done, aborted)
assert sys.modules["torch"] is None
print("done", done, aborted)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("done")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_play_loses_nothing(data: st.DataObject) -> None:
    """Whatever arrives and leaves, rows hold what their holders wrote, and all that stay are finished."""
    scheduler = make_scheduler(
        cache_bytes=data.draw(st.integers(700, 3000)), encode_tokens_per_step=data.draw(st.integers(10, 300))
    )
    paper = Paper(scheduler)
    alive: list[Sequence | ScoreJob] = []
    for order in range(data.draw(st.integers(1, 25))):
        ids = (data.draw(st.integers(2, 5)),) * data.draw(st.integers(1, 200))
        item: Sequence | ScoreJob
        if data.draw(st.booleans()) or order % 5:
            params = SamplingParams(max_tokens=data.draw(st.integers(1, 120)))
            item = Sequence(f"r{order}", 0, ids, params, 0, order)
        else:
            item = ScoreJob(f"r{order}", ids, [(7,) * 30] * data.draw(st.integers(1, 9)), order)
        assert scheduler.fits(len(ids), 120)
        scheduler.add(item)
        alive.append(item)
        for _ in range(data.draw(st.integers(0, 12))):
            paper.step()
        alive = [one for one in alive if not finished(one)]
        if alive and data.draw(st.integers(0, 4)) == 0:
            scheduler.remove(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
    for _ in range(20_000):
        if not scheduler.has_work:
            break
        paper.step()
    assert all(finished(one) for one in alive)
    assert scheduler.room.used_bytes == 0
    assert not scheduler.self_pool.rows()
    assert not scheduler.cross_pool.rows()


def finished(item: Sequence | ScoreJob) -> bool:
    return item.done if isinstance(item, ScoreJob) else len(item.token_ids) == item.params.max_tokens


def test_newcomers_come_in_order_and_within_the_encode_budget() -> None:
    scheduler = make_scheduler(encode_tokens_per_step=25)
    for order in range(4):
        scheduler.add(make_sequence(order))
    scheduler.add(make_sequence(4, prompt=100))  # longer than the budget: goes alone
    paper = Paper(scheduler)
    plans = [paper.step() for _ in range(3)]
    assert [[p.token_ids[0] for p in plan.encode] for plan in plans] == [[0, 1], [2, 3], [4]]
    assert [len(plan.decode) for plan in plans] == [2, 4, 5]  # a decode step between any two encode batches
    assert [plan.started for plan in plans] == [("r0", "r1"), ("r2", "r3"), ("r4",)]


def test_scoring_and_encoding_take_turns() -> None:
    scheduler = make_scheduler(encode_tokens_per_step=10)
    scheduler.add(ScoreJob("s", (9, 9, 1), [(5,) * 10] * 3, order=0))
    for order in range(1, 4):
        scheduler.add(make_sequence(order))
    paper = Paper(scheduler)
    kinds = []
    for _ in range(7):
        plan = paper.step()
        kinds.append("encode" if plan.encode else "score" if plan.score else "-")
    assert kinds[0] == "encode"
    assert sorted(kinds[:7]) == sorted(["encode"] * 4 + ["score"] * 3)
    assert ("score", "score") not in pairwise(kinds)


def test_the_same_prompt_is_encoded_once_and_shared() -> None:
    scheduler = make_scheduler()
    first, second = make_sequence(0), make_sequence(1)
    second.prompt_ids = first.prompt_ids
    scheduler.add(first)
    scheduler.add(second)
    paper = Paper(scheduler)
    plan = paper.step()
    assert len(plan.encode) == 1
    assert plan.encoder_cache_hits == 1
    assert len(plan.prompts) == 1
    while scheduler.has_work:
        paper.step()
    third = make_sequence(2)
    third.prompt_ids = first.prompt_ids
    scheduler.add(third)
    plan = paper.step()
    assert plan.encode == ()
    assert plan.encoder_cache_hits == 1
    assert any(isinstance(operation, RestoreRow) for operation in plan.operations)


def test_rows_follow_what_is_used() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(0, prompt=20, max_tokens=500))
    paper = Paper(scheduler)
    paper.step()
    assert scheduler.room.used_bytes == 32 + 16  # not 2,048, nor 500
    for _ in range(16):
        paper.step()
    assert scheduler.room.used_bytes == 32 + 32
    assert [capacity_for(length) for length in (1, 16, 17, 32, 33, 500)] == [16, 16, 32, 32, 64, 512]


def test_the_youngest_gives_way_and_comes_back_with_its_tokens() -> None:
    scheduler = make_scheduler(cache_bytes=120, encoder_cache_bytes=0)
    old, young = make_sequence(0, prompt=16, max_tokens=60), make_sequence(1, prompt=16, max_tokens=60)
    scheduler.add(old)
    scheduler.add(young)
    paper = Paper(scheduler)
    while scheduler.has_work:
        before = len(young.token_ids)
        paper.step()
        assert len(young.token_ids) >= before
        assert old.prompt is not None or len(old.token_ids) == 60  # the oldest never gives way
    assert len(old.token_ids) == len(young.token_ids) == 60
