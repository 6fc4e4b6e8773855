"""What a service is told at the start, and what it tells of the model that it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.request import Exemplar

ALWAYS_ACCEPTED_MODELS = ("default", "tgi", "dummy")  # what existing clients send when they name no model


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What the service needs of the server's settings. `request_timeout_seconds` 0 = no deadline.

    `dead_grace_seconds`: how long after the engine's death the process still counts as alive, so that waiters get
    their errors before it is restarted.
    """

    served_model_names: tuple[str, ...] = ("default",)
    max_input_tokens: int = 2048
    max_output_tokens: int = 512
    default_max_tokens: int = 256
    max_running_sequences: int = 64
    max_queued_requests: int = 256
    request_timeout_seconds: float = 0.0
    dead_grace_seconds: float = 5.0
    exemplar_sets: Mapping[str, tuple[Exemplar, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is served, for `/v1/models`, `/info` and GetModel. `names`: all names that a request may use."""

    id: str
    created: int
    runtime: str
    dtype: str
    architecture: str
    max_input_tokens: int
    max_output_tokens: int
    modes: tuple[str, ...]
    is_encoder_decoder: bool
    names: tuple[str, ...]
    root: str
