"""The one path of a request, whatever wire it came on: admission -> prepare -> runtime -> text.

`open` gives the stream, `generate` is its fold, `score` and `tokenize` stand beside. The service knows no wire and
no device. It exists before the model is loaded (state loading) and answers with refusals then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from serve.admission import Admission, ServerState, draining, loading
from serve.errors import EngineFailure, NotFound, ServeError
from serve.metrics import Metrics, Outcome, RequestTracker
from serve.output import Completion, Scores, Tokenization
from serve.prepare import num_characters, prepare, prepare_score
from serve.prompt_fitting import PrepareContext
from serve.request import GenerateRequest, Mode, ScoreRequest, new_request_id
from serve.response_stream import ENGINE_DEAD, ResponseStream, StreamContext, departure, out_of_time
from serve.runtimes.base import Runtime, RuntimeInfo
from serve.sampling_params import SamplingDefaults
from serve.scoring import ScoreCall
from serve.service_settings import ALWAYS_ACCEPTED_MODELS, ModelCard, ServiceSettings
from serve.tokenizer import Tokenizer, check_text

__all__ = ["ALWAYS_ACCEPTED_MODELS", "ModelCard", "ResponseStream", "Service", "ServiceSettings"]

_INLINE_CHARACTERS = 8192  # more text than this (about 5 ms) is tokenized off the event loop
_HEALTH_SECONDS = 0.25  # how often the engine's health is looked at
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What there is once the model is loaded."""

    runtime: Runtime
    info: RuntimeInfo
    prepare: PrepareContext
    stream: StreamContext
    created: int
    root: str


class Service:
    """Answers requests; one for a process, used from one event loop."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.admission = Admission(settings.max_running_sequences, settings.max_queued_requests)
        self._loaded: _Loaded | None = None
        self._death: tuple[str, float] | None = None  # why the engine is dead, and since when
        self._running: set[ResponseStream | ScoreCall] = set()  # accepted and not over
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="prepare")
        self._watcher: asyncio.Task[None] | None = None
        metrics.watch(self)

    def attach(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer,
        *,
        generation_config: Mapping[str, float | int] | None = None,
        root: str = "",
        in_chat: bool = False,
    ) -> None:
        """The runtime has started: accept requests. Called in the event loop.

        Args:
            generation_config: sampling fields that the checkpoint's generation config sets.
            root: where the checkpoint came from, for the model card.
            in_chat: the checkpoint was not trained on our prompt formats; a decoder-only one with a chat template of
                its own gets prompts in that.
        """
        info, settings = runtime.info, self.settings
        config = {} if generation_config is None else generation_config
        self._loaded = _Loaded(
            runtime=runtime,
            info=info,
            prepare=PrepareContext(
                tokenizer=tokenizer,
                is_encoder_decoder=info.is_encoder_decoder,
                in_chat=in_chat and not info.is_encoder_decoder,
                context_length=info.context_length,
                max_input_tokens=settings.max_input_tokens,
                defaults=SamplingDefaults(settings.default_max_tokens, settings.max_output_tokens, config),
                exemplar_sets=settings.exemplar_sets,
            ),
            stream=StreamContext(runtime, tokenizer, self.metrics, settings.served_model_names[0]),
            created=int(time.time()),
            root=root,
        )
        self.metrics.describe_model(
            {
                "model": settings.served_model_names[0],
                "architecture": info.architecture,
                "runtime": info.runtime,
                "device": info.device,
                "dtype": info.dtype,
            }
        )
        self.admission.ready()
        self._watcher = asyncio.get_running_loop().create_task(self._watch_engine(runtime))

    async def open(self, request: GenerateRequest, tracker: RequestTracker) -> ResponseStream:
        """Accept a request: everything that must be a plain refusal is raised here, before any piece of the answer.

        Raises:
            NotFound, InvalidRequest, QueueFull, Unavailable, EngineFailure, DeadlineExceeded
        """
        timeout = self._timeout(request.timeout_seconds)
        with _counted(tracker, timeout):
            loaded = self._accept(request, tracker)
            ticket = self.admission.enter()
            try:
                prepared = await self._in_thread(
                    num_characters(request, loaded.prepare, enough=_INLINE_CHARACTERS),
                    lambda: prepare(request, loaded.prepare, _request_id(tracker), timeout),
                )
                _check_time(timeout, tracker)
                tracker.facts.take(prepared)
                ticket.join(prepared.num_sequences)
                tracker.facts.accepted = True
                stream = ResponseStream(
                    prepared,
                    loaded.stream,
                    ticket,
                    tracker,
                    shows_logprobs=prepared.sampling.logprobs is not None,
                    on_end=self._running.discard,
                )
            except BaseException:
                ticket.leave()
                raise
            self._running.add(stream)
            return stream

    async def generate(self, request: GenerateRequest, tracker: RequestTracker) -> Completion:
        """The whole answer: the fold of `open`.

        Raises:
            What `open` and its stream raise.
        """
        stream = await self.open(request, tracker)
        try:
            async for _ in stream:
                pass
        finally:
            await stream.aclose()
        return stream.completion

    async def score(self, request: ScoreRequest, tracker: RequestTracker) -> Scores:
        """
        Raises:
            NotFound, InvalidRequest, QueueFull, Unavailable, EngineFailure, DeadlineExceeded
        """
        timeout = self._timeout(request.timeout_seconds)
        with _counted(tracker, timeout):
            loaded = self._accept(request, tracker)
            ticket = self.admission.enter()
            try:
                prepared = await self._in_thread(
                    num_characters(request, loaded.prepare, enough=_INLINE_CHARACTERS),
                    lambda: prepare_score(request, loaded.prepare, _request_id(tracker), timeout),
                )
                _check_time(timeout, tracker)
                ticket.join(1)
                tracker.facts.accepted = True
                call = ScoreCall(prepared, loaded.stream, ticket, tracker, on_end=self._running.discard)
                self._running.add(call)
                scores = await call.run()
            finally:
                ticket.leave()
            tracker.finish(Outcome.STOP)
            return scores

    async def tokenize(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        model: str | None = None,
        timeout_seconds: float | None = None,
        tracker: RequestTracker,
    ) -> Tokenization:
        """
        Raises:
            NotFound, InvalidRequest, Unavailable, EngineFailure, DeadlineExceeded
        """
        timeout = self._timeout(timeout_seconds)
        with _counted(tracker, timeout):
            self.admission.check()
            self._check_model(model, tracker)
            check_text("text", text)
            tokenizer = self._need_loaded().prepare.tokenizer
            ids = await self._in_thread(
                len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens)
            )
            _check_time(timeout, tracker)
            tracker.finish(Outcome.STOP)
            return Tokenization(ids, tokenizer.count_unknown(ids))

    def model_card(self) -> ModelCard:
        """
        Raises:
            Unavailable: still loading.
        """
        loaded, settings = self._need_loaded(), self.settings
        return ModelCard(
            id=settings.served_model_names[0],
            created=loaded.created,
            runtime=loaded.info.runtime,
            dtype=loaded.info.dtype,
            architecture=loaded.info.architecture,
            max_input_tokens=settings.max_input_tokens,
            max_output_tokens=settings.max_output_tokens,
            modes=tuple(mode.value for mode in Mode),
            is_encoder_decoder=loaded.info.is_encoder_decoder,
            names=tuple(dict.fromkeys((*settings.served_model_names, *ALWAYS_ACCEPTED_MODELS))),
            root=loaded.root,
        )

    def token_text(self, token_id: int) -> str:
        """
        Raises:
            Unavailable: still loading.
        """
        return self._need_loaded().prepare.tokenizer.token_text(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether default output leaves the token out.

        Raises:
            Unavailable: still loading.
        """
        return token_id in self._need_loaded().prepare.tokenizer.table.special

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt's tokens, special ones shown.

        Raises:
            Unavailable: still loading.
        """
        return self._need_loaded().prepare.tokenizer.decode(token_ids, skip_special_tokens=False)

    def readiness(self) -> str | None:
        """None when ready, else "loading", "draining" or "engine dead: …". Looks at the engine, so it flips at once."""
        self._look_at_engine()
        if self._death is not None:
            return f"engine dead: {self._death[0]}"
        return None if self.admission.state is ServerState.READY else self.admission.state.value

    @property
    def is_draining(self) -> bool:
        return self.admission.state is ServerState.DRAINING

    def liveness(self) -> str | None:
        """None when alive, also while loading and draining; says why once the engine has been dead for the grace."""
        self._look_at_engine()
        if self._death is None or time.monotonic() - self._death[1] < self.settings.dead_grace_seconds:
            return None
        return f"engine dead: {self._death[0]}"

    @property
    def requests_running(self) -> int:
        return self.admission.requests_running

    @property
    def requests_waiting(self) -> int:
        return self.admission.requests_waiting

    @property
    def sequences_running(self) -> int:
        return self.admission.slots_used

    @property
    def engine_up(self) -> bool:
        return self._loaded is not None and self._death is None

    async def drain(self) -> None:
        """Refuse new and queued requests and return once the running ones have finished."""
        self.admission.drain()
        await self.admission.wait_idle()

    async def close(self) -> None:
        """End whatever still runs (with Unavailable) and stop watching; the runtime is its owner's to stop."""
        self.admission.drain()
        self._interrupt(draining)
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _accept(self, request: GenerateRequest | ScoreRequest, tracker: RequestTracker) -> _Loaded:
        tracker.mode = request.mode
        made = new_request_id()
        tracker.request_id = made if request.request_id is None else request.request_id
        self._look_at_engine()
        self.admission.check()
        self._check_model(request.model, tracker)
        return self._need_loaded()

    def _check_model(self, name: str | None, tracker: RequestTracker) -> None:
        own_name = self.settings.served_model_names[0]
        names = (*self.settings.served_model_names, *ALWAYS_ACCEPTED_MODELS)
        if name is not None and name not in names:
            served = ", ".join(self.settings.served_model_names)
            raise NotFound(f"no model has the name {name[:100]!r}; this server has {served}", field="model")
        tracker.facts.served_model, tracker.facts.requested_model = own_name, own_name if name is None else name

    def _need_loaded(self) -> _Loaded:
        if self._loaded is None:
            raise loading()
        return self._loaded

    def _timeout(self, asked: float | None) -> float | None:
        """The request's own deadline, else the server's."""
        if asked is not None:
            return asked
        seconds = self.settings.request_timeout_seconds
        return seconds if seconds > 0 else None

    async def _in_thread(self, characters: int, work: Callable[[], _T]) -> _T:
        """Run `work` here when it is small, else in a thread, so that the loop answers meanwhile."""
        if characters <= _INLINE_CHARACTERS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _watch_engine(self, runtime: Runtime) -> None:
        while self._death is None:
            await asyncio.sleep(_HEALTH_SECONDS)
            self._look_at_engine()

    def _look_at_engine(self) -> None:
        """Notice the engine's death, which is final: every waiter fails and new requests are refused."""
        if self._loaded is None or self._death is not None:
            return
        reason = self._loaded.runtime.health()
        if reason is None:
            return
        self._death = (reason, time.monotonic())
        _log.error("the engine is dead: %s", reason)
        self.admission.fail(ENGINE_DEAD)
        self._interrupt(lambda: EngineFailure(ENGINE_DEAD))

    def _interrupt(self, to_error: Callable[[], ServeError]) -> None:
        for call in tuple(self._running):
            call.interrupt(to_error())


@contextlib.contextmanager
def _counted(tracker: RequestTracker, timeout: float | None) -> Iterator[None]:
    """An error that ends the request here is its outcome, whatever the edge does with it."""
    try:
        yield
    except asyncio.CancelledError:
        tracker.fail(departure(tracker, timeout))
        raise
    except Exception as error:
        tracker.fail(error)
        raise


def _request_id(tracker: RequestTracker) -> str:
    assert tracker.request_id is not None
    return tracker.request_id


def _check_time(timeout: float | None, tracker: RequestTracker) -> None:
    if timeout is not None and tracker.elapsed() >= timeout:
        raise out_of_time()
