"""Decoder-only checkpoints without vLLM: transformers' models under our own engine and cache.

Batching, streams, cancelling and failure are the torch runtime's; what is loaded differs, and a prompt's own
log-probabilities can be asked for.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from serve.engine.config import EngineSettings
from serve.engine.engine import Engine
from serve.errors import EngineFailure
from serve.output import TokenLogprob
from serve.runtimes.base import RuntimeInfo
from serve.runtimes.causal_model import CausalModel, load_causal_model
from serve.runtimes.causal_runner import CausalEngine, CausalRunner
from serve.runtimes.torch_runtime import ENCODER_CACHE_SHARE, TimedRunner, TorchRuntime, default_cache_bytes


class TransformersRuntime(TorchRuntime):
    """A decoder-only checkpoint served by `serve.engine`; see serve.runtimes.base.Runtime for the contract."""

    packs_weights = False  # the layers are transformers'

    _runner: CausalRunner
    _context_length: int | None = None

    @property
    def info(self) -> RuntimeInfo:
        return replace(
            super().info,
            runtime="transformers",
            is_encoder_decoder=False,
            context_length=self._context_length,
        )

    async def prompt_logprobs(
        self, request_id: str, token_ids: tuple[int, ...], count: int
    ) -> tuple[TokenLogprob, ...]:
        """The log-probability of each token but the first, given those before it, with the `count` best ones.

        Cancelling the awaiting task frees the room.

        Raises:
            EngineFailure
        """
        if self._failure is not None or self._thread is None or self._loop is None:
            raise EngineFailure(self._failure or "the engine is not running")
        if len(token_ids) < 2:
            return ()
        key = f"{next(self._keys)}-{request_id}"
        runner, future = self._runner, self._loop.create_future()
        self._scores[key] = future

        def ask(engine: Engine) -> None:
            runner.wanted[key] = count
            engine.add_score(key, token_ids[:1], [token_ids[1:]])

        def forget(engine: Engine) -> None:
            engine.abort(key)
            runner.forget(key)

        self._command(ask)
        try:
            await future
            return runner.details[key]
        finally:
            self._scores.pop(key, None)
            self._command(forget)

    def make_causal_runner(self, model: CausalModel, settings: EngineSettings) -> CausalRunner:
        """What carries out the engine's plans; a subclass may wrap it."""
        return CausalRunner(model, cache_bytes=settings.cache_bytes)

    def _load(self) -> tuple[Engine, TimedRunner]:
        model = load_causal_model(
            self._model_dir,
            device=torch.device(self._device),
            dtype=self._format.dtype,
            vocab_limit=self._vocab_limit,
            trust_checkpoint=self._trust_checkpoint,
        )
        self._architecture = model.dims.architecture
        self._context_length = model.dims.context_length
        total = default_cache_bytes(self._device) if self._cache_bytes is None else self._cache_bytes
        settings = EngineSettings(
            max_running_sequences=self._max_running_sequences,
            encode_tokens_per_step=self._encode_tokens_per_step,
            cache_bytes=max(1, total - total // ENCODER_CACHE_SHARE),
            encoder_cache_bytes=total // ENCODER_CACHE_SHARE,
        )
        self._runner = self.make_causal_runner(model, settings)
        timed = TimedRunner(self._runner)
        return CausalEngine(timed, settings, model), timed
