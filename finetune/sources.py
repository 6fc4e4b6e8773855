"""Readers: from a file of a public data set to rows, one dict a line or instance.

A reader is a generator `read(path, options) -> rows`. It knows one file format and its documented traps, and no task:
which field is the input is the task's business (`finetune.tasks`). Rows carry the source's own field names, except
where a reader says otherwise. Files are always read as UTF-8, and lines are cut at "\\n" only: `str.splitlines` also
cuts at U+2028, which stands inside two GSM8K rows.

>>> sorted(READERS)[:3]
['alps', 'cl_benchmark', 'commonsenseqa']
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

T0_END_MARK = "<|endoftext|>"  # ends every completion of the T0 sample as literal text
_OPTIONS_HEADING = re.compile(r"\n+options:\s*\n", re.IGNORECASE)


class SourceError(ValueError):
    """A file that cannot be read as its format says; the message names the file, and the line where there is one."""


@dataclass(slots=True)
class ReadOptions:
    """Settings a task gives to its reader, and what the reader counted.

    skip_damaged   False: a damaged line is an error. True: it is left out and counted as "damaged".
    unescape       AG News only: backslashes stand for spaces, and `#39;`, `quot;` ... for characters.
    strip_prefix   text cut from the front of cl_benchmark sentences ("Text: ").
    body_only      cl_benchmark: of "Title: ...\\nText: ..." keep the text.
    header         alps: the file begins with a header line.
    skipped        how many rows were left out, by reason.
    """

    skip_damaged: bool = False
    unescape: bool = False
    strip_prefix: str = ""
    body_only: bool = False
    header: bool = False
    skipped: Counter[str] = field(default_factory=Counter)


Reader = Callable[[Path, ReadOptions], Iterator[Row]]


def read_jsonl(path: Path, options: ReadOptions) -> Iterator[Row]:
    """One JSON object a line, as it stands: `{input, output, options?, rationale?}` is our own form."""
    for number, line in _lines(path):
        row = _json_line(path, number, line, options)
        if row is not None:
            yield row


def read_t0(path: Path, options: ReadOptions) -> Iterator[Row]:
    """T0 / P3 lines `{prompt, completion}` as `{input, output}`, without the end mark; empty targets are skipped."""
    for number, line in _lines(path):
        row = _json_line(path, number, line, options)
        if row is None:
            continue
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("completion"), str):
            _damaged(path, number, "prompt and completion must be texts", options)
            continue
        output = row["completion"].removesuffix(T0_END_MARK).strip()
        if not output:
            options.skipped["empty completion"] += 1
            continue
        yield {"input": row["prompt"].strip(), "output": output}


def read_cot_tsv(path: Path, options: ReadOptions) -> Iterator[Row]:
    r"""FLAN chain-of-thought lines `question, answer, chain` as `{input, output, rationale, options?}`.

    No quoting: 975 CREAK questions begin with a quote. `\n` is a two-character escape. Choices at the end of a
    question ("Options:" and one line each) become `options`, so that our own OPTIONS form shows them, or hides them.
    """
    for number, line in _lines(path):
        cells = line.split("\t")
        if len(cells) != 3:
            _damaged(path, number, f"3 tab-separated columns expected, {len(cells)} found", options)
            continue
        question, answer, chain = (cell.replace("\\n", "\n").strip() for cell in cells)
        if not question or not answer or not chain:
            _damaged(path, number, "an empty column", options)
            continue
        text, *choices = _OPTIONS_HEADING.split(question, maxsplit=1)
        row: Row = {"input": text.strip(), "output": answer, "rationale": chain}
        if choices:
            row["options"] = [choice.removeprefix("-").strip() for choice in choices[0].split("\n") if choice.strip()]
            row["show_options"] = True  # the question makes no sense without them
        yield row


def read_natural_instructions(path: Path, options: ReadOptions) -> Iterator[Row]:
    """Instances of one Natural Instructions task as `{definition, input, output, accepted, positive}`.

    The definition may be a text or a list of one; `accepted` holds all references, `output` the first that is not
    empty; instances without one are skipped. `positive` is the list of positive examples of the task.
    """
    task = _json_file(path)
    if not isinstance(task, dict) or not isinstance(task.get("Instances"), list):
        raise SourceError(f"{path}: no list of Instances; is this a Natural Instructions task file?")
    definition = task.get("Definition", "")
    definition = " ".join(definition) if isinstance(definition, list) else definition
    for index, instance in enumerate(task["Instances"]):
        if not isinstance(instance, dict) or "input" not in instance or "output" not in instance:
            _damaged(path, index + 1, "an instance needs input and output", options)
            continue
        outputs = instance["output"] if isinstance(instance["output"], list) else [instance["output"]]
        accepted = [text.strip() for text in outputs if text.strip()]
        if not accepted:
            options.skipped["empty reference"] += 1
            continue
        yield {
            "definition": definition.strip(),
            "input": instance["input"].strip(),
            "output": accepted[0],
            "accepted": accepted,
            "positive": task.get("Positive Examples", []),
        }


def natural_instructions_licence(path: Path) -> str:
    """The `Instance License` of a Natural Instructions task file, as one text."""
    licence = _json_file(path).get("Instance License", "")
    return ", ".join(licence) if isinstance(licence, list) else str(licence)


def read_cl_benchmark(path: Path, options: ReadOptions) -> Iterator[Row]:
    """Classification sets `[{sentence, label}]` with the label list in `labels.json` beside the file.

    Rows as `{input, output, options}`. Rows labelled outside the list (131 of MNLI are "-") are skipped.
    """
    labels = _json_file(path.with_name("labels.json"))
    for index, row in enumerate(_json_file(path)):
        if not isinstance(row, dict) or "sentence" not in row or "label" not in row:
            _damaged(path, index + 1, "a row needs sentence and label", options)
            continue
        if row["label"] not in labels:
            options.skipped["unlabelled"] += 1
            continue
        text = row["sentence"].removeprefix(options.strip_prefix)
        text = text.split("\nText:", 1)[-1] if options.body_only else text
        text = unescape_agnews(text) if options.unescape else text
        yield {"input": text.strip(), "output": row["label"], "options": list(labels)}


def read_alps(path: Path, options: ReadOptions) -> Iterator[Row]:
    """Two-column lines `text, label` (label last) as `{input, output}`; SST-2 has a header, AG News has none."""
    for number, line in _lines(path):
        if options.header and number == 1:
            continue
        text, tab, label = line.rpartition("\t")
        if not tab or not text.strip() or not label.strip():
            _damaged(path, number, "a text, a tab and a label expected", options)
            continue
        yield {"input": (unescape_agnews(text) if options.unescape else text).strip(), "output": label.strip()}


def read_commonsenseqa(path: Path, options: ReadOptions) -> Iterator[Row]:
    """CommonsenseQA v1.11 nested lines as `{input, output, options}`; the output is the choice's text."""
    for number, line in _lines(path):
        row = _json_line(path, number, line, options)
        if row is None:
            continue
        try:
            choices = {choice["label"]: choice["text"] for choice in row["question"]["choices"]}
            answer = choices[row["answerKey"]]
            yield {"input": row["question"]["stem"], "output": answer, "options": list(choices.values())}
        except (KeyError, TypeError) as error:
            _damaged(path, number, f"not a CommonsenseQA line ({error})", options)


def read_instruction_induction(path: Path, options: ReadOptions) -> Iterator[Row]:
    """`{"examples": {"1": {...}}}`: the example dicts as they stand; their field names differ from task to task."""
    content = _json_file(path)
    examples = content.get("examples") if isinstance(content, dict) else None
    if not isinstance(examples, dict):
        raise SourceError(f"{path}: no dict of examples; is this an instruction-induction file?")
    for key, example in examples.items():
        if isinstance(example, dict):
            yield dict(example)
        else:
            _damaged(path, int(key) if key.isdigit() else 0, "an example must be a dict", options)


READERS: dict[str, Reader] = {
    "jsonl": read_jsonl,
    "t0": read_t0,
    "cot_tsv": read_cot_tsv,
    "natural_instructions": read_natural_instructions,
    "cl_benchmark": read_cl_benchmark,
    "alps": read_alps,
    "commonsenseqa": read_commonsenseqa,
    "instruction_induction": read_instruction_induction,
}


def unescape_agnews(text: str) -> str:
    r"""Repair the escapes that AG News was published with.

    >>> unescape_agnews(r"NASA #39;s plane is\\expected to  quot;land quot;")
    'NASA\'s plane is expected to "land"'
    """
    text = re.sub(r"\\+", " ", text)
    for escaped, character in (("#39;", "'"), ("quot;", '"'), ("amp;", "&"), ("lt;", "<"), ("gt;", ">")):
        text = re.sub(rf"(?:&| )?{escaped}", character, text)
    text = re.sub(r'"\s*([^"]*?)\s*"', r'"\1"', text)
    return re.sub(r" {2,}", " ", text)


def find_files(pattern: str, data_dirs: list[Path]) -> list[Path]:
    """Files that match `pattern` in the first data folder that has any, directly or under its `train/`; sorted."""
    for folder in data_dirs:
        for root in (folder, folder / "train"):
            found = sorted(path for path in root.glob(pattern) if path.is_file())
            if found:
                return found
    searched = ", ".join(str(folder) for folder in data_dirs)
    raise SourceError(f"no file {pattern} under {searched}; name the data folder with --data DIR")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, cut at "\\n" only, without blank ones."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                text = line.removesuffix("\n")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 ({error})") from error


def _json_line(path: Path, number: int, line: str, options: ReadOptions) -> Row | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        _damaged(path, number, str(error), options)
        return None
    if not isinstance(row, dict):
        _damaged(path, number, "a JSON object expected", options)
        return None
    return row


def _json_file(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: {error}") from error


def _damaged(path: Path, number: int, reason: str, options: ReadOptions) -> None:
    if not options.skip_damaged:
        raise SourceError(f"{path}, line {number}: {reason}; set skip_damaged = true to leave such lines out")
    options.skipped["damaged"] += 1
