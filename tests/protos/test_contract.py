"""The committed modules are what the contract generates, and the contract breaks no client that is out there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from protos import generate
from protos.flan.v1 import generation_pb2 as pb

ROOT = Path(__file__).parent.parent.parent
PROTO = ROOT / generate.PROTO

# Wire numbers are for ever; this says them a second time, in words, where a reviewer sees a change.
NUMBERS = {
    "GenerateRequest": "mode 1 instruction 2 input 3 options 4 exemplars 5 exemplar_set 6 num_exemplars 7 samples 8 "
    "answer_format 9 model 10 request_id 11 debug 12 max_tokens 20 min_tokens 21 temperature 22 top_p 23 top_k 24 "
    "repetition_penalty 25 seed 26 n 27 stop 28 logprobs 29 ignore_eos 30 skip_special_tokens 31 logit_bias 32",
    "GenerateStreamResponse": "delta 1 final 2",
    "GenerateManyResponse": "request_id 1 response 2 error 3",
}


def test_committed_modules_are_what_the_contract_generates(tmp_path: Path) -> None:
    written = generate.generate(tmp_path)
    assert len(written) == 4
    for path in written:
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes(), f"run `make protos`: {path.name}"


def test_nothing_breaks_the_baseline() -> None:
    assert generate.breaking_changes() == ""


def test_baseline_is_the_contract_as_it_is(tmp_path: Path) -> None:
    """Else a field added since the last `make protos` could still be renumbered unseen."""
    generate.write_baseline(tmp_path / "now.binpb")
    then, now = (FileDescriptorSet.FromString(p.read_bytes()) for p in (generate.BASELINE, tmp_path / "now.binpb"))
    assert then == now


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("optional int32 samples = 8;", "optional int32 samples = 108;", "samples"),
        ("optional int64 seed = 26;", "optional string seed = 26;", "seed"),
        ("bool tie = 8;", "bool tied = 8;", "tie"),
        ("FINISH_REASON_LENGTH = 2", "FINISH_REASON_LIMIT = 2", "FINISH_REASON"),
    ],
)
def test_a_breaking_change_is_seen(
    old: str, new: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = PROTO.read_text(encoding="utf-8")
    assert text.count(old) == 1
    changed = tmp_path / "flan/v1/generation.proto"
    changed.parent.mkdir(parents=True)
    changed.write_text(text.replace(old, new), encoding="utf-8")
    (tmp_path / "buf.yaml").write_bytes((generate.PROTOS / "buf.yaml").read_bytes())
    monkeypatch.setattr(generate, "PROTOS", tmp_path)
    assert complaint in generate.breaking_changes()


@pytest.mark.parametrize("message", NUMBERS)
def test_field_numbers(message: str) -> None:
    fields = pb.DESCRIPTOR.message_types_by_name[message].fields
    assert " ".join(f"{field.name} {field.number}" for field in fields) == NUMBERS[message]


def test_every_request_scalar_has_explicit_presence() -> None:
    seen = 0
    for message in (pb.GenerateRequest, pb.ScoreRequest, pb.TokenizeRequest, pb.Exemplar):
        for field in message.DESCRIPTOR.fields:
            if not field.is_repeated:
                assert field.has_presence, field.full_name
                seen += 1
    assert seen >= 30


@pytest.mark.parametrize("command", [["lint"], ["format", "--diff", "--exit-code"]])
def test_buf(command: list[str]) -> None:
    buf = generate.tool("buf")
    done = subprocess.run([buf, command[0], ROOT / "protos", *command[1:]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_runtime_floors_are_what_the_generator_stamped() -> None:
    generated = PROTO.parent
    stamped = {
        "protobuf": re.search(r"Protobuf Python Version: ([\d.]+)", (generated / "generation_pb2.py").read_text()),
        "grpcio": re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", (generated / "generation_pb2_grpc.py").read_text()),
    }
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package, match in stamped.items():
        assert match is not None
        assert f'"{package}>={match[1]},' in pyproject
