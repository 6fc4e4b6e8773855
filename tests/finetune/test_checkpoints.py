"""Checkpoint folders: loaded by transformers with the same logits, whole at every moment, faults named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetune import checkpoints
from finetune.checkpoints import CheckpointError, CheckpointStore, export, load_model, load_tensors, write_model
from finetune.config import ModelConfig
from finetune.model import T5
from finetune.tokenization import DEMO_TOKENIZER
from finetune.trainer import train
from tests.finetune.tiny import EXAMPLES, SHAPE, make_model, one_row, train_config, word_source

T5_1_0 = replace(SHAPE, feed_forward_proj="relu", tie_word_embeddings=True)


def write(folder: Path, model: T5, dtype: str = "float32") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, model, tokenizer=DEMO_TOKENIZER, dropout=0.1, card="# card\n", flan={"scores": {}}, dtype=dtype)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("config", [SHAPE, T5_1_0], ids=["untied", "tied"])
def test_the_state_round_trips_bit_for_bit(config: ModelConfig, tmp_path: Path) -> None:
    model = make_model(config)
    loaded = load_model(write(tmp_path, model))
    assert loaded.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert ("lm_head.weight" in load_tensors(tmp_path)) is not config.tie_word_embeddings
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644  # another user serves it


def test_transformers_keeps_the_head_apart_and_unscaled(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    model = make_model()
    reference, info = T5ForConditionalGeneration.from_pretrained(
        write(tmp_path, model), output_loading_info=True, local_files_only=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert reference.lm_head.weight is not reference.shared.weight
    assert torch.equal(reference.lm_head.weight, model.lm_head.weight)
    batch = one_row(EXAMPLES[0], input_length=6, target_length=4)
    with torch.no_grad():
        logits = reference.eval()(input_ids=batch.encoder_input_tokens, labels=batch.decoder_target_tokens).logits[0]
        assert torch.allclose(logits, model(batch), atol=1e-5)
    assert reference.generation_config.decoder_start_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer("a coin").input_ids[-1] == reference.generation_config.eos_token_id == tokenizer.eos_token_id


def test_what_transformers_writes_can_be_trained(tmp_path: Path) -> None:
    """Its config.json says tied beside a head that is not: refused with the way out, then read."""
    from transformers import T5ForConditionalGeneration

    model = make_model()
    T5ForConditionalGeneration.from_pretrained(write(tmp_path / "ours", model)).save_pretrained(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        load_model(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", tie_word_embeddings=False)
    batch = one_row(*EXAMPLES)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "theirs").eval()(batch), model(batch))


def test_faulty_tensors_are_all_named(tmp_path: Path) -> None:
    tensors = load_tensors(write(tmp_path, make_model()))
    del tensors["encoder.final_layer_norm.weight"]
    tensors["odd"] = torch.zeros(1)
    tensors["shared.weight"] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    for part in ("missing encoder.final_layer_norm.weight", "unexpected odd", r"shared.weight has shape (3, 3)"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08"), "model.safetensors: "),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: edit_config(folder, model_type="llama"), "only t5 can be trained"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "vocab_size is missing"),
    ],
)
def test_a_damaged_folder_is_named(break_it: Any, message: str, tmp_path: Path) -> None:
    break_it(write(tmp_path, make_model()))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_shards_are_read(tmp_path: Path) -> None:
    model = make_model()
    tensors = load_tensors(write(tmp_path, model))
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(load_model(tmp_path).shared.weight, model.shared.weight)


def test_store_publishes_the_newest_and_rotates(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run", keep=2)
    (tmp_path / "run").mkdir()
    for step in (5, 10, 15):
        folder = store.begin(step)
        write(folder, make_model(seed=step))
        (folder / checkpoints.STATE_FILE).write_text("{}")
        store.commit(folder)
    assert [path.name for path in store.finished()] == ["step-00000010", "step-00000015"]
    assert torch.equal(load_model(tmp_path / "run").shared.weight, make_model(seed=15).shared.weight)
    assert not (tmp_path / "run" / checkpoints.STATE_FILE).exists()
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []


def test_a_half_written_checkpoint_is_never_picked(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    write(folder := store.begin(5), make_model(seed=5))
    store.commit(folder)
    half = store.begin(10)
    (half / "model.safetensors").write_bytes(b"half")
    assert store.latest() == tmp_path / "training" / "step-00000005"
    assert torch.equal(load_model(tmp_path).shared.weight, make_model(seed=5).shared.weight)
    assert list(store.begin(10).iterdir()) == []  # a later try begins anew


def test_a_crash_while_saving_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills during the second checkpoint: the first still loads and resumes."""
    calls: list[int] = []

    def fills(*arguments: Any, **keywords: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            Path(arguments[1]).write_bytes(b"half")
            raise OSError("no space left on device")
        save_file(*arguments, **keywords)

    monkeypatch.setattr(checkpoints, "save_file", fills)
    config = train_config(tmp_path / "run")
    with pytest.raises(OSError, match="no space left"):
        train(config, source=word_source)
    monkeypatch.undo()
    load_model(tmp_path / "run")
    assert checkpoints.read_json(tmp_path / "run" / "flan.json")["step"] == 5
    train(config, resume=True, source=word_source)
    assert checkpoints.read_json(tmp_path / "run" / "flan.json")["step"] == 10


def test_the_folder_can_be_moved(tmp_path: Path) -> None:
    folder = train(train_config(tmp_path / "run"), source=word_source)
    shutil.move(folder, tmp_path / "elsewhere")
    load_model(tmp_path / "elsewhere")
    assert str(tmp_path / "run") not in (tmp_path / "elsewhere" / "config.json").read_text()


def test_export_to_bfloat16(tmp_path: Path) -> None:
    source = train(train_config(tmp_path / "run"), source=word_source)
    export(source, tmp_path / "out", "bfloat16")
    tensors = load_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name, tensor in load_tensors(source).items():
        assert torch.equal(tensors[name], tensor.bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "flan.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with pytest.raises(CheckpointError, match="already there"):
        export(source, tmp_path / "out", "bfloat16")


def test_training_goes_on_from_a_folder(tmp_path: Path) -> None:
    first = train(train_config(tmp_path / "first"), source=word_source)
    config = train_config(tmp_path / "second", model=None, tokenizer=None, init=str(first))
    config = replace(config, phases=(replace(config.phases[1], steps=1, learning_rate=1e-6),))
    second = train(config, source=word_source)
    one, other = load_tensors(first), load_tensors(second)
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_the_model_card_is_about_this_run(tmp_path: Path) -> None:
    card = (train(train_config(tmp_path / "run", description="A toy."), source=word_source) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in ("A toy.", "step 10 of 10", "| denoise | denoise | first | 4 |", "| copy | Apache-2.0 | 1.0000 |"):
        assert part in card
