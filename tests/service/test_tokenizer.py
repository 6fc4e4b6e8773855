from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.detokenizer import DecodeTable, IncrementalText, UnsupportedDecoder
from serve.errors import CheckpointError, InvalidRequest
from serve.tokenizer import Tokenizer, check_text
from tests.service.toy_tokenizers import (
    byte_fallback,
    byte_fallback_spec,
    byte_level,
    byte_level_spec,
    library_of,
    t5_like,
    t5_like_spec,
)

T5_FOLDER = Path(__file__).parents[3] / "shared" / "data" / "tokenizer" / "t5"
needs_t5 = pytest.mark.skipif(not (T5_FOLDER / "tokenizer.json").is_file(), reason="no T5 tokenizer here")


@pytest.fixture(scope="session")
def t5() -> Tokenizer:
    return Tokenizer.load(T5_FOLDER)


def incremental(tokenizer: Tokenizer, ids: list[int], **options: object) -> tuple[list[str], IncrementalText]:
    text = IncrementalText(tokenizer.table, **options)  # type: ignore[arg-type]
    pieces = [text.push(token_id) for token_id in ids]
    return [*pieces, text.flush()], text


class TestEncode:
    @pytest.mark.parametrize("text", ["a</s> b", "<pad> x", "<extra_id_0> is", "<unk>", "x</s>", "</s></s>"])
    def test_a_literal_special_token_is_text(self, text: str) -> None:
        tokenizer = t5_like()
        ids = tokenizer.encode(text)
        sentinels = {tokenizer.size - 1, tokenizer.size - 2, tokenizer.size - 3}
        assert ids[-1] == tokenizer.eos_id
        assert not ({0, 1} | sentinels) & set(ids[:-1])
        assert tokenizer.count_unknown(ids) == text.count("<")  # `<` has no piece, as in T5

    @needs_t5
    @pytest.mark.parametrize("text", ["a</s> b", "<pad> x", "<extra_id_0> is", "<unk>", "x</s>", "<extra_id_99>"])
    def test_a_literal_special_token_is_text_for_t5(self, t5: Tokenizer, text: str) -> None:
        ids = t5.encode(text)
        assert ids.count(1) == 1
        assert ids[-1] == 1
        assert 0 not in ids
        assert max(ids) < 32000
        assert t5.encode(text.replace("<", "{"))[:3] == ids[:3]  # cut and extended nowhere

    @pytest.mark.parametrize("text", ["a<|end|>b", "<|end|>", "the<|end|>"])
    def test_a_literal_special_token_is_text_for_bytes(self, text: str) -> None:
        tokenizer = byte_level()
        assert tokenizer.eos_id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_bos_of_the_template_stays_and_no_other_comes(self) -> None:
        ids = byte_fallback().encode("a</s><s>")
        assert ids[0] == 1
        assert not {1, 2} & set(ids[1:])
        assert byte_fallback().encode("a", add_special_tokens=False) == ids[1:2]

    def test_special_tokens_on_and_off(self) -> None:
        tokenizer = t5_like()
        assert tokenizer.encode("yes") == (*tokenizer.encode("yes", add_special_tokens=False), 1)
        assert tokenizer.encode("") == (1,)

    @needs_t5
    def test_newlines_and_runs_of_spaces_vanish_in_t5(self, t5: Tokenizer) -> None:
        assert t5.encode("a\n\nb") == t5.encode("a b") == t5.encode("a \t  b") == (3, 9, 3, 115, 1)
        assert t5.encode(" \n ") == t5.encode("") == (1,)

    @needs_t5
    def test_braces_are_unknown_and_counted_in_t5(self, t5: Tokenizer) -> None:
        ids = t5.encode('Return {"a": 1} if x < 3')
        assert t5.count_unknown(ids) == 3
        shown = t5.decode(ids)
        assert "⁇" not in shown
        assert "<unk>" not in shown
        assert t5.decode(ids, skip_special_tokens=False).count("<unk>") == 3

    @needs_t5
    def test_size_is_the_tokenizers_not_the_models(self, t5: Tokenizer) -> None:
        assert (t5.size, t5.eos_id, t5.unknown_id) == (32100, 1, 2)

    @needs_t5
    @given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00<>"), max_size=40))
    @settings(max_examples=200, deadline=None)
    def test_ordinary_text_is_tokenized_as_the_library_does(self, t5: Tokenizer, text: str) -> None:
        library = _library("t5")
        assert list(t5.encode(text)) == library.encode(text).ids

    def test_many_threads_share_one_tokenizer(self) -> None:
        tokenizer = t5_like()
        texts = [f"the answer {n} is " + "yes " * (n % 50) for n in range(500)]
        expected = [tokenizer.encode(text) for text in texts]
        with ThreadPoolExecutor(32) as threads:
            assert list(threads.map(tokenizer.encode, texts)) == expected

    async def test_a_big_text_in_a_thread_leaves_the_loop_free(self) -> None:
        tokenizer, gaps, done = t5_like(), [0.0], threading.Event()

        async def watch() -> None:
            last = time.monotonic()
            while not done.is_set():
                await asyncio.sleep(0.01)
                gaps.append(time.monotonic() - last)
                last = time.monotonic()

        watcher = asyncio.create_task(watch())
        started = time.monotonic()
        await asyncio.to_thread(tokenizer.encode, "the answer is yes and no. " * 80_000)
        taken = time.monotonic() - started
        done.set()
        await watcher
        assert len(gaps) > 5
        assert max(gaps) < max(0.5, taken / 3)


class TestCheckText:
    @pytest.mark.parametrize("text", ["a\x00b", "\ud800", "x\udfffy"])
    def test_what_is_no_text_is_refused_by_name(self, text: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            check_text("input", text)
        assert caught.value.field == "input"

    def test_any_other_text_passes(self) -> None:
        check_text("input", "\u2028 \U0001f600 \x7f \ufffe é 中")


class TestDecode:
    @needs_t5
    def test_default_output_shows_no_special_token(self, t5: Tokenizer) -> None:
        ids = [0, 2, 32099, 71, 32000, 2, 1, 0]
        shown = t5.decode(ids)
        assert shown.strip() == "A"
        assert t5.decode(ids, skip_special_tokens=False) == "<pad><unk><extra_id_0> A<extra_id_99><unk></s><pad>"

    def test_ids_beyond_the_tokenizer_have_no_text(self) -> None:
        tokenizer = t5_like()
        assert tokenizer.decode([tokenizer.size, 10**9]) == ""
        assert tokenizer.token_text(tokenizer.size) == ""
        assert tokenizer.token_text(-1) == ""

    def test_token_texts(self) -> None:
        tokenizer = t5_like()
        [yes, eos] = tokenizer.encode("yes")
        assert (tokenizer.token_text(yes), tokenizer.token_text(eos)) == (" yes", "</s>")
        first = byte_level().encode("é")[0]
        assert byte_level().token_text(first) == "bytes:\\xc3"

    @pytest.mark.parametrize(
        ("make", "spec"), [(t5_like, t5_like_spec), (byte_level, byte_level_spec)], ids=["t5", "bytes"]
    )
    @given(data=st.data())
    @settings(max_examples=150, deadline=None)
    def test_joined_pieces_are_the_full_decode(
        self, make: Callable[[], Tokenizer], spec: Callable[[], str], data: st.DataObject
    ) -> None:
        tokenizer, library = make(), _library(spec())
        ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=40))
        for skip in (True, False):
            pieces, _ = incremental(tokenizer, ids, skip_special_tokens=skip)
            whole = library.decode(ids, skip_special_tokens=skip)
            # An unfinished character at the very end is dropped, where the library writes one U+FFFD.
            assert "".join(pieces) in (whole, whole.removesuffix("\ufffd"))
            assert tokenizer.decode(ids, skip_special_tokens=skip) == "".join(pieces)

    @given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00▁"), max_size=30))
    @settings(max_examples=200, deadline=None)
    def test_joined_pieces_are_the_full_decode_with_byte_fallback(self, text: str) -> None:
        ids = list(byte_fallback().encode(text))
        pieces, _ = incremental(byte_fallback(), ids)
        assert "".join(pieces) == text == _library(byte_fallback_spec()).decode(ids)
        assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)

    @needs_t5
    @given(data=st.data())
    @settings(max_examples=200, deadline=None)
    def test_joined_pieces_are_the_full_decode_of_t5(self, t5: Tokenizer, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 32099)), max_size=40))
        for skip in (True, False):
            pieces, _ = incremental(t5, ids, skip_special_tokens=skip)
            assert "".join(pieces) == _library("t5").decode(ids, skip_special_tokens=skip)

    def test_a_character_split_over_tokens_comes_whole(self) -> None:
        ids = list(byte_level().encode("a😀b"))
        pieces, _ = incremental(byte_level(), ids)
        assert [piece for piece in pieces if piece] == ["a", "😀", "b"]
        for cut in range(2, 5):  # max_tokens inside the emoji: the tail is dropped
            assert "".join(incremental(byte_level(), ids[:cut])[0]) == "a"

    def test_an_added_token_is_written_as_it_is(self) -> None:
        tokenizer = byte_level()
        [added] = [token_id for token_id in range(tokenizer.size) if tokenizer.token_text(token_id) == "<a tool>"]
        assert tokenizer.decode([*tokenizer.encode("x"), added]) == "x<a tool>"

    def test_an_unknown_kind_of_decoder_is_refused(self) -> None:
        with pytest.raises(UnsupportedDecoder, match="WordPiece"):
            DecodeTable(["a"], {"type": "WordPiece", "prefix": "##", "cleanup": True}, frozenset())
        with pytest.raises(UnsupportedDecoder, match="none"):
            DecodeTable(["a"], None, frozenset())


def first_stop(text: str, stops: list[str], boundary: int) -> int | None:
    """Reference: where the stop string begins that is complete first beyond `boundary`, by trying every end."""
    for end in range(boundary + 1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


class TestStop:
    @pytest.mark.parametrize("make", [t5_like, byte_level], ids=["t5", "bytes"])
    @given(data=st.data())
    @settings(max_examples=200, deadline=None)
    def test_random_stop_strings_cut_where_the_reference_does(
        self, make: Callable[[], Tokenizer], data: st.DataObject
    ) -> None:
        tokenizer = make()
        words = tokenizer.encode("the answer is is a a abab", add_special_tokens=False)
        ids = data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=15))
        stops = data.draw(st.lists(st.text("ais theb", min_size=1, max_size=5), min_size=1, max_size=3))
        min_tokens = data.draw(st.integers(0, 6))
        plain, _ = incremental(tokenizer, ids)
        boundary = len("".join(plain[:min_tokens]))
        cut = first_stop("".join(plain), stops, boundary)
        pieces, text = incremental(tokenizer, ids, stop=stops, min_tokens=min_tokens)
        assert "".join(pieces) == "".join(plain)[:cut]
        assert (text.stop_reason is None) == (cut is None)

    @given(data=st.data())
    @settings(max_examples=150, deadline=None)
    def test_text_is_held_only_while_it_may_become_a_stop_string(self, data: st.DataObject) -> None:
        tokenizer = t5_like()
        words = tokenizer.encode("the answer is a a", add_special_tokens=False)
        ids = data.draw(st.lists(st.sampled_from(words), max_size=12))
        stops = data.draw(st.lists(st.text("ais th", min_size=1, max_size=6), min_size=1, max_size=3))
        text, plain = IncrementalText(tokenizer.table, stop=stops), IncrementalText(tokenizer.table)
        given_out = whole = ""
        for token_id in ids:
            given_out += text.push(token_id)
            whole += plain.push(token_id)
            if text.stop_reason is not None:
                break
            held = whole[len(given_out) :]
            assert whole.startswith(given_out)
            assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)

    def test_a_stop_string_over_token_boundaries(self) -> None:
        tokenizer = t5_like()
        ids = list(tokenizer.encode("yes so the answer is no", add_special_tokens=False))
        pieces, text = incremental(tokenizer, ids, stop=["e answ"])
        assert "".join(pieces) == "yes so th"
        assert text.stop_reason == "e answ"

    def test_the_one_complete_first_wins(self) -> None:
        ids = list(byte_level().encode("xabcd"))
        assert incremental(byte_level(), ids, stop=["abcd", "c"])[1].stop_reason == "c"
        assert incremental(byte_level(), ids, stop=["c", "bc"])[1].stop_reason == "bc"

    def test_nothing_comes_after_a_stop(self) -> None:
        pieces, _ = incremental(byte_level(), list(byte_level().encode("a.b.c")), stop=["."])
        assert "".join(pieces) == "a"

    def test_min_tokens_delays_stop_strings(self) -> None:
        ids = list(byte_level().encode("a.b.c"))
        assert "".join(incremental(byte_level(), ids, stop=["."], min_tokens=2)[0]) == "a.b"
        assert "".join(incremental(byte_level(), ids, stop=["."], min_tokens=1)[0]) == "a"
        assert "".join(incremental(byte_level(), ids, stop=["."], min_tokens=5)[0]) == "a.b.c"

    @needs_t5
    def test_a_newline_never_stops_t5_nor_changes_it(self, t5: Tokenizer) -> None:
        ids = list(t5.encode("one\ntwo\n\nthree"))
        pieces, text = incremental(t5, ids, stop=["\n"])
        assert "".join(pieces) == "one two three"
        assert text.stop_reason is None


class TestLoad:
    def test_from_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text(byte_level_spec(), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
        assert Tokenizer.load(tmp_path).eos_id == byte_level().eos_id

    def test_settings_left_in_the_file_do_not_cut_prompts(self, tmp_path: Path) -> None:
        library = library_of(t5_like_spec())
        library.enable_truncation(3)
        library.enable_padding(length=8)
        (tmp_path / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
        assert Tokenizer.load(tmp_path).encode("yes no yes no yes") == t5_like().encode("yes no yes no yes")

    def test_a_missing_or_damaged_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor spiece\.model"):
            Tokenizer.load(tmp_path)
        (tmp_path / "tokenizer.json").write_text('{"model": 3}')
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
            Tokenizer.load(tmp_path)

    @pytest.mark.slow
    @needs_t5
    def test_spiece_alone_is_converted(self, tmp_path: Path, t5: Tokenizer) -> None:
        (tmp_path / "spiece.model").write_bytes((T5_FOLDER / "spiece.model").read_bytes())
        (tmp_path / "tokenizer_config.json").write_bytes((T5_FOLDER / "tokenizer_config.json").read_bytes())
        converted = Tokenizer.load(tmp_path)
        assert (converted.size, converted.eos_id) == (t5.size, t5.eos_id)
        for text in ("Hello, world </s> {x} <extra_id_0>", "a\n\nb  c", "ﬁne ½ Ω"):
            assert converted.encode(text) == t5.encode(text)


_LIBRARIES: dict[str, object] = {}


def _library(spec: str):  # type: ignore[no-untyped-def]
    if spec not in _LIBRARIES:
        _LIBRARIES[spec] = library_of((T5_FOLDER / "tokenizer.json").read_text() if spec == "t5" else spec)
    return _LIBRARIES[spec]
