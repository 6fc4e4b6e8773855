"""A checkpoint is read strictly: each fault names its tensor or file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from serve.engine.weights import IGNORED, load_checkpoint
from serve.errors import CheckpointError
from tests.engine.checkpoints import Kind, make_t5_checkpoint, write_tensors


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", ["t5", "t5_v1_1", "mt5"])
def test_sharded_equals_single(tmp_path: Path, kind: Kind) -> None:
    single = load_checkpoint(make_t5_checkpoint(tmp_path / "single", kind))
    sharded = load_checkpoint(make_t5_checkpoint(tmp_path / "sharded", kind, shard_tensors=7))
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    assert single.tensors.keys() == sharded.tensors.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single.tensors)
    assert torch.equal(single.head, sharded.head)


@pytest.mark.parametrize(
    "name", ["decoder.block.1.layer.1.EncDecAttention.k.weight", "encoder.final_layer_norm.weight"]
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    folder = make_t5_checkpoint(tmp_path)
    tensors = tensors_of(folder)
    del tensors[name]
    write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=rf"tensor {name} is missing"):
        load_checkpoint(folder)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path)
    write_tensors(folder, tensors_of(folder) | {"decoder.block.9.surprise": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"decoder\.block\.9\.surprise is unexpected"):
        load_checkpoint(folder)


def test_a_misshapen_tensor_is_named(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path, vocab_size=384)
    change_config(folder, vocab_size=400)
    with pytest.raises(CheckpointError, match=r"shared\.weight has shape \(384, 64\), the config says \(400, 64\)"):
        load_checkpoint(folder)


def test_a_head_of_another_size_is_named(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path)
    write_tensors(folder, tensors_of(folder) | {"lm_head.weight": torch.zeros(300, 64)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape"):
        load_checkpoint(folder)


def test_the_old_cross_attention_bias_is_ignored(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path, "t5")
    write_tensors(folder, tensors_of(folder) | {IGNORED: torch.zeros(32, 4)})
    assert IGNORED not in load_checkpoint(folder).tensors


@pytest.mark.parametrize("alias", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_an_alias_stands_in_for_the_embedding(tmp_path: Path, alias: str) -> None:
    folder = make_t5_checkpoint(tmp_path, "t5_v1_1")
    tensors = tensors_of(folder)
    embedding = tensors.pop("shared.weight")
    write_tensors(folder, tensors | {alias: embedding})
    checkpoint = load_checkpoint(folder)
    assert torch.equal(checkpoint["shared.weight"], embedding)
    assert torch.equal(checkpoint.head, tensors["lm_head.weight"])
    assert not checkpoint.tied


def test_equal_aliases_are_fine_and_different_ones_are_not(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path, "t5")
    tensors = tensors_of(folder)
    alias = "decoder.embed_tokens.weight"
    write_tensors(folder, tensors | {alias: tensors["shared.weight"].clone()})
    assert load_checkpoint(folder).tied
    write_tensors(folder, tensors | {alias: tensors["shared.weight"] + 1})
    with pytest.raises(CheckpointError, match=rf"{alias} differs from shared\.weight"):
        load_checkpoint(folder)


def test_a_head_alone_is_no_embedding(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path, "t5_v1_1")
    tensors = tensors_of(folder)
    del tensors["shared.weight"]
    write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=r"shared\.weight is missing"):
        load_checkpoint(folder)


def test_the_checkpoint_decides_what_is_tied_not_the_config(tmp_path: Path) -> None:
    untied = make_t5_checkpoint(tmp_path / "untied", "t5_v1_1")
    change_config(untied, tie_word_embeddings=True)  # as transformers 5 writes it
    assert not load_checkpoint(untied).tied
    tied = make_t5_checkpoint(tmp_path / "tied", "t5")
    change_config(tied, tie_word_embeddings=False)
    assert load_checkpoint(tied).tied
    tensors = tensors_of(tied)
    write_tensors(tied, tensors | {"lm_head.weight": tensors["shared.weight"].clone()})
    assert load_checkpoint(tied).tied


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_checkpoint(tmp_path / "nowhere")
    folder = make_t5_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path, shard_tensors=20)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_checkpoint(folder)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path, shard_tensors=20)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["shared.weight"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"\.\./model\.safetensors"):
        load_checkpoint(folder)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_checkpoint(folder)


def test_pickles_are_refused_unless_trusted(tmp_path: Path) -> None:
    folder = make_t5_checkpoint(tmp_path)
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*--trust-checkpoint"):
        load_checkpoint(folder)
    assert not load_checkpoint(folder, trust_checkpoint=True).tied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "umt5"}, "umt5"),
        ({"feed_forward_proj": "gated-tanh"}, "gated-tanh"),
        ({"d_model": "64"}, "d_model"),
        ({"num_heads": 0}, "num_heads"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = make_t5_checkpoint(tmp_path)
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_an_unreadable_file_is_named_with_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_t5_checkpoint(tmp_path / "model")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything, so mode bits prove nothing
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not readable for uid \d+"):
        load_checkpoint(folder)
