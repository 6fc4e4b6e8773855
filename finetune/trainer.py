"""Training, to be read from `train` down: phases of steps, each step one optimizer update.

    phase -> stream of token examples -> packer -> rows of a step -> micro batches -> summed loss -> Adafactor

A run is a function of its configuration: on a CPU, 10 steps straight and 5 + resume + 5 give the same bits. What a
resume needs (weights, optimizer, random states, position in the data, leftovers of packing) is in every checkpoint.
"""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from finetune.checkpoints import (
    OPTIMIZER_FILE,
    STATE_FILE,
    CheckpointStore,
    load_model,
    read_json,
    write_json,
    write_model,
)
from finetune.collate import PackedBatch, collate
from finetune.config import PhaseConfig, TrainConfig, to_dict
from finetune.loss import LossGuard, sum_loss
from finetune.model import T5, initialize
from finetune.model_card import flan_json, model_card
from finetune.optim import Adafactor, Optimizer, build_optimizer, learning_rate
from finetune.packing import Packer
from finetune.progress import Progress
from finetune.rows import RowStream
from finetune.tokenization import TextSource, TokenStream, load_tokenizer

SourceFactory = Callable[[str, tuple[str, ...], int], TextSource]
# Applies a function to each micro batch and yields the results in order: `map`, or that of a thread pool.
Workers = Callable[[Callable[[PackedBatch], "MicroStep"], Iterable[PackedBatch]], Iterator["MicroStep"]]


@dataclass(slots=True)
class Run:
    """Everything that changes while a run goes on."""

    config: TrainConfig
    model: T5
    optimizer: Optimizer
    tokenizer: Tokenizer
    tokenizer_folder: Path
    store: CheckpointStore
    device: torch.device
    workers: Workers = map
    step: int = 0
    manifests: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # of finished and running phases
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did: losses per target token, the rate used, and how much was read."""

    loss: float
    z_loss: float
    learning_rate: float
    input_tokens: int
    target_tokens: int
    rows: int
    examples: int


def train(config: TrainConfig, *, resume: bool = False, source: SourceFactory | None = None) -> Path:
    """Run a configuration; returns the output folder, which is the newest finished checkpoint.

    SIGTERM or SIGINT ends it after the step in progress, with a checkpoint to resume from.

    Raises:
        CheckpointError, ValueError: before training, when something cannot be used.
        LossError: the loss was non-finite or zero several times in a row.
    """
    source = source if source is not None else _mixture_source
    run = _start(config, resume)
    saved = run.store.latest() if resume else None
    if resume and saved is None:
        print(f"{config.output} has no finished checkpoint yet: starting at step 0", file=sys.stderr)
    state = None if saved is None else _restore(run, saved)
    guard = LossGuard(config.loss.max_bad_steps)
    with stop_on_signal() as is_stopped, Progress(config, run.step) as progress, worker_map(config) as run.workers:
        if state is not None:
            progress.load_state_dict(state["progress"])
        first, stopping = 0, False
        for index, phase in enumerate(config.phases):
            last = first + phase.steps
            if run.step < last and not stopping:
                rows = _begin_phase(run, index, source, state if state and state["phase"] == index else None)
                while run.step < last and not stopping:
                    report = train_step(run, phase, run.step - first, rows, guard)
                    run.step += 1
                    progress.log(run.step, phase, report)
                    stopping = is_stopped()
                    is_due = progress.is_checkpoint_due(run.step) or stopping or run.step == config.total_steps
                    if is_due and guard.bad_steps == 0:  # a bad loss may mean bad weights
                        _save(run, index, rows, progress)
                _record(run, phase, rows)
            first = last
    return run.store.output


def train_step(run: Run, phase: PhaseConfig, phase_step: int, rows: RowStream, guard: LossGuard) -> StepReport:
    """One update from `rows_per_batch` rows, `micro_rows` of them in memory at once."""
    batch = [next(rows) for _ in range(phase.rows_per_batch)]
    num_targets = sum(row.num_target_tokens for row in batch)
    run.model.train()
    micro_batches = [
        collate(batch[start : start + phase.rows_at_once], phase.input_length, phase.target_length)
        for start in range(0, len(batch), phase.rows_at_once)
    ]
    total = cross_entropy = z_loss = 0.0
    for parts in run.workers(lambda micro: micro_step(run, micro, num_targets), micro_batches):
        for parameter, gradient in zip(run.model.parameters(), parts.gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        total, cross_entropy, z_loss = total + parts.total, cross_entropy + parts.cross_entropy, z_loss + parts.z_loss
    rate = _rate(run, phase, phase_step)
    if guard.is_usable(total, run.step):
        run.optimizer.step(rate)
    run.optimizer.zero_grad()
    return StepReport(
        loss=cross_entropy,
        z_loss=z_loss,
        learning_rate=rate,
        input_tokens=sum(row.num_input_tokens for row in batch),
        target_tokens=num_targets,
        rows=len(batch),
        examples=sum(len(row.examples) for row in batch),
    )


@dataclass(frozen=True, slots=True)
class MicroStep:
    """What a micro batch gives: gradients in the order of `model.parameters()`, and its shares of the step's losses."""

    gradients: tuple[Tensor, ...]
    total: float
    cross_entropy: float
    z_loss: float


def micro_step(run: Run, batch: PackedBatch, num_targets: int) -> MicroStep:
    """Gradients of a micro batch. Every sum is divided by the target tokens of the *whole* step."""
    batch = batch.to(run.device)
    with autocast(run):
        logits = run.model(batch)
    targets = batch.decoder_target_tokens[batch.decoder_loss_weights > 0]
    parts = sum_loss(logits, targets, run.config.loss.z_loss)
    gradients = torch.autograd.grad(parts.total / num_targets, list(run.model.parameters()))
    sums = torch.stack((parts.total.detach(), parts.cross_entropy, parts.z_loss)) / num_targets
    return MicroStep(gradients, *sums.tolist())


def _start(config: TrainConfig, resume: bool) -> Run:
    """Model, optimizer and tokenizer of a fresh run; refuses an output folder that holds another."""
    output = Path(config.output)
    store = CheckpointStore(output, config.keep_checkpoints)
    if store.latest() is not None and not resume:
        raise ValueError(f"{output} holds a run already: go on with --resume, or give another --output")
    if (output / "config.json").is_file() and store.latest() is None:
        raise ValueError(f"{output} holds a checkpoint that this run did not write; give another --output")
    output.mkdir(parents=True, exist_ok=True)
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    device = _device(config.device)
    if config.init is not None:
        model, tokenizer_folder = load_model(Path(config.init)), Path(config.init)
    else:
        assert config.model is not None  # checked with the configuration
        assert config.tokenizer is not None
        model, tokenizer_folder = T5(config.model), Path(config.tokenizer)
        initialize(model, torch.Generator().manual_seed(config.seed))
    tokenizer = load_tokenizer(tokenizer_folder)
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.get_vocab_size()} ids, the model only {model.config.vocab_size} rows"
        )
    model.to(device)
    optimizer = build_optimizer(model, config.optimizer)
    if config.compile:
        model.compile()
    return Run(config, model, optimizer, tokenizer, tokenizer_folder, store, device)


def _begin_phase(run: Run, index: int, source: SourceFactory, state: dict[str, Any] | None) -> RowStream:
    """The rows of a phase, from its start or from where a checkpoint was taken."""
    phase = run.config.phases[index]
    seed = run.config.seed + index  # two phases over one mixture do not read the same examples
    texts = source(phase.mixture, run.config.data, seed)
    stream = TokenStream(texts, run.tokenizer, phase, overlong=run.config.overlong, seed=seed)
    rows = RowStream(stream, Packer(phase.input_length, phase.target_length))
    run.model.set_dropout(phase.dropout)
    if state is not None:
        rows.load_state_dict(state["rows"])
    elif phase.reset_optimizer:
        run.optimizer.reset()
    return rows


def _record(run: Run, phase: PhaseConfig, rows: RowStream) -> None:
    """Note what the phase has read so far, for flan.json."""
    run.manifests[phase.name] = rows.stream.source.manifest()
    run.counts[phase.name] = rows.counts()


def _save(run: Run, phase_index: int, rows: RowStream, progress: Progress) -> None:
    """A finished checkpoint of this step: servable files and what a resume needs."""
    phase = run.config.phases[phase_index]
    _record(run, phase, rows)
    folder = run.store.begin(run.step)
    flan = flan_json(run.config, run.step, run.manifests, run.counts, progress.summary())
    write_model(
        folder,
        run.model,
        tokenizer=run.tokenizer_folder,
        dropout=phase.dropout,
        card=model_card(run.config, run.model, flan),
        flan=flan,
    )
    tensors = {f"optimizer.{name}": tensor.cpu() for name, tensor in run.optimizer.state_dict().items()}
    tensors["random.torch"] = torch.get_rng_state()
    if run.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(run.device)
    save_file(tensors, folder / OPTIMIZER_FILE)
    state = {
        "step": run.step,
        "phase": phase_index,
        "rows": rows.state_dict(),
        "manifests": run.manifests,
        "counts": run.counts,
        "progress": progress.state_dict(),
        "config": to_dict(run.config),
    }
    write_json(folder / STATE_FILE, state)
    run.store.commit(folder)


def _restore(run: Run, folder: Path) -> dict[str, Any]:
    """Put a checkpoint's state into a fresh run."""
    state = read_json(folder / STATE_FILE)
    _check_same_run(run.config, state["config"])
    run.model.load_state_dict(load_model(folder).state_dict())
    tensors = load_file(folder / OPTIMIZER_FILE)
    prefix = "optimizer."
    run.optimizer.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )
    torch.set_rng_state(tensors["random.torch"])
    if run.device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], run.device)
    run.step = state["step"]
    run.manifests, run.counts = state["manifests"], state["counts"]
    return state


def _check_same_run(config: TrainConfig, saved: dict[str, Any]) -> None:
    """What may not change between a run and its resume: the model, the seed, and the phases that are done."""
    now = to_dict(config)
    for key in ("model", "seed", "optimizer", "overlong"):
        if now[key] != saved[key]:
            raise ValueError(f"--resume: {key} is {now[key]!r}, the checkpoint was made with {saved[key]!r}")


def _rate(run: Run, phase: PhaseConfig, phase_step: int) -> float:
    if run.config.optimizer.relative_step and isinstance(run.optimizer, Adafactor):
        return run.optimizer.relative_rate()
    return learning_rate(phase, phase_step)


def autocast(run: Run) -> AbstractContextManager[Any]:
    """bfloat16 products over float32 weights where asked for; norms, softmax and loss stay in float32."""
    if run.config.dtype == "bfloat16":
        return torch.autocast(run.device.type, torch.bfloat16)
    return nullcontext()


@contextmanager
def worker_map(config: TrainConfig) -> Iterator[Workers]:
    """What runs the micro steps of a step: one after the other, or `workers` of them at a time. Order is kept."""
    if config.workers == 1:
        yield map
        return
    with ThreadPoolExecutor(config.workers, "micro-step") as pool:
        yield pool.map


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Within it, SIGTERM and SIGINT only set a flag; the step in progress is finished. A second one ends at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _mixture_source(mixture: str, data: tuple[str, ...], seed: int) -> TextSource:
    from finetune.pipeline import build_text_stream

    return build_text_stream(mixture, [Path(folder) for folder in data], seed=seed)
