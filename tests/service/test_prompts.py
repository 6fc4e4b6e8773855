from __future__ import annotations

import doctest
import importlib
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import prompts
from serve.prompts import chat, cot
from serve.prompts.formats import COT_TRIGGER
from serve.request import ChatMessage, Exemplar, Mode
from serve.tokenizer import Tokenizer
from tests.service.test_tokenizer import T5_FOLDER, needs_t5

MODULES = (
    "serve.prompts",
    *(f"serve.prompts.{name}" for name in ("chat", "cot", "few_shot", "formats", "instruction")),
)
PAIR = (Exemplar("1+1?", "2", "one and one"), Exemplar("2+2?", "4"))


def test_every_worked_example_holds() -> None:
    modules = [*MODULES, "serve.metrics", "serve.voting", "serve.scoring"]
    ran = [doctest.testmod(importlib.import_module(name)) for name in modules]
    assert [result.failed for result in ran] == [0] * len(modules)
    assert sum(result.attempted for result in ran) >= 18


class TestRender:
    def test_all_modes(self) -> None:
        assert prompts.render(Mode.RAW, " a\n", "x") == " a\n"
        assert prompts.render(Mode.INSTRUCTION, " a ", " b ", ("c", " d ")) == "a\n\nb\n\nOPTIONS:\n- c\n- d"
        few = prompts.render(Mode.FEW_SHOT, "Add.", "3+3?", ("5", "6"), PAIR)
        assert few == "Add.\n\nQ: 1+1?\nA: 2\n\nQ: 2+2?\nA: 4\n\nQ: 3+3?\nOPTIONS:\n- 5\n- 6\nA:"
        chain = prompts.render(Mode.COT, "3+3?", exemplars=PAIR)
        assert chain == "Q: 1+1?\nA: one and one. The answer is 2.\n\nQ: 2+2?\nA: The answer is 4.\n\nQ: 3+3?\nA:"

    def test_the_trigger_is_there_without_exemplars_only(self) -> None:
        assert prompts.render(Mode.COT, "a", "b").endswith(f"\n\n{COT_TRIGGER}")
        assert COT_TRIGGER not in prompts.render(Mode.COT, "a", "b", exemplars=PAIR)

    @pytest.mark.parametrize("mode", list(Mode))
    @given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    @settings(max_examples=60, deadline=None)
    def test_the_users_words_stay_whole_and_no_placeholder_shows(self, mode: Mode, text: str) -> None:
        shown = prompts.render(mode, f"do {text} now", None, (), PAIR if mode in (Mode.FEW_SHOT, Mode.COT) else ())
        assert f"do {text} now" in shown
        assert shown.count("{") == text.count("{")

    @needs_t5
    def test_separators_survive_a_vocabulary_without_newlines(self) -> None:
        tokenizer = Tokenizer.load(T5_FOLDER)
        shown = tokenizer.decode(tokenizer.encode(prompts.render(Mode.FEW_SHOT, "Add.", "3+3?", ("5", "6"), PAIR)))
        assert shown == "Add. Q: 1+1? A: 2 Q: 2+2? A: 4 Q: 3+3? OPTIONS: - 5 - 6 A:"
        assert tokenizer.count_unknown(tokenizer.encode(prompts.render(Mode.COT, "a", exemplars=PAIR))) == 0

    def test_targets_are_what_a_prompt_shows(self) -> None:
        exemplar = PAIR[0]
        target = prompts.render_target(Mode.COT, exemplar.output, exemplar.rationale)
        assert f"A: {target}" in prompts.render(Mode.COT, "q?", exemplars=[exemplar])
        assert prompts.render_target(Mode.INSTRUCTION, " 4 ") == "4"


class TestChat:
    def test_system_comes_first_wherever_it_stands(self) -> None:
        turns = [ChatMessage("user", "a"), ChatMessage("system", "s"), ChatMessage("assistant", "b")]
        assert chat.render(turns) == "s\n\nUser: a\n\nAssistant: b\n\nAssistant:"

    def test_a_lone_user_turn_is_the_prompt_itself(self) -> None:
        assert chat.render([ChatMessage("user", " a ")]) == "a"


class TestSplit:
    @pytest.mark.parametrize(
        ("text", "rationale", "answer", "shown"),
        [
            ("3 times 4. The answer is 12.", "3 times 4.", "12", None),
            ("The answer is 12. Q: Bob? The answer is 7.", "", "12", "The answer is 12."),
            ("So the final answer is: yes", "So", "yes", None),
            ("the answer is 3.14. More.", "", "3.14", "the answer is 3.14."),
            ("The answer is $1,250.50.", "", "$1,250.50", None),
            ("The answer is the U.S. Army. Next", "", "the U.S. Army", "The answer is the U.S. Army."),
            ("The answer is Dr. King! Bye", "", "Dr. King", "The answer is Dr. King!"),
            ("The answer is (B). Because", "", "(B)", "The answer is (B)."),
            ("The answer is A. Because", "", "A", "The answer is A."),
            ("The answer is\nno\nQ: x", "", "no", "The answer is\nno"),
            ('The answer is "yes".', "", "yes", None),
            ("I do not know 7", "I do not know 7", None, None),
            ("The answer is", "", None, None),
            ("", "", None, None),
        ],
    )
    def test_texts(self, text: str, rationale: str, answer: str | None, shown: str | None) -> None:
        parts = cot.split(text)
        assert (parts.rationale, parts.answer) == (rationale, answer)
        assert parts.text == (text if shown is None else shown)

    @given(
        pieces=st.lists(
            st.sampled_from(
                [
                    "The answer is",
                    " answer is",
                    " the",
                    " 12",
                    ".",
                    " ",
                    "\n",
                    "5",
                    "U.S.",
                    " Dr.",
                    "A",
                    ")",
                    "!",
                    " is:",
                ]
            ),
            max_size=14,
        ),
        seed=st.integers(0, 10),
    )
    @settings(max_examples=500, deadline=None)
    def test_what_was_shown_of_a_growing_text_stays(self, pieces: list[str], seed: int) -> None:
        """Streaming shows `split(so far, ended=False).text`; later text never takes any of it back."""
        text, shown, chance = "", "", random.Random(seed)
        for piece in pieces:
            text += piece
            if chance.random() < 0.3:
                continue  # several tokens at once
            parts = cot.split(text, ended=False)
            assert parts.text.startswith(shown)
            shown = parts.text
            if parts.complete:
                assert cot.split(text + " 7. The answer is 9.").text == shown
                return
        assert cot.split(text).text.startswith(shown)


def test_the_folder_holds_strings_only() -> None:
    folder = Path(prompts.__file__).parent
    found = sorted(path.stem for path in folder.glob("*.py"))
    assert found == ["__init__", "chat", "cot", "few_shot", "formats", "instruction"]
