"""`flan-finetune inspect`: every stage of an example, the table of tasks, and the lengths of a mixture.

Stages: row -> template -> rendered input and target -> tokens. Without a tokenizer the last stage is left out and
lengths are counted in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from finetune.example import TextExample
from finetune.pipeline import Instance, TextStream, build_text_stream

_NUM_LENGTH_SAMPLES = 2000
_PERCENTILES = (50, 90, 99, 100)
_HIDDEN_FIELDS = frozenset({"definition", "positive"})  # long, and the same for every row of a task


class Tokenizer(Protocol):
    """What is asked of a tokenizer, in the words of transformers: ids of a text, and how each id reads."""

    def encode(self, text: str) -> list[int]: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...


def inspect_mixture(
    mixture_name: str,
    data_dirs: list[Path],
    num_examples: int,
    seed: int,
    tokenizer: Tokenizer | None,
    out: TextIO,
) -> None:
    """Write the whole report to `out`."""
    stream = build_text_stream(mixture_name, data_dirs, seed=seed)
    if stream.spec.description:
        print(f"{stream.spec.name}: {stream.spec.description}\n", file=out)
    for number in range(1, num_examples + 1):
        row, instance = stream.next_instance()
        write_stages(number, row, instance, tokenizer, out)
    write_task_table(stream, out)
    samples = [next(stream) for _ in range(_NUM_LENGTH_SAMPLES)]
    write_lengths(samples, tokenizer, out)


def write_stages(
    number: int, row: dict[str, Any], instance: Instance, tokenizer: Tokenizer | None, out: TextIO
) -> None:
    """One example, stage by stage."""
    example = instance.render()
    print(f"--- example {number}: task {instance.task}, type {instance.template_type}, mode {instance.mode}", file=out)
    shown = {name: value for name, value in row.items() if value and name not in _HIDDEN_FIELDS}
    print("row", file=out)
    for name, value in shown.items():
        print(f"    {name}: {value!r}", file=out)
    print("template", file=out)
    print(f"    instruction: {instance.instruction!r}\n    input: {instance.input!r}", file=out)
    print(f"    options: {len(instance.options)}, exemplars: {len(instance.exemplars)}", file=out)
    print("rendered", file=out)
    print(_indented(example.inputs), file=out)
    print("  target", file=out)
    print(_indented(example.targets), file=out)
    if tokenizer is not None:
        for label, text in (("input", example.inputs), ("target", example.targets)):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
            print(f"tokens of the {label}: {len(tokens)}\n    {' '.join(tokens)}", file=out)
    print(file=out)


def write_task_table(stream: TextStream, out: TextIO) -> None:
    """Tasks with weight, sizes, what was left out, and licence; heaviest first."""
    print(f"{'task':42} {'weight':>7} {'train':>8} {'held out':>8} {'left out':>8}  licence", file=out)
    manifest = sorted(stream.manifest(), key=lambda entry: -entry["weight"])
    for entry in manifest:
        left_out = stream.rows[entry["task"]].left_out.total()
        print(
            f"{entry['task']:42} {entry['weight']:7.2%} {entry['num_train']:8,} {entry['num_held_out']:8,} "
            f"{left_out:8,}  {entry['licence']}",
            file=out,
        )
    by_submixture: dict[str, float] = {}
    for entry in manifest:
        by_submixture[entry["submixture"]] = by_submixture.get(entry["submixture"], 0.0) + entry["weight"]
    ordered = sorted(by_submixture.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {share:.1%}" for name, share in ordered)
    print(f"{len(manifest)} tasks; {shares}\n", file=out)


def write_lengths(examples: Sequence[TextExample], tokenizer: Tokenizer | None, out: TextIO) -> None:
    """Percentiles of input and target lengths, over all and per template type."""
    unit = "words" if tokenizer is None else "tokens"

    def length(text: str) -> int:
        return len(text.split()) if tokenizer is None else len(tokenizer.encode(text))

    measured = [(example.template_type, length(example.inputs), length(example.targets)) for example in examples]
    print(f"lengths in {unit} over {len(measured):,} examples (median, 90 %, 99 %, longest)", file=out)
    for name in ["all", *sorted({template_type for template_type, _, _ in measured})]:
        rows = [entry for entry in measured if name in ("all", entry[0])]
        inputs = _percentiles([input_length for _, input_length, _ in rows])
        targets = _percentiles([target_length for _, _, target_length in rows])
        print(f"    {name:9} {len(rows) / len(measured):6.1%}   input {inputs}   target {targets}", file=out)


def _percentiles(values: list[int]) -> str:
    ordered = sorted(values)
    return " ".join(f"{ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]:5,}" for percent in _PERCENTILES)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))
