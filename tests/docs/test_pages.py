"""The reference says what is so: its tables are what the code generates, its examples print what is shown."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from docs import generate
from protos.flan.v1 import generation_pb2 as pb
from serve.config import load
from tests.docs.blocks import ROOT, Block, blocks_of, check_output
from tests.server.process import ServerProcess

PAGES = generate.pages()
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUNNABLE = [block for block in BLOCKS if block.language in ("sh", "python")]
NODE_PACKAGES = ROOT / "docs/examples/node/node_modules/@grpc/proto-loader"
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerProcess]:
    with ServerProcess("--exemplars", str(ROOT / "docs/examples/exemplars")) as process:
        yield process


def missing_tool(block: Block) -> str | None:
    """What the machine lacks for the block: the only reasons to pass one over."""
    first = block.body.split()[0]
    if first in ("node", "grpcurl", "buf") and shutil.which(first, path=search_path()) is None:
        return f"no {first} on PATH"
    if "grpc.mjs" in block.body and not NODE_PACKAGES.exists():
        return "run `npm install` in docs/examples/node"
    return None


def search_path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(block: Block, server: ServerProcess) -> str:
    rest = server.rest_url.removeprefix("http://")
    body = block.body.replace("localhost:8000", rest).replace("localhost:50051", server.grpc_target)
    command = ["bash", "-c", body] if block.language == "sh" else [sys.executable, "-c", body]
    # Offline, huggingface_hub's client would not ask a local server either.
    environment = {**os.environ, "PATH": search_path(), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_what_the_code_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert generate.filled(text) == text, "run `make docs`"


def test_every_part_is_used() -> None:
    used = {mark for page in PAGES for mark in re.findall(r"<!-- generated: (\w+\.\w+)", page.read_text("utf-8"))}
    assert used == set(generate._TABLES)


def test_there_is_much_to_run() -> None:
    assert len(RUNNABLE) >= 25
    assert sum(block.output is not None for block in RUNNABLE) >= 25


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: block.place)
def test_each_example_prints_what_is_shown(demo: ServerProcess, block: Block) -> None:
    lack = missing_tool(block)
    if lack is not None:
        pytest.skip(lack)
    printed = run(block, demo)
    if block.output is None:
        assert printed.strip()
    else:
        check_output(block.output, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ('{"a": 1}', '{"a": 2}'),
        ('{"a": 1}', '{"a": 1, "b": 1}'),
        ('{"total_ms": 1.5}', '{"total_ms": "soon"}'),
        ('{"p": 0.5}', '{"p": 0.6}'),
        ("positive\n", "negative\n"),
        ('data: {"index":0,"text":"la"}\ndata: [DONE]\n', 'data: {"index":0,"text":"la"}\n'),
        ('data: {"index":0,"text":"la"}\n', 'data: {"index":0,"text":"l"}\n'),
    ],
)
def test_another_output_is_seen(shown: str, printed: str) -> None:
    check_output(shown, shown)
    with pytest.raises(AssertionError):
        check_output(shown, printed)


def test_how_a_stream_is_cut_does_not_matter() -> None:
    shown = 'data: {"index":0,"text":"la"}\n\ndata: {"index":0,"text":"","finish_reason":"stop"}\n\ndata: [DONE]\n'
    check_output(shown, 'data: {"index":0,"text":"la","finish_reason":"stop"}\ndata: [DONE]\n')


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in {f"#{slug(title)}" for title in re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.M)}


def slug(title: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_readme_leads_here() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert "(docs/README.md)" in readme
    assert [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in index] == []


def test_the_example_configuration_is_accepted(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if block.language == "toml")
    path = tmp_path / "serve.toml"
    path.write_text(block.body, encoding="utf-8")
    settings = load(["--config", str(path)], {}).settings
    for key, value in tomllib.loads(block.body).items():
        name = {"served-model-name": "served_model_names"}.get(key, key.replace("-", "_"))
        assert getattr(settings, name) == (tuple(value) if isinstance(value, list) else value)


def test_every_series_of_a_server_is_on_the_page(demo: ServerProcess) -> None:
    httpx.post(f"{demo.rest_url}/v1/generate", json={"instruction": "Find the odd one out. a, b"}, timeout=60)
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    described = dict(re.findall(r"^\| `([\w:]+)` \| \w+ \| (.*?) \|", page, re.MULTILINE))
    lines = [line for line in httpx.get(f"{demo.rest_url}/metrics").text.splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    seen = set()
    for line in lines:
        found = re.match(r"([\w:]+)(?:\{(.*)\})? ", line)
        assert found is not None
        name = re.sub(r"_(bucket|sum|count)$", "", found[1]) if found[1] not in described else found[1]
        labels = set(re.findall(r'(\w+)="', found[2] or "")) - {"le"}
        assert labels == set(re.findall(r"`(\w+)`", described[name])), name
        seen.add(name)
    assert seen == set(described)


def test_the_go_example_knows_the_contract() -> None:
    """Its toolchain is not part of the tests; but it cannot name a field, a method or a value that is not there."""
    program = (ROOT / "docs/examples/go/main.go").read_text(encoding="utf-8")
    messages = pb.DESCRIPTOR.message_types_by_name
    fields = {field.name for message in messages.values() for field in message.fields}
    named = set(re.findall(r"(?<!Violations\(\)\[0\])\.Get([A-Z]\w+)\(\)", program)) - {"FieldViolations"}
    said = set(re.findall(r"^\t\t([A-Z]\w+):", program, re.MULTILINE))
    assert len(named | said) >= 7
    assert {snake(name) for name in named | said} <= fields
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["FlanService"].methods}
    assert set(re.findall(r"client\.(\w+)\(", program)) <= methods
    assert set(re.findall(r"flanv1\.Mode_(\w+)", program)) <= set(pb.Mode.keys())


def snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def test_the_node_package_asks_for_what_the_program_imports() -> None:
    folder = ROOT / "docs/examples/node"
    wanted = set(json.loads((folder / "package.json").read_text(encoding="utf-8"))["dependencies"])
    imported = set(re.findall(r'from "(?!node:)([^"]+)"', (folder / "grpc.mjs").read_text(encoding="utf-8")))
    assert imported == wanted
    assert not re.search(r'from "(?!node:)', (folder / "rest.mjs").read_text(encoding="utf-8"))
