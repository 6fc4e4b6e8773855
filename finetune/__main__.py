"""`flan-finetune` (`python -m finetune`): train, look at the data, evaluate over the wire, make a tokenizer, convert.

Each command is a module-level pair: `_add_<command>` describes its arguments, `_<command>` runs it and imports what it
needs then, so that `--help` is quick. To add one, write the pair and name it in COMMANDS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

Parser = argparse.ArgumentParser
OK, FAILED, USAGE = 0, 1, 2


def _add_data(parser: Parser) -> None:
    parser.add_argument(
        "--data", metavar="DIR", action="append",
        help="folder of training data; repeatable (default: the small data that the repository ships)",
    )  # fmt: skip


def _folders(arguments: argparse.Namespace) -> list[Path]:
    return [Path(name) for name in arguments.data or ()]


def _add_train(parser: Parser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML file, such as finetune/configs/smoke.toml")
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint folder to start from (default: the config's [model])"
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the run and of its newest checkpoint")
    _add_data(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="steps in all; phases keep their shares")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config keys, such as phases.0.steps=20 seed=3"
    )


def _train(arguments: argparse.Namespace) -> int:
    from finetune.config_file import load_config

    config = load_config(
        arguments.config,
        arguments.overrides,
        init=arguments.model,
        output=arguments.output,
        data=arguments.data,
        steps=arguments.steps,
    )
    from finetune.trainer import train

    folder = train(config, resume=arguments.resume)
    print(f"checkpoint {folder}")
    return OK


def _add_inspect(parser: Parser) -> None:
    parser.add_argument("mixture", metavar="MIXTURE", help="name of a shipped mixture (smoke, demo) or a TOML file")
    _add_data(parser)
    parser.add_argument("--num-examples", type=int, default=5, metavar="N", help="examples to show (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer folder (default: the demo's)")


def _inspect(arguments: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from finetune.inspection import inspect_mixture
    from finetune.tokenization import DEMO_TOKENIZER

    folder = DEMO_TOKENIZER if arguments.tokenizer is None else arguments.tokenizer
    inspect_mixture(
        arguments.mixture,
        _folders(arguments),
        arguments.num_examples,
        arguments.seed,
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
        sys.stdout,
    )
    return OK


def _add_tokenizer(parser: Parser) -> None:
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
    parser.add_argument("--mixture", default="demo", help="mixture whose text it learns from (default: demo)")
    _add_data(parser)
    parser.add_argument(
        "--pieces", type=int, default=8000, metavar="N", help="pieces beside 100 sentinels (default: 8000)"
    )
    parser.add_argument(
        "--num-examples", type=int, default=60_000, metavar="N", help="examples to read (default: 60000)"
    )
    parser.add_argument("--seed", type=int, default=12345, help="seed of the draws (default: 12345)")
    parser.add_argument(
        "--max-length", type=int, default=512, metavar="N", help="model_max_length, tokens (default: 512)"
    )


def _tokenizer(arguments: argparse.Namespace) -> int:
    from finetune.pipeline import build_text_stream
    from finetune.tokenization import save_tokenizer, train_tokenizer

    stream = build_text_stream(arguments.mixture, _folders(arguments), seed=arguments.seed)
    texts = (f"{example.inputs}\n{example.targets}" for example in islice(stream, arguments.num_examples))
    tokenizer = train_tokenizer(texts, arguments.pieces)
    save_tokenizer(tokenizer, arguments.output, arguments.max_length)
    print(f"tokenizer {arguments.output}: {tokenizer.get_vocab_size()} ids")
    return OK


def _add_export(parser: Parser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a run, or of any T5 checkpoint")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="new folder; servable files only")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights (default: bfloat16)"
    )


def _export(arguments: argparse.Namespace) -> int:
    from finetune.checkpoints import export

    export(arguments.checkpoint, arguments.output, arguments.dtype)
    print(f"checkpoint {arguments.output}")
    return OK


def _add_evaluate(parser: Parser) -> None:
    parser.add_argument("mixture", metavar="MIXTURE", help="mixture whose held-out rows are asked, such as demo")
    _add_data(parser)
    parser.add_argument(
        "--url", default="grpc://127.0.0.1:50051", help="server, http:// or grpc:// (default: %(default)s)"
    )
    parser.add_argument("--questions", type=int, default=5000, metavar="N", help="how many (default: 5000)")
    parser.add_argument("--seed", type=int, default=0, help="which questions and exemplars are drawn (default: 0)")
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="requests under way (default: 32)")
    parser.add_argument(
        "--max-tokens", type=int, default=96, metavar="N", help="longest reply, in tokens (default: 96)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="key of the server (default: none)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR",
        help="folder whose model card and flan.json get the scores (default: print them only)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores as JSON")


def _evaluate(arguments: argparse.Namespace) -> int:
    from finetune.evaluation.command import run

    run(arguments, _folders(arguments))
    return OK


# name: (help, description of the arguments, the command)
COMMANDS: dict[str, tuple[str, Callable[[Parser], None], Callable[[argparse.Namespace], int]]] = {
    "train": ("train a model", _add_train, _train),
    "inspect": ("show what a mixture feeds a model, stage by stage", _add_inspect, _inspect),
    "evaluate": ("ask a running server held-out questions and score the answers", _add_evaluate, _evaluate),
    "tokenizer": ("train a T5-style tokenizer on a mixture's text", _add_tokenizer, _tokenizer),
    "export": ("copy a checkpoint's servable files, with weights in another dtype", _add_export, _export),
}


def build_parser() -> Parser:
    parser = argparse.ArgumentParser(prog="flan-finetune", description="Finetune T5 models the Flan way.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 it failed while running, 2 the command line or the configuration is wrong."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        # argparse matches `overrides` (any number, so also none) before it has seen the options that follow CONFIG
        if arguments.command != "train" or any(text.startswith("-") or "=" not in text for text in rest):
            parser.error(f"unknown arguments: {' '.join(rest)}")
        arguments.overrides += rest
    from finetune.config import ConfigError

    try:
        code: int = arguments.run(arguments)
    except ConfigError as error:
        print(*(f"error: {line}" for line in error.errors), sep="\n", file=sys.stderr)
        return USAGE
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
