"""The demo tokenizer behaves like T5's, and token streams render both objectives with exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.config import PhaseConfig
from finetune.example import TextExample
from finetune.tokenization import (
    ALPHABET,
    DEMO_TOKENIZER,
    TokenStream,
    load_tokenizer,
    save_tokenizer,
    sentinel_ids,
    train_tokenizer,
)
from tests.finetune.tiny import WordStream

TOKENIZER = load_tokenizer(DEMO_TOKENIZER)


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return found


class OneText:
    """A stream of one text, over and over."""

    def __init__(self, inputs: str, targets: str) -> None:
        self.example = TextExample(inputs, targets, "t", "zs_noopt")

    def __next__(self) -> TextExample:
        return self.example

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass

    def manifest(self) -> list[dict[str, Any]]:
        return []


def test_ids_are_laid_out_as_in_t5() -> None:
    assert [TOKENIZER.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert sentinel_ids(TOKENIZER) == list(range(8099, 7999, -1))
    assert TOKENIZER.get_vocab_size() == 8100


def test_white_space_folds_and_eos_is_appended() -> None:
    assert ids("one\n\ntwo \t three  ") == ids(" one two three")
    assert TOKENIZER.encode("one").ids == [*ids("one"), 1]
    assert TOKENIZER.decode(ids("Is this  a coin,\nor not?")) == "Is this a coin, or not?"


def test_a_digit_is_always_a_piece_of_its_own() -> None:
    pieces = TOKENIZER.encode("12 plus 905 is 917", add_special_tokens=False).tokens
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("12905917")


@pytest.mark.parametrize("character", list("{}<>~^\\`"))
def test_unknown_where_t5_has_unknown(character: str) -> None:
    assert 2 in ids(f"a {character} b")


def test_no_character_of_the_alphabet_is_unknown() -> None:
    assert {"a", "Z", "7", '"', "é"} <= set(ALPHABET)
    assert [character for character in ALPHABET if 2 in ids(character)] == []


def test_a_literal_special_token_is_text() -> None:
    phase = PhaseConfig("p", 1, "m", 1.0, input_length=64, target_length=32)
    source = OneText("a </s> b <pad> c <extra_id_0> d", "x </s> y")
    example = next(TokenStream(source, TOKENIZER, phase, overlong="trim", seed=0))
    for tokens in (example.encoder_input_tokens, example.decoder_target_tokens):
        assert tokens[-1] == 1
        assert not {0, 1, 8099} & set(tokens[:-1])
    assert {*ids("a b c d")} <= {*example.encoder_input_tokens}


def test_auto_tokenizer_reads_it_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_TOKENIZER, local_files_only=True)
    text = "What is 12 + 5?\n\nOPTIONS:\n- yes"
    assert tokenizer(text).input_ids == TOKENIZER.encode(text).ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.decode([8099, *ids("heads"), 1], skip_special_tokens=True) == "heads"


def test_training_makes_whole_words(tmp_path: Path) -> None:
    first = train_tokenizer([f"OPTIONS: heads or tails? {n} heads, {n} tails ☃" for n in range(40)], 300)
    assert first.encode("heads", add_special_tokens=False).tokens == ["▁heads"]
    assert first.encode("☃", add_special_tokens=False).ids[-1] == 2
    save_tokenizer(first, tmp_path, 64)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 64


def test_a_folder_without_a_fast_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)


def stream(objective: Any, overlong: Any = "trim", **lengths: int) -> TokenStream:
    settings: dict[str, Any] = {"input_length": 32, "target_length": 16} | lengths
    phase = PhaseConfig("p", 1, "m", 1.0, objective=objective, **settings)
    return TokenStream(WordStream("m", 3), TOKENIZER, phase, overlong=overlong, seed=5)


def test_an_instruction_example_is_its_text_plus_eos() -> None:
    text = next(WordStream("m", 3))
    example = next(stream("instruction"))
    assert example.encoder_input_tokens == (*ids(text.inputs), 1)
    assert example.decoder_target_tokens == (*ids(text.targets), 1)


def test_a_denoising_example_holds_the_whole_text() -> None:
    text: TextExample = next(WordStream("m", 3))
    example = next(stream("denoise"))
    sentinels = set(sentinel_ids(TOKENIZER))
    kept = [token for token in example.encoder_input_tokens if token not in sentinels and token != 1]
    hidden = [token for token in example.decoder_target_tokens if token not in sentinels and token != 1]
    assert sorted(kept + hidden) == sorted(ids(f"{text.inputs} {text.targets}"))
    assert example.encoder_input_tokens[-1] == example.decoder_target_tokens[-1] == 1


@pytest.mark.parametrize("objective", ["instruction", "denoise"])
def test_resume_goes_on_with_the_same_examples(objective: str) -> None:
    straight, first, second = stream(objective), stream(objective), stream(objective)
    expected = [next(straight) for _ in range(9)]
    assert [next(first) for _ in range(4)] == expected[:4]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [next(second) for _ in range(5)] == expected[4:]
    assert second.counts == straight.counts


def test_what_is_cut_or_dropped_is_counted() -> None:
    trimmed = stream("instruction", input_length=6, target_length=3)
    for example in (next(trimmed) for _ in range(50)):
        assert len(example.encoder_input_tokens) <= 6
        assert example.decoder_target_tokens[-1] == 1
    assert trimmed.counts["trimmed_targets"] > 0
    assert trimmed.counts["trimmed_inputs"] > 0
    dropping = stream("instruction", "drop", input_length=6, target_length=3)
    assert not any(next(dropping).trimmed for _ in range(20))
    assert dropping.counts["dropped"] > 0
