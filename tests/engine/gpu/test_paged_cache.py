"""The paged cache under a scheduler with random arrivals: every holder finds its own keys, and no page has two."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from serve.engine.cache import Slot, capacity_for
from serve.engine.config import EngineSettings
from serve.engine.gpu.page_table import PAGE, PageTable
from serve.engine.gpu.paged_cache import PagedCache
from serve.engine.runner import rows_in_use
from serve.engine.scheduler import Scheduler, StepPlan
from serve.engine.sequence import Prompt, Sequence
from serve.sampling_params import SamplingParams

BYTES_PER_TOKEN = 2 * 4  # one layer, one head, one number: a key and a value in float32
CPU = torch.device("cpu")


class Machine:
    """A scheduler and the cache; a prompt's keys are its ids, a sequence's its age and its positions."""

    def __init__(self, pages: int, *, max_running: int) -> None:
        limit = pages * PAGE * BYTES_PER_TOKEN
        self.scheduler = Scheduler(
            EngineSettings(max_running, 64, limit, 60 * BYTES_PER_TOKEN),
            self_bytes_per_token=BYTES_PER_TOKEN,
            cross_bytes_per_token=BYTES_PER_TOKEN,
        )
        self.cache = PagedCache(1, 1, 1, cache_bytes=limit, device=CPU, dtype=torch.float32)
        self.cache.arena.fill_(-1.0)

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        self.cache.apply(plan.operations)
        self.cache.settle(rows_in_use(plan.decode), rows_in_use(plan.prompts))
        for prompt in plan.encode:
            pages, offsets = self.cache.positions([prompt])
            self.cache.arena[0, pages, :, 0, offsets, 0] = torch.tensor(prompt.token_ids).float()[:, None]
            prompt.encoded = True
        for sequence in plan.decode:
            self.keys("self", sequence)[sequence.position] = key_of(sequence, sequence.position)
            sequence.position += 1
            if sequence.position > len(sequence.token_ids):
                sequence.token_ids.append(0)
        self.check(plan)
        return plan

    def keys(self, pool: str, holder: Prompt | Sequence) -> Paged:
        slot = holder.slot
        assert slot is not None
        first = self.cache.first(pool, holder)
        return Paged(self.cache.arena, self.cache.page_numbers[first : first + slot.capacity // PAGE])

    def check(self, plan: StepPlan) -> None:
        """What the kernels would read, through the numbers that they read it by."""
        taken: list[int] = []
        for prompt in plan.prompts:
            keys = self.keys("cross", prompt)
            assert [keys[place] for place in range(len(prompt.token_ids))] == list(prompt.token_ids)
            assert self.cache.prompt(prompt)[0, 0, 0, :, 0].tolist() == list(prompt.token_ids)
            taken += keys.pages
        for sequence in plan.decode:
            keys = self.keys("self", sequence)
            mine = [key_of(sequence, place) for place in range(sequence.position)]
            assert [keys[place] for place in range(sequence.position)] == mine
            taken += keys.pages
        assert 0 not in taken, "page 0 is the padding's"
        assert len(set(taken)) == len(taken)
        assert self.cache.table.free_pages == self.cache.table.pages - len(taken)
        assert self.cache.saved_bytes == self.scheduler.saved.used_bytes


class Paged:
    """A row's keys by position."""

    def __init__(self, arena: Tensor, pages: Tensor) -> None:
        self.pages: list[int] = pages.tolist()
        self._arena = arena

    def __getitem__(self, place: int) -> float:
        return float(self._arena[0, self.pages[place // PAGE], 0, 0, place % PAGE, 0])

    def __setitem__(self, place: int, key: float) -> None:
        self._arena[0, self.pages[place // PAGE], :, 0, place % PAGE, 0] = key


def key_of(sequence: Sequence, place: int) -> float:
    return sequence.order * 1000.0 + place


@pytest.mark.parametrize("seed", range(8))
def test_everybody_finds_what_was_written(seed: int) -> None:
    rng = random.Random(seed)
    machine = Machine(rng.choice((14, 20, 40)), max_running=rng.randint(2, 8))
    prompts = [tuple(rng.randrange(100) for _ in range(rng.choice((1, 16, 17, 33, 50)))) for _ in range(6)]
    alive: list[Sequence] = []
    ages = iter(range(10_000))
    hits = 0
    for number in range(150):
        if number < 110 and rng.random() < 0.4:
            params = SamplingParams(max_tokens=rng.choice((1, 15, 16, 17, 70)))
            sequence = Sequence(str(number), 0, rng.choice(prompts), params, 0, next(ages))
            machine.scheduler.add(sequence)
            alive.append(sequence)
        hits += machine.step().encoder_cache_hits
        for sequence in list(alive):
            if len(sequence.token_ids) >= sequence.params.max_tokens or rng.random() < 0.01:  # or it is aborted
                machine.scheduler.remove(sequence, clear=rng.random() < 0.1)
                alive.remove(sequence)
    for sequence in alive:
        machine.scheduler.remove(sequence)
    machine.step()
    assert hits > 0
    assert machine.cache.table.free_pages == machine.cache.table.pages


def test_a_row_that_grows_keeps_its_pages_where_they_are() -> None:
    table = PageTable(6)
    table.settle({PAGE: 2}, {})
    before = table.of("self", (PAGE, 1)).tolist()
    table.move("self", (PAGE, 1), (2 * PAGE, 0))
    table.settle({PAGE: 1, 2 * PAGE: 1}, {})
    after = table.of("self", (2 * PAGE, 0)).tolist()
    assert after[:1] == before
    assert len(set(after)) == capacity_for(2 * PAGE) // PAGE == 2
    assert table.flat[table.first("self", 2 * PAGE, 0) :][:2].tolist() == after


def test_nothing_is_told_anew_when_nobody_came_or_went() -> None:
    table = PageTable(4)
    assert table.settle({PAGE: 2}, {PAGE: 1})
    assert not table.settle({PAGE: 2}, {PAGE: 1})
    assert table.settle({PAGE: 1}, {PAGE: 1})


def test_more_pages_than_there_are_is_a_fault_of_the_books() -> None:
    with pytest.raises(ValueError, match="the books are wrong"):
        PageTable(2).settle({2 * PAGE: 1}, {PAGE: 1})


def test_who_has_no_row_cannot_be_in_a_batch() -> None:
    cache = PagedCache(1, 1, 1, cache_bytes=4 * PAGE * BYTES_PER_TOKEN, device=CPU, dtype=torch.float32)
    for holder in (None, Prompt((1,))):
        with pytest.raises(ValueError, match="only holders of a row"):
            cache.first("cross", holder)
    with pytest.raises(ValueError, match="only a prompt with a row"):
        cache.prompt(Prompt((1,)))
    prompt = Prompt((1,), slot=Slot(PAGE, 0))
    cache.settle({}, {PAGE: 1})
    assert cache.first("cross", prompt) == 1
