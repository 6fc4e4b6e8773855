"""A runtime without a model: it emits given token ids at a given pace and fails where it is told to.

    runtime = ScriptedRuntime([5, 6, 7, EOS])                      # every sequence says the same
    runtime = ScriptedRuntime([[5, 1], [6, 1]])                    # sequence i of a request takes script i (cyclic)
    runtime = ScriptedRuntime(lambda request, index: [...])        # anything else
    runtime.say(tokenizer, "The answer is 4.")                     # text, EOS added

    service = scripted_service("Paris is it")                      # a whole Service over a small T5-like tokenizer

It keeps the contract of `serve.runtimes.base`: max_tokens ends a sequence with `length`, EOS with `stop` (not under
ignore_eos), `finish` and `aclose` free rooms at once, `kill` fails every waiter, `freeze` makes it hang.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve.errors import EngineFailure
from serve.metrics import Metrics
from serve.output import FinishReason, TokenDelta, TokenLogprob
from serve.request import PreparedRequest, PreparedScore
from serve.runtimes.base import OnStep, RuntimeInfo, StepStats
from serve.service import Service, ServiceSettings
from serve.tokenizer import Tokenizer
from tests.service.toy_tokenizers import t5_like

EOS = 1
Script = Sequence[int] | Sequence[Sequence[int]] | Callable[[PreparedRequest, int], Sequence[int]]


@dataclass
class ScriptedRuntime:
    """
    Args:
        script: token ids of the sequences; give EOS where one is to end by itself (else `max_tokens` ends it, and a
            script that is used up goes on with its last id).
        pace_seconds: time of a step. 0 = no more than a turn of the event loop.
        start_seconds: time until a request has `started`.
        tokens_per_delta: tokens that one delta carries (a runtime may merge).
        fail_at_step: the whole engine dies at this step of any request (0 = its first).
        fail_sequences: {sequence index: step}: that sequence ends with FinishReason.ERROR there.
        logprob: log-probability of a sequence's tokens by sequence index.
        is_encoder_decoder, context_length: what `info` says.
    """

    script: Script = (EOS,)
    pace_seconds: float = 0.0
    start_seconds: float = 0.0
    tokens_per_delta: int = 1
    fail_at_step: int | None = None
    fail_sequences: dict[int, int] = field(default_factory=dict)
    logprob: Callable[[int], float] = lambda index: -0.5 - 0.01 * index
    candidate_logprob: Callable[[Sequence[int]], float] = lambda ids: -float(len(ids))
    score_seconds: float = 0.0
    eos_id: int = EOS
    is_encoder_decoder: bool = True
    context_length: int | None = None
    max_running_sequences: int = 64
    on_step: OnStep | None = None

    def __post_init__(self) -> None:
        self.requests: list[PreparedRequest] = []  # every one given to `generate`, in order
        self.scores: list[PreparedScore] = []
        self.open_streams: set[ScriptedStream] = set()
        self.tokens_made = 0
        self.most_running = 0  # most sequences unfinished at one time
        self.stopped = False
        self.ill: str | None = None  # what `health` says
        self._dead: str | None = None
        self._thawed = asyncio.Event()
        self._thawed.set()

    @property
    def info(self) -> RuntimeInfo:
        return RuntimeInfo(
            runtime="scripted",
            architecture="T5ForConditionalGeneration" if self.is_encoder_decoder else "LlamaForCausalLM",
            is_encoder_decoder=self.is_encoder_decoder,
            context_length=self.context_length,
            dtype="float32",
            device="cpu",
            max_running_sequences=self.max_running_sequences,
        )

    @property
    def num_running(self) -> int:
        """Sequences that hold room now; 0 when nothing leaked."""
        return sum(len(stream.unfinished) for stream in self.open_streams)

    def say(self, tokenizer: Tokenizer, *texts: str) -> None:
        """Make sequence i of every request say text i (cyclic) and end."""
        self.script = [[*tokenizer.encode(text, add_special_tokens=False), self.eos_id] for text in texts]

    def tokens_of(self, request: PreparedRequest, index: int) -> Sequence[int]:
        if callable(self.script):
            return self.script(request, index)
        if self.script and not isinstance(self.script[0], int):
            chosen = self.script[index % len(self.script)]
            assert not isinstance(chosen, int)
            return chosen
        return [token_id for token_id in self.script if isinstance(token_id, int)]

    async def start(self) -> None:
        return None

    def generate(self, request: PreparedRequest) -> ScriptedStream:
        self.requests.append(request)
        stream = ScriptedStream(self, request)
        self.open_streams.add(stream)
        self.most_running = max(self.most_running, self.num_running)
        return stream

    async def score(self, request: PreparedScore) -> tuple[tuple[float, int], ...]:
        self.scores.append(request)
        await self.step(self.score_seconds)
        return tuple((self.candidate_logprob(ids), len(ids)) for ids in request.candidate_token_ids)

    def health(self) -> str | None:
        return self.ill

    async def stop(self) -> None:
        self.stopped = True
        self.kill("stopped")

    def kill(self, reason: str = "scripted death") -> None:
        """The engine dies: every waiter fails and health says why."""
        self.ill = self._dead = reason
        self._thawed.set()

    def freeze(self) -> None:
        """The engine hangs: no delta comes and no error. Set `ill` to make health notice."""
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()

    async def step(self, seconds: float) -> None:
        """Let a step's time pass.

        Raises:
            EngineFailure: dead.
        """
        await asyncio.sleep(seconds)
        await self._thawed.wait()
        if self._dead is not None:
            raise EngineFailure(self._dead)


class ScriptedStream:
    """A TokenStream: all sequences of a request take one step together, then their deltas are handed out."""

    def __init__(self, runtime: ScriptedRuntime, request: PreparedRequest) -> None:
        self._runtime = runtime
        self._request = request
        self._scripts = [list(runtime.tokens_of(request, index)) for index in range(request.num_sequences)]
        self._made = [0] * request.num_sequences
        self._ready: list[TokenDelta] = []
        self._step = 0
        self._due: float | None = None  # when the step under way is over, also if its waiter is cancelled meanwhile
        self.unfinished = set(range(request.num_sequences))

    def __aiter__(self) -> ScriptedStream:
        return self

    async def started(self) -> float:
        await self._pass(self._runtime.start_seconds)
        return time.monotonic()

    async def __anext__(self) -> TokenDelta:
        while not self._ready:
            if not self.unfinished:
                self._runtime.open_streams.discard(self)
                raise StopAsyncIteration
            await self._pass(self._runtime.pace_seconds)
            self._take_step()
        return self._ready.pop(0)

    def finish(self, index: int) -> None:
        self.unfinished.discard(index)
        self._ready = [delta for delta in self._ready if delta.index != index]

    async def aclose(self) -> None:
        self.unfinished.clear()
        self._ready.clear()
        self._runtime.open_streams.discard(self)

    async def _pass(self, seconds: float) -> None:
        now = asyncio.get_running_loop().time()
        if self._due is None:
            self._due = now + seconds
        await self._runtime.step(max(0.0, self._due - now))
        self._due = None

    def _take_step(self) -> None:
        runtime = self._runtime
        if runtime.fail_at_step is not None and self._step >= runtime.fail_at_step:
            runtime.kill("scripted death")
            raise EngineFailure("scripted death")
        for index in sorted(self.unfinished):
            self._ready.append(self._delta(index))
        self._step += 1
        if runtime.on_step is not None:
            stats = StepStats(decode_sequences=len(self._ready), decode_seconds=0.001, cache_usage=(("self", 0.5),))
            runtime.on_step(stats)

    def _delta(self, index: int) -> TokenDelta:
        runtime, sampling = self._runtime, self._request.sampling
        if runtime.fail_sequences.get(index) == self._step:
            self.unfinished.discard(index)
            return TokenDelta(index, (), finish_reason=FinishReason.ERROR, error="scripted fault")
        script, reason = self._scripts[index], None
        ids: list[int] = []
        while len(ids) < runtime.tokens_per_delta and reason is None:
            token_id = script[min(self._made[index], len(script) - 1)]
            ids.append(token_id)
            self._made[index] += 1
            if token_id == runtime.eos_id and not sampling.ignore_eos and self._made[index] > sampling.min_tokens:
                reason = FinishReason.STOP
            elif self._made[index] >= sampling.max_tokens:
                reason = FinishReason.LENGTH
        runtime.tokens_made += len(ids)
        if reason is not None:
            self.unfinished.discard(index)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampling.logprobs is not None:
            value = runtime.logprob(index)
            top = [(token_id, value - rank) for rank, token_id in enumerate(range(3, 3 + sampling.logprobs))]
            logprobs = tuple(TokenLogprob(token_id, value, tuple(top)) for token_id in ids)
        return TokenDelta(index, tuple(ids), logprobs, reason)


def scripted_service(
    *texts: str,
    runtime: ScriptedRuntime | None = None,
    tokenizer: Tokenizer | None = None,
    settings: ServiceSettings | None = None,
    metrics: Metrics | None = None,
) -> Service:
    """A ready Service over a scripted runtime; with `texts`, sequence i says text i (cyclic). Call it in a running
    event loop, and `await service.close()` at the end."""
    tokenizer = t5_like() if tokenizer is None else tokenizer
    runtime = ScriptedRuntime() if runtime is None else runtime
    if texts:
        runtime.say(tokenizer, *texts)
    service = Service(
        ServiceSettings(served_model_names=("scripted",)) if settings is None else settings,
        Metrics() if metrics is None else metrics,
    )
    service.attach(runtime, tokenizer, root="tests")
    return service
