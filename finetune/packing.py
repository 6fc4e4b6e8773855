"""Several examples in one row, as SeqIO packs them.

Greedy and in order: an example joins the current row unless its inputs or its targets would overflow it; then the row
is done and the example begins the next one. Nothing is sorted, so the order of training is the order of the stream.

With rows of 8 inputs and 4 targets, examples of (inputs, targets) lengths (3, 2) (4, 2) (2, 1) (8, 4) give

    inputs     1 1 1 2 2 2 2 0        2 more inputs would not fit
    targets    1 1 2 2
    inputs     1 1 0 0 0 0 0 0        8 more inputs would not fit
    targets    1 0 0 0
    inputs     1 1 1 1 1 1 1 1
    targets    1 1 1 1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.example import TokenExample

Overlong = Literal["trim", "drop", "no_eos"]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Examples that share a row; segment ids are their places, from 1."""

    examples: tuple[TokenExample, ...]

    @property
    def num_input_tokens(self) -> int:
        return sum(len(example.encoder_input_tokens) for example in self.examples)

    @property
    def num_target_tokens(self) -> int:
        return sum(len(example.decoder_target_tokens) for example in self.examples)


@dataclass(slots=True)
class Packer:
    """The row being filled, and what went by. `add` returns a row when one is done."""

    input_length: int
    target_length: int
    examples: list[TokenExample] = field(default_factory=list)
    inputs_used: int = 0
    targets_used: int = 0

    def add(self, example: TokenExample) -> PackedRow | None:
        inputs, targets = len(example.encoder_input_tokens), len(example.decoder_target_tokens)
        if inputs > self.input_length or targets > self.target_length:
            raise ValueError(
                f"an example of {inputs} inputs and {targets} targets is longer than a row "
                f"({self.input_length} and {self.target_length}); fit it first (fit_lengths)"
            )
        row = None
        if self.inputs_used + inputs > self.input_length or self.targets_used + targets > self.target_length:
            row = self.flush()
        self.examples.append(example)
        self.inputs_used += inputs
        self.targets_used += targets
        return row

    def flush(self) -> PackedRow | None:
        """The row being filled, done or not; None when it is empty."""
        if not self.examples:
            return None
        row = PackedRow(tuple(self.examples))
        self.examples, self.inputs_used, self.targets_used = [], 0, 0
        return row

    def state_dict(self) -> list[dict[str, Any]]:
        """The leftovers, for a checkpoint."""
        return [
            {
                "encoder_input_tokens": list(example.encoder_input_tokens),
                "decoder_target_tokens": list(example.decoder_target_tokens),
                "task": example.task,
                "trimmed": example.trimmed,
            }
            for example in self.examples
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.flush()
        for item in state:
            self.add(
                TokenExample(
                    tuple(item["encoder_input_tokens"]),
                    tuple(item["decoder_target_tokens"]),
                    item["task"],
                    item["trimmed"],
                )
            )


def pack(examples: Iterable[TokenExample], input_length: int, target_length: int) -> Iterator[PackedRow]:
    """All rows of a finite stream of examples, the last one included."""
    packer = Packer(input_length, target_length)
    for example in examples:
        row = packer.add(example)
        if row is not None:
            yield row
    last = packer.flush()
    if last is not None:
        yield last


def fit_lengths(
    inputs: list[int], targets: list[int], eos_id: int, *, lengths: tuple[int, int], overlong: Overlong
) -> tuple[tuple[int, ...], tuple[int, ...], bool] | None:
    """Ids without EOS to ids that fit `lengths` (inputs, targets) with it; the flag says that the target was cut.

    trim     (default, as T5X) cut, then EOS: a cut target also ends in EOS and carries loss for it
    no_eos   a cut *target* has no EOS, so no false stop is taught; inputs always end in EOS
    drop     an example that is too long on either side is left out (None)

    >>> fit_lengths([7, 8, 9], [5, 5, 5], 1, lengths=(3, 3), overlong="trim")
    ((7, 8, 1), (5, 5, 1), True)
    >>> fit_lengths([7, 8, 9], [5, 5, 5], 1, lengths=(3, 3), overlong="no_eos")
    ((7, 8, 1), (5, 5, 5), True)
    >>> fit_lengths([7, 8, 9], [5], 1, lengths=(3, 3), overlong="drop") is None
    True
    """
    max_inputs, max_targets = lengths
    inputs_cut, target_cut = len(inputs) >= max_inputs, len(targets) >= max_targets
    if overlong == "drop" and (inputs_cut or target_cut):
        return None
    source = (*inputs[: max_inputs - 1], eos_id)
    if target_cut and overlong == "no_eos":
        return source, tuple(targets[:max_targets]), True
    return source, (*targets[: max_targets - 1], eos_id), target_cut


@dataclass(slots=True)
class PackingStats:
    """Counts for the packing report and the log."""

    counts: Counter[str] = field(default_factory=Counter)

    def see_row(self, row: PackedRow, packer: Packer) -> None:
        self.counts["rows"] += 1
        self.counts["examples"] += len(row.examples)
        self.counts["inputs"] += row.num_input_tokens
        self.counts["targets"] += row.num_target_tokens
        self.counts["input_room"] += packer.input_length
        self.counts["target_room"] += packer.target_length

    def efficiency(self) -> tuple[float, float]:
        """Shares of the rows' input and target room that hold tokens."""
        return (
            self.counts["inputs"] / max(1, self.counts["input_room"]),
            self.counts["targets"] / max(1, self.counts["target_room"]),
        )
