"""`python -m loadtests`: smoke, selftest, compare, gate, beside-vllm, bench."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests import beside_vllm, comparison, objectives, selftest, smoke, workload
from loadtests.bench import command as bench


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def _smoke(args: argparse.Namespace) -> int:
    kept = {name: getattr(args, name) for name in smoke.Load.__dataclass_fields__}
    limits = objectives.load(args.objectives) if args.objectives else None
    result = smoke.run(smoke.Load(**kept), args.out)
    verdicts = objectives.check(result, limits) if limits is not None else []
    print(smoke.write_pages(result, args.out, verdicts))
    print(f"written: {', '.join(sorted(str(path) for path in args.out.iterdir()))}")
    return _exit_code(verdicts)


def _selftest(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="flan-loadtests-") as scratch:
        checks = selftest.run(args.out or Path(scratch), args.requests)
    for check in checks:
        print(check)
    failed = sum(not check.passed for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} checks passed")
    return 1 if failed else 0


def _compare(args: argparse.Namespace) -> int:
    old, new = _read(args.old), _read(args.new)
    changes = comparison.compare(old, new, args.max_ratio)
    print(comparison.to_markdown(changes, comparison.differences(old, new)))
    return 1 if any(change.regressed for change in changes) else 0


def _gate(args: argparse.Namespace) -> int:
    verdicts = objectives.check(_read(args.report), objectives.load(args.objectives))
    for verdict in verdicts:
        print(f"{'kept  ' if verdict.kept else 'MISSED'} {verdict.what}: {verdict.value} must be {verdict.limit}")
    return _exit_code(verdicts)


def _beside_vllm(args: argparse.Namespace) -> int:
    load = beside_vllm.Load(**{name: getattr(args, name) for name in beside_vllm.Load.__dataclass_fields__})
    result = beside_vllm.run(args.model, load, args.engine_args)
    table = beside_vllm.to_markdown(result)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def _exit_code(verdicts: Sequence[objectives.Verdict]) -> int:
    return 0 if all(verdict.kept for verdict in verdicts) else 1


def _read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests", description="Load over the wire, with token timings.")
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("smoke", help="load a running server for some seconds, report, and judge")
    command.set_defaults(run=_smoke)
    command.add_argument("--rest", default="http://127.0.0.1:8000", help="REST base URL (default: %(default)s)")
    command.add_argument("--grpc", default="127.0.0.1:50051", help="gRPC address (default: %(default)s)")
    command.add_argument("--seconds", type=float, default=10.0)
    command.add_argument("--users", type=int, default=4, help="closed loop: users that wait for their answers")
    command.add_argument("--arrival-rate", type=float, default=0.0, help="open loop: Poisson arrivals a second instead")
    command.add_argument("--max-in-flight", type=int, default=256, help="open loop: requests at a time")
    command.add_argument("--max-requests", type=int, default=20_000)
    command.add_argument("--workload", default="flan", help=f"{', '.join(workload.available())} or a .toml file")
    command.add_argument("--workload-seed", type=int, default=1)
    command.add_argument("--protocols", default="rest,grpc")
    command.add_argument("--shapes", default="stream,unary")
    command.add_argument("--api-key", default="")
    command.add_argument("--allow-remote", action="store_true", help="allow a target that is not this machine")
    command.add_argument("--objectives", default="smoke", help="name or .toml file; '' = judge nothing")
    command.add_argument("--out", type=Path, default=Path("runs/loadtest"), help="report folder (default: %(default)s)")

    command = commands.add_parser("selftest", help="check the meters against a stub with known delays")
    command.set_defaults(run=_selftest)
    command.add_argument("--requests", type=int, default=100, help="of each of its three runs (default: %(default)s)")
    command.add_argument("--out", type=Path, default=None, help="keep the reports there")

    command = commands.add_parser("compare", help="two report.json side by side; exit code 1 on a regression")
    command.set_defaults(run=_compare)
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    command.add_argument("--max-ratio", type=float, default=1.25, help="what counts as worse (default: %(default)s)")

    command = commands.add_parser("gate", help="judge a report.json by an objective file")
    command.set_defaults(run=_gate)
    command.add_argument("report", type=Path)
    command.add_argument("--objectives", default="smoke")

    command = commands.add_parser(
        "beside-vllm", help="our server on vLLM and bare vLLM, started here, under the same load in turn: ratios"
    )
    command.set_defaults(run=_beside_vllm)
    command.add_argument("--model", type=Path, required=True, help="folder of a decoder-only checkpoint")
    for name, text in (
        ("requests", "streams a round"),
        ("concurrency", "streams at a time"),
        ("words", "words in each prompt"),
        ("tokens", "tokens of each answer, exactly"),
        ("rounds", "counted rounds of each server, after one that warms up"),
        ("seed", "of the prompts"),
    ):
        default = getattr(beside_vllm.Load(), name)
        command.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    command.add_argument(
        "--engine-arg", dest="engine_args", action="append", default=[], metavar="KEY=VALUE",
        help="an argument for vLLM's engine in both servers, as --runtime-arg takes it; repeatable",
    )  # fmt: skip
    command.add_argument(
        "--out", type=Path, default=Path("runs/beside-vllm.json"), help="result (default: %(default)s)"
    )

    text = "our engine beside transformers and CTranslate2, on the same weights and prompts"
    bench.add_arguments(commands.add_parser("bench", help=text, description=text))
    return parser


if __name__ == "__main__":
    sys.exit(main())
