"""Checkpoint folders: found without a network, looked over, every fault named."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from serve import checkpoint
from serve.errors import CheckpointError


def write_folder(folder: Path, config: dict[str, Any] | None = None, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    contents = {
        "config.json": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]} | (config or {}),
        "tokenizer.json": {},
    }
    for name, content in {**contents, **{k.replace("__", "."): v for k, v in files.items()}}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_local_folder_never_touches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    folder = write_folder(tmp_path / "google")
    assert checkpoint.find(str(folder)) == folder
    assert checkpoint.served_name(str(folder)) == "google"
    assert checkpoint.inspect(folder, "google").is_encoder_decoder


def test_no_model_is_the_demo() -> None:
    assert (checkpoint.find(None), checkpoint.served_name(None)) == (checkpoint.DEMO_FOLDER, "flan-demo")


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.find(model)


def test_a_hub_id_offline_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="neither a folder here nor to be had from the hub"):
        checkpoint.find("nobody/no-such-model")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        checkpoint.inspect(folder, "m")
    folder = write_folder(tmp_path / "n")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor spiece\.model"):
        checkpoint.inspect(folder, "n")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        checkpoint.inspect(write_folder(tmp_path / "o", generation_config__json="{"), "o")


def test_generation_defaults_count_sampling_fields_only_when_sampling(tmp_path: Path) -> None:
    inert = {"temperature": 0.3, "top_p": 0.5, "repetition_penalty": 1.2, "max_new_tokens": 64}
    folder = write_folder(tmp_path / "a", generation_config__json=inert)
    assert checkpoint.inspect(folder, "a").generation_defaults == {"repetition_penalty": 1.2, "max_tokens": 64}
    folder = write_folder(tmp_path / "b", generation_config__json={"do_sample": True, "top_k": 40})
    assert checkpoint.inspect(folder, "b").generation_defaults == {"top_k": 40, "temperature": 1.0}


def test_prompt_format_version_comes_from_flan_json(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", flan__json={"prompt_format_version": 1})
    assert checkpoint.inspect(folder, "a").prompt_format_version == 1
