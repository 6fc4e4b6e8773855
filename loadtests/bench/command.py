"""`python -m loadtests bench`: our engine beside transformers and CTranslate2, on the same weights and prompts."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from loadtests.bench import modes, picture, running, tables
from loadtests.bench.effort import EFFORTS
from loadtests.bench.options import KNOWN_SYSTEMS, SYSTEMS, Options
from loadtests.bench.shapes import SHAPES
from loadtests.bench.workloads import registry
from loadtests.bench.workloads.quality import DEMO

_ROUNDS = {"full": 5, "quick": 3, "trial": 1}
_SHAPES = {"full": "flan-t5-small,flan-t5-base", "quick": "flan-t5-small", "trial": "tiny"}
_QUICK_MODES = ("float16", "int16", "int8")
_MINUTES = {"quick": 8.0}
_NO_CUDA = "--device cuda: this machine has no usable CUDA device, so nothing was measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    efforts = ", ".join(EFFORTS)
    parser.add_argument("--effort", choices=EFFORTS, default="full", help=f"how much: {efforts} (default: full)")
    parser.add_argument(
        "--quick",
        dest="effort",
        action="store_const",
        const="quick",
        help="--effort quick: under 10 minutes on two cores",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="turns of every system in every case, of which medians are taken (default: 5; quick: 3)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="time after which no workload begins; further rounds have to fit in (default: none; quick: 8)",
    )
    parser.add_argument(
        "--shapes", type=_names, help=f"of {', '.join(SHAPES)} (default: {_SHAPES['full']}; quick: {_SHAPES['quick']})"
    )
    parser.add_argument(
        "--workloads", type=_names, help=f"of {', '.join(registry.WORKLOADS)} (default: all that fit the device)"
    )
    parser.add_argument(
        "--systems", type=_names, default=SYSTEMS, help=f"of {', '.join(KNOWN_SYSTEMS)} (default: {', '.join(SYSTEMS)})"
    )
    parser.add_argument(
        "--modes",
        type=_names,
        help=f"dtypes of ours: {', '.join(modes.known('cpu'))}; those that the engine lacks are skipped "
        f"(default: {', '.join(modes.default('cpu'))}, quick: {', '.join(_QUICK_MODES)}; all for quality; on CUDA "
        f"{', '.join(modes.default('cuda'))})",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda measures Flan-T5-XL shapes beside published figures (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="processor threads of each system (default: all cores)"
    )
    parser.add_argument(
        "--max-running-sequences", type=int, default=64, help="sequences our engine decodes at a time (default: 64)"
    )
    parser.add_argument(
        "--encode-tokens-per-step",
        type=int,
        default=2048,
        help="prompt tokens our engine encodes between two decode steps (default: 2048; a server's is 512, "
        "for shorter pauses)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, prompts and arrivals (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=DEMO, help="T5 folder with a tokenizer, for quality (default: the demo)"
    )
    parser.add_argument(
        "--prompts", type=Path, help="JSONL for quality: a string a line, or an object with `prompt` (default: made up)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench.json"), help="FILE.json; .md and .png beside it (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, save, print. Exit code 1 when a measurement failed; what succeeded is saved all the same."""
    if args.device == "cuda" and not _has_cuda():
        raise ValueError(_NO_CUDA)
    record = running.run(options_of(args), sys.argv[1:])
    text = save(record, args.out)
    print(text)
    print(f"written: {', '.join(str(args.out.with_suffix(suffix)) for suffix in ('.json', '.md', '.png'))}")
    return 1 if record["failures"] else 0


def options_of(args: argparse.Namespace) -> Options:
    """The defaults that depend on other options are filled in here."""
    return Options(
        shapes=_names(_SHAPES[args.effort]) if args.shapes is None else args.shapes,
        workloads=tuple(registry.default(args.device)) if args.workloads is None else args.workloads,
        systems=tuple(args.systems),
        settings=_modes(args),
        quality_settings=tuple(modes.known(args.device)) if args.modes is None else args.modes,
        rounds=_ROUNDS[args.effort] if args.rounds is None else args.rounds,
        threads=args.threads,
        minutes=_MINUTES.get(args.effort) if args.minutes is None else args.minutes,
        effort=args.effort,
        seed=args.seed,
        device=args.device,
        max_running=args.max_running_sequences,
        encode_tokens_per_step=args.encode_tokens_per_step,
        checkpoint=args.checkpoint,
        prompts=args.prompts,
    )


def _modes(args: argparse.Namespace) -> tuple[str, ...]:
    """What is timed: what was asked for, or the device's default, of which a quick run on a CPU takes a part."""
    if args.modes is not None:
        return tuple(args.modes)
    return _QUICK_MODES if args.effort == "quick" and args.device == "cpu" else tuple(modes.default(args.device))


def save(record: dict[str, Any], path: Path) -> str:
    """Write FILE.json, FILE.md and FILE.png; returns the Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    picture.draw(record, path.with_suffix(".png"))
    text = tables.to_markdown(record, path.with_suffix(".png").name)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def _names(text: str) -> tuple[str, ...]:
    """("a, b") -> ("a", "b")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
