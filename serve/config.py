"""The server's settings: flag > environment variable > TOML file > default, checked once, all errors at once.

Every option is one field of `Settings`; its flag, its `FLAN_SERVE_<NAME>` variable, its file key and its help text
all come from that field. An unknown flag, variable or key is an error that names the nearest match.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

ENV_PREFIX = "FLAN_SERVE_"
HIDDEN = "***"  # what stands for a key where settings are shown
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class ConfigError(Exception):
    """Settings that cannot be served with; `errors` has every one of them."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = tuple(errors)


def _option(default: Any, help: str, **spec: Any) -> Any:
    """A field with its option's description. `spec`: option (name), choices, low, high, metavar,
    secret (its value is never shown)."""
    return field(default=default, metadata={"help": help, **spec})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server runs with. Field order is the order of `--help`."""

    model: str | None = _option(None, "checkpoint folder or hub id (default: the bundled demo checkpoint)")
    served_model_names: tuple[str, ...] = _option(
        (), "a name that requests may use; repeatable (default: the model's own name)", option="served-model-name"
    )
    runtime: str = _option("auto", "what runs the model", choices=("auto", "torch", "transformers", "vllm"))
    runtime_args: tuple[str, ...] = _option(
        (),
        "an argument of the vllm runtime, as key=value (tensor_parallel_size, quantization, max_model_len, "
        "gpu_memory_utilization, enforce_eager, ...); repeatable (default: vLLM's own)",
        option="runtime-arg",
        metavar="KEY=VALUE",
    )
    device: str = _option("auto", "where it runs", choices=("auto", "cpu", "cuda"))
    dtype: str = _option(
        "auto",
        "number format (auto: on a CPU weights in 16 bits, int16 where the processor has AVX-512 VNNI, else float16; "
        "on CUDA bfloat16; int16, int8: of T5 on a CPU only)",
        choices=("auto", "float32", "bfloat16", "float16", "int16", "int8"),
    )
    host: str = _option("127.0.0.1", "address to listen on, REST and gRPC", metavar="ADDRESS")
    port: int = _option(8000, "REST port; 0 = any free", low=0, high=65535)
    grpc_port: int = _option(50051, "gRPC port; 0 = any free, -1 = off", low=-1, high=65535)
    max_input_tokens: int = _option(2048, "longest prompt, in tokens", low=1)
    max_output_tokens: int = _option(512, "longest output of a sequence, in tokens; larger requests are clamped", low=1)
    default_max_tokens: int = _option(256, "max_tokens of a request that does not say it, in tokens", low=1)
    max_running_sequences: int = _option(64, "sequences that decode at the same time", low=1)
    max_queued_requests: int = _option(256, "requests that may wait beyond those running; the next gets 429", low=0)
    encode_tokens_per_step: int = _option(
        512, "most prompt tokens encoded between two decode steps (one longer prompt still goes alone)", low=1
    )
    shutdown_grace_seconds: float = _option(
        30.0, "time that running requests get to finish after SIGTERM, in seconds", low=0
    )
    request_timeout_seconds: float = _option(0.0, "deadline of a request, in seconds; 0 = none", low=0)
    keepalive_seconds: float = _option(
        15.0, "silence before a keep-alive comment on a REST stream, in seconds", low=0.05
    )
    api_keys: tuple[str, ...] = _option(
        (),
        "a key that clients must send as a bearer token; repeatable (default: no key needed)",
        option="api-key",
        metavar="KEY",
        secret=True,
    )
    tls_cert: str | None = _option(
        None, "PEM file with the server's certificate chain (default: no TLS)", metavar="FILE", file=True
    )
    tls_key: str | None = _option(
        None, "PEM file with the certificate's private key (default: no TLS)", metavar="FILE", file=True
    )
    tls_client_ca: str | None = _option(
        None,
        "PEM file of the authority whose client certificates are demanded, on both ports (default: none is demanded)",
        metavar="FILE",
        file=True,
    )
    max_body_mib: float = _option(
        8.0, "largest request body or message, in MiB, on both protocols", low=0.01, metavar="MIB"
    )
    cors_origins: tuple[str, ...] = _option(
        (),
        "a browser origin that may call the server, or *; repeatable (default: none)",
        option="cors-origin",
        metavar="ORIGIN",
    )
    ui: bool = _option(True, "serve the playground page at /")
    exemplars_dir: str | None = _option(
        None,
        "folder of exemplar sets, one JSON or JSONL file a set (default: none)",
        option="exemplars",
        metavar="DIR",
        folder=True,
    )
    log_format: str = _option(
        "auto", "form of the log lines; auto = text on a terminal, else json", choices=("auto", "json", "text")
    )
    trust_checkpoint: bool = _option(False, "allow pickled weights and remote code; only for checkpoints you trust")

    def describe(self) -> str:
        """The settings as TOML that `--config` reads back; keys are shown as stars."""
        lines = []
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.metadata.get("secret"):
                value = [HIDDEN for _ in value]
            if value is not None:
                shown = list(value) if isinstance(value, tuple) else value
                lines.append(f"{option_name(spec)} = {json.dumps(shown)}")
        return "\n".join(lines) + "\n"


def option_name(spec: Field[Any]) -> str:
    """The option's name as a flag without dashes in front and as a file key, e.g. "max-input-tokens"."""
    name: str = spec.metadata.get("option", spec.name.replace("_", "-"))
    return name


def env_name(spec: Field[Any]) -> str:
    return ENV_PREFIX + option_name(spec).replace("-", "_").upper()


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What the command line asks for beside settings."""

    settings: Settings
    print_config: bool


def load(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> CommandLine:
    """Read flags, environment and file into checked settings.

    Raises:
        ConfigError: with every error found.
        SystemExit: `--help` was asked for.
    """
    environ = os.environ if environ is None else environ
    errors: list[str] = []
    flags, config_path, print_config = _read_flags(argv, errors)
    env, env_config = _read_environ(environ, errors)
    file = _read_file(config_path if config_path is not None else env_config, errors)
    values: dict[str, Any] = {}
    for spec in fields(Settings):
        name = option_name(spec)
        for source, origin in ((flags, f"--{name}"), (env, env_name(spec)), (file, f"{name} (config file)")):
            if name in source:
                values[spec.name] = _parse(spec, source[name], origin, errors)
                break
    if not errors:
        settings = Settings(**values)
        _check_together(settings, values, errors)
        if not errors:
            return CommandLine(settings, print_config)
    raise ConfigError(errors)


def _check_together(settings: Settings, given: Mapping[str, Any], errors: list[str]) -> None:
    if HIDDEN in settings.api_keys:
        errors.append(f"--api-key: {HIDDEN} is what --print-config shows instead of a key; give the key itself")
    if (settings.tls_cert is None) != (settings.tls_key is None):
        errors.append("--tls-cert and --tls-key go together: give both or neither")
    if settings.tls_client_ca is not None and settings.tls_cert is None:
        errors.append("--tls-client-ca needs --tls-cert and --tls-key")
    if settings.port == settings.grpc_port and settings.port > 0:
        errors.append(f"--port and --grpc-port must differ, both are {settings.port}")
    if "default_max_tokens" in given and settings.default_max_tokens > settings.max_output_tokens:
        errors.append(
            f"--default-max-tokens ({settings.default_max_tokens}) must be at most "
            f"--max-output-tokens ({settings.max_output_tokens})"
        )


class _CollectingParser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, so that its complaint joins the others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def _parser() -> _CollectingParser:
    parser = _CollectingParser(
        prog="flan-serve",
        description="Serve a Flan checkpoint over REST and gRPC.",
        epilog="Each option is also an environment variable FLAN_SERVE_<NAME> (lists: comma-separated) and a key of "
        "the TOML file given by --config. Precedence: flag > environment > file > default. Traces are configured by "
        "OpenTelemetry's OTEL_* variables.",
        allow_abbrev=False,
    )
    for spec in fields(Settings):
        name, default = option_name(spec), spec.default
        if isinstance(default, bool):
            parser.add_argument(
                f"--{name}",
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=f"{spec.metadata['help']} (default: {'on' if default else 'off'})",
            )
            continue
        shown = f" (default: {default})" if default not in (None, ()) else ""
        choices = spec.metadata.get("choices")
        parser.add_argument(
            f"--{name}",
            action="append" if isinstance(default, tuple) else "store",
            metavar=spec.metadata.get("metavar", "|".join(choices) if choices else _metavar(default)),
            default=argparse.SUPPRESS,
            help=(spec.metadata["help"] + shown).replace("%", "%%"),
        )
    parser.add_argument("--config", metavar="FILE", default=None, help="TOML file with any of these options as keys")
    parser.add_argument("--print-config", action="store_true", help="print the settings in effect as TOML and stop")
    return parser


def _metavar(default: Any) -> str:
    return {int: "N", float: "SECONDS"}.get(type(default), "NAME")


def _read_flags(argv: Sequence[str], errors: list[str]) -> tuple[dict[str, Any], str | None, bool]:
    try:
        parsed, unknown = _parser().parse_known_args(list(argv))
    except ConfigError as error:
        errors.extend(error.errors)
        return {}, None, False
    known = [option_name(spec) for spec in fields(Settings)] + ["config", "print-config", "help"]
    is_value = False  # of an unknown option, which may be a mistyped --api-key: not to be shown
    for word in unknown:
        if word.startswith("-"):
            errors.append(f"unknown option {word.split('=')[0]}{_nearest(word.lstrip('-').split('=')[0], known, '--')}")
        elif not is_value:
            errors.append(f"unexpected argument {word!r}")
        is_value = word.startswith("-") and "=" not in word
    values = {key.replace("_", "-"): value for key, value in vars(parsed).items()}
    config_path, print_config = values.pop("config"), values.pop("print-config")
    return values, config_path, print_config


def _read_environ(environ: Mapping[str, str], errors: list[str]) -> tuple[dict[str, Any], str | None]:
    known = {env_name(spec): option_name(spec) for spec in fields(Settings)}
    values: dict[str, Any] = {}
    for key, text in environ.items():
        if not key.startswith(ENV_PREFIX) or key == ENV_PREFIX + "CONFIG":
            continue
        if key in known:
            values[known[key]] = text
        else:
            errors.append(f"unknown environment variable {key}{_nearest(key, list(known))}")
    return values, environ.get(ENV_PREFIX + "CONFIG")


def _read_file(path: str | None, errors: list[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        errors.append(f"--config {path}: {error.strerror}")
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        errors.append(f"--config {path}: not valid TOML: {error}")
        return {}
    known = [option_name(spec) for spec in fields(Settings)]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = key.replace("_", "-")
        if name in known:
            values[name] = value
        else:
            errors.append(f"--config {path}: unknown key {key!r}{_nearest(name, known)}")
    return values


def _nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _parse(spec: Field[Any], raw: Any, origin: str, errors: list[str]) -> Any:
    """The raw text (flag, variable) or TOML value as the field's type; complains with the origin's name."""
    assert spec.default is not MISSING
    try:
        value = _convert(spec.default, raw)
    except ValueError as error:
        errors.append(f"{origin}: must be a list of strings" if spec.metadata.get("secret") else f"{origin}: {error}")
        return spec.default
    low, high, choices = (spec.metadata.get(key) for key in ("low", "high", "choices"))
    if choices is not None and value not in choices:
        hint = _nearest(str(value), choices)
        errors.append(f"{origin}: must be one of {', '.join(choices)}, not {value!r}{hint}")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        errors.append(f"{origin}: must be {bounds}, not {value}")
    if spec.metadata.get("file") and value is not None and not Path(value).is_file():
        errors.append(f"{origin}: no such file: {value}")
    if spec.metadata.get("folder") and value is not None and not Path(value).is_dir():
        errors.append(f"{origin}: no such folder: {value}")
    return value


def _convert(default: Any, raw: Any) -> Any:
    if isinstance(default, bool):
        return _to_bool(raw)
    if isinstance(default, tuple):
        items = raw.split(",") if isinstance(raw, str) else raw
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"must be a list of strings, not {raw!r}")
        return tuple(item.strip() for item in items if item.strip())
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise ValueError(f"must be a {'number' if isinstance(default, int | float) else 'string'}, not {raw!r}")
    if isinstance(default, int | float):
        kind = type(default)
        if kind is int and isinstance(raw, float):
            raise ValueError(f"must be a whole number, not {raw}")
        try:
            return kind(raw)
        except ValueError:
            raise ValueError(f"must be a {'whole ' if kind is int else ''}number, not {raw!r}") from None
    if not isinstance(raw, str):
        raise ValueError(f"must be a string, not {raw!r}")
    return raw


def _to_bool(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    text = str(raw).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError(f"must be true or false, not {raw!r}")
