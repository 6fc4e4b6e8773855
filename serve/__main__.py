"""The server's composition root: settings -> metrics -> service -> servers -> weights -> signals. No logic.

Both ports open before the weights load, so that probes are answered from the start. SIGTERM drains; a second signal
exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from serve import checkpoint, config, telemetry, tracing
from serve.config import ConfigError, Settings
from serve.errors import CheckpointError
from serve.exemplars import ExemplarError, load_sets
from serve.metrics import Metrics
from serve.rest.server import RestServer
from serve.rpc.server import RpcServer
from serve.runtimes import choose, load_class
from serve.runtimes.base import HasMetrics, Runtime
from serve.runtimes.runtime_args import Value, parse_runtime_args
from serve.service import Service, ServiceSettings
from serve.tokenizer import Tokenizer
from serve.tracing import Tracing

EXIT_CHECKPOINT, EXIT_CONFIG, EXIT_SECOND_SIGNAL = 1, 2, 130
_STOP_SECONDS = 1.0  # for closing sockets and the engine, after the grace
# For exporting the last traces: what is left of the grace, within these bounds, so that a collector that does not
# answer holds up the exit no longer than it may.
_LEAST_FLUSH_SECONDS, _MOST_FLUSH_SECONDS = 0.5, 5.0
_log = logging.getLogger("flan.serve")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the server until a signal; ends the process with SPEC's exit codes."""
    try:
        command = config.load(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print("\n".join(f"flan-serve: {line}" for line in error.errors), file=sys.stderr)
        raise SystemExit(EXIT_CONFIG) from None
    if command.print_config:
        print(command.settings.describe(), end="")
        return
    telemetry.configure(command.settings.log_format)
    code = asyncio.run(serve(command.settings))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that hangs (a stuck load, a stuck step) must not hold up the exit


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    _, problems = parse_runtime_args(settings.runtime_args)
    if problems:
        print("\n".join(f"flan-serve: {line}" for line in problems), file=sys.stderr)
        return EXIT_CONFIG
    traces = tracing.start(os.environ)
    try:
        service = make_service(settings, traces)
    except ExemplarError as error:
        print(f"flan-serve: --exemplars: {error}", file=sys.stderr)
        return EXIT_CONFIG
    stopping = asyncio.Event()
    watch_signals(stopping)
    rest, rpc = RestServer(service, settings=settings), RpcServer(service, settings=settings)
    try:
        rest_port = await rest.start()
        rpc_port = await rpc.start() if settings.grpc_port >= 0 else None
    except OSError as error:
        print(f"flan-serve: {error}", file=sys.stderr)
        return EXIT_CHECKPOINT
    loading = asyncio.create_task(load(settings, service))
    stop_asked = asyncio.create_task(stopping.wait())
    runtime: Runtime | None = None
    code = 0
    await asyncio.wait({loading, stop_asked}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        try:
            runtime = loading.result()
        except CheckpointError as error:
            print(f"flan-serve: {error}", file=sys.stderr)
            code = EXIT_CHECKPOINT
        else:
            # One write: `print` makes two of it where Python is unbuffered, and others may write to the same pipe.
            sys.stdout.write(ready_line(settings, service, rest_port, rpc_port) + "\n")
            sys.stdout.flush()
            await stop_asked
    clock = asyncio.get_running_loop().time
    grace_ends = clock() + settings.shutdown_grace_seconds
    if code == 0:
        await drain(service, settings.shutdown_grace_seconds)
    await stop(service, rest, rpc, runtime)
    if traces is not None:
        await traces.stop(min(max(grace_ends - clock(), _LEAST_FLUSH_SECONDS), _MOST_FLUSH_SECONDS))
    return code


def make_service(settings: Settings, traces: Tracing | None) -> Service:
    exemplar_sets = {} if settings.exemplars_dir is None else load_sets(Path(settings.exemplars_dir))
    names = settings.served_model_names
    return Service(
        ServiceSettings(
            served_model_names=names if names else (checkpoint.served_name(settings.model),),
            max_input_tokens=settings.max_input_tokens,
            max_output_tokens=settings.max_output_tokens,
            default_max_tokens=settings.default_max_tokens,
            max_running_sequences=settings.max_running_sequences,
            max_queued_requests=settings.max_queued_requests,
            request_timeout_seconds=settings.request_timeout_seconds,
            exemplar_sets=exemplar_sets,
        ),
        Metrics(on_request_end=telemetry.on_request_end(traces)),
    )


async def load(settings: Settings, service: Service) -> Runtime:
    """Find, check and load the checkpoint, and attach it to the service.

    Raises:
        CheckpointError: it cannot be served.
    """
    folder = await asyncio.to_thread(checkpoint.find, settings.model)
    found = checkpoint.inspect(folder, checkpoint.served_name(settings.model))
    tokenizer = await asyncio.to_thread(Tokenizer.load, folder)
    runtime = await asyncio.to_thread(make_runtime, settings, found, tokenizer, service.metrics)
    await runtime.start()
    if isinstance(runtime, HasMetrics):
        service.metrics.join(runtime.metrics_registry)
    root = str(folder) if settings.model is None else settings.model
    service.attach(
        runtime,
        tokenizer,
        generation_config=found.generation_defaults,
        root=root,
        in_chat=found.prompt_format_version is None,
    )
    return runtime


def make_runtime(settings: Settings, found: checkpoint.Checkpoint, tokenizer: Tokenizer, metrics: Metrics) -> Runtime:
    """The runtime that suits the checkpoint; imports what it needs, which may take seconds.

    Raises:
        CheckpointError: there is none.
    """
    from serve.runtimes.torch_runtime import resolve_device  # imports torch

    device = resolve_device(settings.device)
    choice = choose(settings.runtime, found.model_type, is_encoder_decoder=found.is_encoder_decoder, device=device)
    _log.info("runtime %s: %s", choice.name, choice.why)
    arguments: dict[str, Value] = parse_runtime_args(settings.runtime_args)[0]
    if arguments and choice.name != "vllm":
        raise CheckpointError(f"--runtime-arg is for the vllm runtime; this is {choice.name} ({choice.why})")
    options = {
        "device": device,
        "dtype": settings.dtype,
        "max_running_sequences": settings.max_running_sequences,
        "encode_tokens_per_step": settings.encode_tokens_per_step,
        "vocab_limit": tokenizer.size,
        "on_step": metrics.observe_step,
        "trust_checkpoint": settings.trust_checkpoint,
    }
    if choice.name == "vllm":
        options["runtime_args"] = arguments
        options["max_sequence_tokens"] = settings.max_input_tokens + settings.max_output_tokens
    runtime: Runtime = load_class(choice.name)(found.folder, **options)
    return runtime


def ready_line(settings: Settings, service: Service, rest_port: int, rpc_port: int | None) -> str:
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    card = service.model_card()
    grpc = "off" if rpc_port is None else f"{host}:{rpc_port}"
    return f"ready rest={scheme}://{host}:{rest_port} grpc={grpc} model={card.id} runtime={card.runtime}"


def watch_signals(stopping: asyncio.Event) -> None:
    """First SIGTERM or SIGINT: drain. Second: exit now."""

    def on_signal(number: int) -> None:
        if stopping.is_set():
            _log.warning("second signal, exiting at once")
            os._exit(EXIT_SECOND_SIGNAL)
        _log.info("%s: draining", signal.Signals(number).name)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


async def drain(service: Service, grace_seconds: float) -> None:
    """Refuse what is new or queued and let the running requests finish, for `grace_seconds` at most."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(service.drain(), grace_seconds)


async def stop(service: Service, rest: RestServer, rpc: RpcServer, runtime: Runtime | None) -> None:
    """End what still runs and close everything, in at most about a second."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STOP_SECONDS):
            await service.close()
            await asyncio.gather(rest.stop(_STOP_SECONDS / 2), rpc.stop(_STOP_SECONDS / 2))
            if runtime is not None:
                await runtime.stop()


if __name__ == "__main__":
    main()
