"""DESIGN's import table as data: who may import whom. Every module is read; the number read is asserted."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("serve", "finetune", "protos", "loadtests", "docs")
DOMAIN = ("serve.errors", "serve.request", "serve.sampling_params", "serve.output")
WIRE = ("fastapi", "starlette", "uvicorn", "grpc", "grpc_health", "grpc_reflection", "google", "httpx", "protos")
MODELS = ("torch", "transformers", "tokenizers", "safetensors", "vllm", "triton")
THIRD_PARTY = (*WIRE, *MODELS, "numpy", "prometheus_client", "pydantic", "huggingface_hub", "opentelemetry")


@dataclass(frozen=True)
class Rule:
    """A room: the modules it holds, what it may import of ours and of others. Longest matching prefix decides."""

    room: str
    ours: tuple[str, ...]
    others: tuple[str, ...] = ()


RULES = (
    *(Rule(name, DOMAIN) for name in DOMAIN),
    Rule("serve.config", DOMAIN),
    Rule("serve.api_keys", DOMAIN),
    Rule("serve.checkpoint", DOMAIN, ("huggingface_hub",)),
    Rule("serve.prompts", (*DOMAIN, "serve.prompts")),
    Rule("serve.tokenizer", (*DOMAIN, "serve.detokenizer", "serve.chat_template"), ("tokenizers", "transformers")),
    Rule("serve.detokenizer", DOMAIN),
    Rule("serve.chat_template", DOMAIN, ("transformers",)),
    Rule("serve.request_tracker", DOMAIN),
    Rule("serve.metrics", (*DOMAIN, "serve.request_tracker", "serve.runtimes.base"), ("prometheus_client",)),
    Rule("serve.telemetry", (*DOMAIN, "serve.request_tracker", "serve.tracing")),
    Rule("serve.tracing", (*DOMAIN, "serve.request_tracker"), ("opentelemetry",)),
    Rule("serve.engine", (*DOMAIN, "serve.config", "serve.engine"), ("torch", "safetensors", "numpy", "triton")),
    Rule("serve.runtimes", (*DOMAIN, "serve.runtimes")),
    Rule("serve.runtimes.torch_runtime", (*DOMAIN, "serve.runtimes", "serve.engine"), ("torch",)),
    Rule("serve.runtimes.causal_attention", (*DOMAIN, "serve.runtimes", "serve.engine"), ("torch",)),
    Rule("serve.runtimes.causal_model", (*DOMAIN, "serve.runtimes"), ("torch", "transformers")),
    Rule("serve.runtimes.causal_runner", (*DOMAIN, "serve.runtimes", "serve.engine"), ("torch",)),
    Rule("serve.runtimes.transformers_runtime", (*DOMAIN, "serve.runtimes", "serve.engine"), ("torch",)),
    Rule("serve.runtimes.vllm_runtime", (*DOMAIN, "serve.runtimes"), ("torch", "vllm")),
    Rule("serve.runtimes.vllm_engine", (*DOMAIN, "serve.runtimes"), ("vllm",)),
    Rule("serve.runtimes.vllm_logits", (*DOMAIN, "serve.runtimes"), ("torch", "vllm")),
    Rule("serve.runtimes.vllm_requests", (*DOMAIN, "serve.runtimes"), ("vllm",)),
    Rule("serve.vllm_t5", ("serve.vllm_t5",), ("torch", "transformers", "triton", "vllm")),
    *(
        Rule(
            name,
            (
                *DOMAIN,
                "serve.prompts",
                "serve.tokenizer",
                "serve.detokenizer",
                "serve.metrics",
                "serve.request_tracker",
                "serve.telemetry",
                "serve.runtimes.base",
                "serve.prepare",
                "serve.prompt_fitting",
                "serve.admission",
                "serve.voting",
                "serve.exemplars",
                "serve.output_text",
                "serve.response_stream",
                "serve.scoring",
                "serve.service_settings",
                "serve.service",
            ),
        )
        for name in (
            "serve.prepare",
            "serve.prompt_fitting",
            "serve.admission",
            "serve.voting",
            "serve.exemplars",
            "serve.output_text",
            "serve.response_stream",
            "serve.scoring",
            "serve.service_settings",
            "serve.service",
        )
    ),
    Rule(
        "serve.rest",
        (
            *DOMAIN,
            "serve.api_keys",
            "serve.config",
            "serve.metrics",
            "serve.request_tracker",
            "serve.service",
            "serve.admission",
            "serve.telemetry",
            "serve.rest",
        ),
        ("fastapi", "starlette", "uvicorn", "pydantic"),
    ),
    Rule(
        "serve.rpc",
        (
            *DOMAIN,
            "serve.api_keys",
            "serve.config",
            "serve.metrics",
            "serve.request_tracker",
            "serve.service",
            "serve.admission",
            "serve.telemetry",
            "serve.rpc",
            "protos",
        ),
        ("grpc", "grpc_health", "grpc_reflection", "google"),
    ),
    Rule("serve.client", (*DOMAIN, "serve.client", "protos"), ("grpc", "grpc_health", "google", "httpx")),
    Rule("serve.__main__", ("serve",), ("prometheus_client",)),  # the composition root sees every room
    Rule("finetune", ("finetune", "serve.prompts", "serve.request"), ("torch", "transformers", "tokenizers", "*")),
    Rule("finetune.evaluation", ("finetune", "serve.prompts", "serve.request", "serve.client", "serve.output"), ("*",)),
    Rule("loadtests", ("loadtests", "protos"), ("*",)),
    Rule("loadtests.bench", ("loadtests", "protos", "serve.engine", *DOMAIN), ("*",)),
    Rule(  # the reference is made from what it describes
        "docs",
        (
            *DOMAIN,
            "docs",
            "protos",
            "serve.client",
            "serve.config",
            "serve.metrics",
            "serve.rest",
            "serve.rpc",
            "serve.runtimes.base",
        ),
        ("google", "grpc_tools", "prometheus_client"),
    ),
    Rule("protos", ("protos",), ("grpc", "grpc_tools", "google", "mypy_protobuf")),
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> list[Path]:
    return sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if "_pb2" not in p.name)


def covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def rule_for(module: str) -> Rule | None:
    matching = [rule for rule in RULES if covers(rule.room, module)]
    return max(matching, key=lambda rule: len(rule.room), default=None)


def imports(path: Path) -> set[str]:
    """Every module that `path` imports, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            if node.module in PACKAGES:  # `from serve import prompts`
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            else:
                found.add(node.module)
    return found


def violations(path: Path) -> list[str]:
    module = module_name(path)
    rule = rule_for(module)
    if rule is None:
        return [] if module in PACKAGES else [f"{module}: no rule covers it"]
    wrong = []
    for name in imports(path):
        top = name.split(".")[0]
        if top in PACKAGES:
            if not any(covers(allowed, name) for allowed in rule.ours):
                wrong.append(f"{module} imports {name}")
        elif top in THIRD_PARTY and "*" not in rule.others and top not in rule.others:
            wrong.append(f"{module} imports {name}")
    return wrong


def test_every_module_keeps_to_the_table() -> None:
    seen = modules()
    assert len(seen) >= 60
    assert [line for path in seen for line in violations(path)] == []


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("serve/prompts/x.py", "import torch"),
        ("serve/engine/x.py", "from serve.prompts import cot"),
        ("serve/rest/x.py", "from serve.rpc import server"),
        ("serve/service.py", "from serve.engine.engine import Engine"),
        ("finetune/x.py", "from serve.service import Service"),
        ("serve/request.py", "def f():\n    import fastapi"),
    ],
)
def test_the_check_sees_a_breach(module: str, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(code)
    monkeypatch.setattr("tests.test_import_rules.ROOT", tmp_path)
    assert len(violations(path)) == 1


def test_no_module_takes_a_standard_library_name_or_is_a_drawer() -> None:
    drawers = {"utils", "common", "helpers", "misc"}
    assert [str(path) for path in modules() if path.stem in drawers] == []
