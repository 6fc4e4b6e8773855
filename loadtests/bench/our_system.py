"""Our engine as a system under test: built as the torch runtime builds it, driven step by step."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from loadtests.bench import modes
from loadtests.bench.prompts import Request
from loadtests.bench.system import OnToken, Place, System, Tokens, Tuning
from serve.engine.config import EngineSettings
from serve.engine.engine import Engine
from serve.engine.loading import make_engine
from serve.engine.model import T5Model
from serve.engine.step_output import StepOutput
from serve.sampling_params import SamplingParams

NAME = "ours"
_CACHE_SHARE, _MAX_CACHE_BYTES, _CUDA_CACHE_SHARE = 0.25, 4 << 30, 0.8  # the torch runtime's
_ENCODER_CACHE_SHARE = 8  # one part in so many is for prompts that are not in use


def engine_settings(place: Place) -> EngineSettings:
    """What `place` says, with the memory that `flan-serve` would choose by itself on this machine."""
    if place.device == "cuda":
        total = int(torch.cuda.mem_get_info()[0] * _CUDA_CACHE_SHARE)
    else:
        total = min(_MAX_CACHE_BYTES, int(psutil.virtual_memory().total * _CACHE_SHARE))
    saved = total // _ENCODER_CACHE_SHARE
    return EngineSettings(place.max_running, place.encode_tokens_per_step, total - saved, saved)


@dataclass(frozen=True, slots=True)
class Job:
    """A request to the engine, with the place its tokens are told under."""

    place: int
    ids: tuple[int, ...]
    params: SamplingParams


class OurSystem:
    """See loadtests.bench.system.System."""

    name = NAME

    def __init__(self, place: Place, setting: str, model: T5Model | None = None) -> None:
        """`model` None reads the folder of `place`."""
        self.setting = setting
        torch.set_num_threads(place.threads)
        self._threads = place.threads
        self._model = modes.load(setting, place) if model is None else model
        self._settings = engine_settings(place)
        self.encode_tokens_per_step = place.encode_tokens_per_step
        self.vocab_size = self._model.config.vocab_size
        self.engine: Engine = make_engine(self._model, self._settings)
        self._keys = itertools.count()
        self.encoded_tokens = 0  # prompt tokens so far, as the engine counts them

    def restart(self, *, encoder_cache_bytes: int) -> None:
        """A new engine, with so much room for prompts that are not in use."""
        self.engine = make_engine(self._model, replace(self._settings, encoder_cache_bytes=encoder_cache_bytes))

    def candidates(self, count: int) -> list[Tuning]:
        del count
        return [Tuning(threads=self._threads)]

    def use(self, tuning: Tuning) -> None:
        """There is nothing to choose: the engine batches by itself."""

    def generate(self, requests: Sequence[Request], *, at_once: int = 0, on_token: OnToken | None = None) -> Tokens:
        tokens: Tokens = [[] for _ in requests]
        jobs = [Job(place, request.ids, forced(request.length)) for place, request in enumerate(requests)]

        def take(place: int, index: int, ids: tuple[int, ...]) -> None:
            del index
            tokens[place] += ids
            if on_token is not None:
                for _ in ids:
                    on_token(place)

        self.run(jobs, take, at_once=at_once)
        return tokens

    def sample(self, request: Request, count: int, seed: int) -> Tokens:
        params = forced(request.length, temperature=1.0, n=count, seed=seed)
        tokens: Tokens = [[] for _ in range(count)]
        self.run([Job(0, request.ids, params)], lambda _place, index, ids: tokens[index].extend(ids))
        return tokens

    def score(self, ids: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[float]:
        key = self._key()
        self.engine.add_score(key, tuple(ids), [tuple(candidate) for candidate in candidates])
        while self.engine.has_work:
            result = self.engine.step().scores.get(key)
            if result is not None:
                if result.error is not None:
                    raise RuntimeError(result.error)
                return [logprob for logprob, _ in result.scores]
        raise RuntimeError("the engine forgot a score")

    def serve(self, requests: Sequence[Request], due: Sequence[float]) -> list[list[float]]:
        told: list[list[float]] = [[] for _ in requests]
        places: dict[str, int] = {}
        began = time.perf_counter()
        first = 0
        while first < len(requests) or self.engine.has_work:
            now = time.perf_counter() - began
            while first < len(requests) and due[first] <= now:
                places[self.submit(requests[first])] = first
                first += 1
            if not self.engine.has_work:
                time.sleep(max(0.0, due[first] - now))
                continue
            output = self.step()
            now = time.perf_counter() - began
            for key, deltas in output.deltas.items():
                told[places[key]] += [now for delta in deltas for _ in delta.token_ids]
        return told

    def run(self, jobs: Sequence[Job], take: Callable[[int, int, tuple[int, ...]], None], *, at_once: int = 0) -> None:
        """Run jobs to their end, `at_once` (0 = no bound) of them in the engine; `take(place, index, ids)` gets all."""
        waiting = deque(jobs)
        places: dict[str, Job] = {}
        left: dict[str, int] = {}
        while waiting or left:
            while waiting and (at_once == 0 or len(left) < at_once):
                job = waiting.popleft()
                key = self._key()
                self.engine.add(key, [job.ids], job.params)
                places[key], left[key] = job, job.params.n
            for key, deltas in self.step().deltas.items():
                for delta in deltas:
                    take(places[key].place, delta.index, delta.token_ids)
                    left[key] -= delta.finish_reason is not None
                if left[key] == 0:
                    del left[key], places[key]

    def submit(self, request: Request) -> str:
        """Queue one request of forced length; returns its key."""
        key = self._key()
        self.engine.add(key, [request.ids], forced(request.length))
        return key

    def step(self) -> StepOutput:
        """One step of the engine.

        Raises:
            RuntimeError: a request ended with an error, which no measurement can use.
        """
        output = self.engine.step()
        if output.stats is not None:
            self.encoded_tokens += output.stats.encode_tokens
        for deltas in output.deltas.values():
            for delta in deltas:
                if delta.error is not None:
                    raise RuntimeError(f"the engine refused a request: {delta.error}")
        return output

    def _key(self) -> str:
        return str(next(self._keys))


def forced(length: int, *, temperature: float = 0.0, n: int = 1, seed: int | None = None) -> SamplingParams:
    """Parameters of a request that makes exactly `length` tokens."""
    return SamplingParams(max_tokens=length, temperature=temperature, n=n, seed=seed, ignore_eos=True)


def ours(system: System) -> OurSystem:
    """The system as ours.

    Raises:
        TypeError: it is a peer, which the caller cannot drive step by step.
    """
    if not isinstance(system, OurSystem):
        raise TypeError(f"{system.name} cannot be driven step by step")
    return system
