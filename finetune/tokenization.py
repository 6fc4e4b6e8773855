"""Text to ids: a checkpoint's tokenizer, the token stream of a phase, and the demo tokenizer's training.

The demo tokenizer behaves like T5's: newlines and runs of spaces fold into one space, every word begins with "▁", EOS
is appended, `{ } < > ~ ^ \\` and the backtick are unknown. It is smaller (8,000 pieces), and a digit is always a piece
of its own, so that 17 and 71 share their pieces. Ids as in T5: pad 0, EOS 1, unknown 2, the pieces, and on top the
sentinels, <extra_id_0> the highest.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from finetune.collate import PAD_ID
from finetune.config import PhaseConfig
from finetune.denoising import corrupt
from finetune.example import TextExample, TokenExample
from finetune.packing import Overlong, fit_lengths

NUM_SENTINELS = 100
DEMO_TOKENIZER = Path(__file__).parent / "configs" / "tokenizer"  # made by `flan-finetune tokenizer`
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
UNKNOWN_ID = 2
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PUNCTUATION = "!\"#$%&'()*+,-./:;=?@[]_|"  # printable ASCII that T5's vocabulary has
_OTHER = "£€°àâäçèéêëíîïñóôöùúûüßÀÉÖÜ–—‘’“”„…•"
ALPHABET = _LETTERS + _LETTERS.upper() + "0123456789" + _PUNCTUATION + _OTHER
_METASPACE = "▁"
# Pieces that must exist: a letter that stands alone (spelling), and the visible words of our prompts.
_WORDS = (*(_LETTERS + _LETTERS.upper()), "Q:", "A:", "OPTIONS:", "-", "+", "=")


class TextSource(Protocol):
    """What a phase reads: `finetune.pipeline.TextStream`, or a list in disguise in a test."""

    def __next__(self) -> TextExample: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def manifest(self) -> list[dict[str, Any]]: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a folder, without truncation and padding.

    Raises:
        FileNotFoundError: naming what is missing.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; a sentencepiece model alone (spiece.model) is turned into one by "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a literal "</s>" in a text is text
    return tokenizer


def sentinel_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of <extra_id_0>, <extra_id_1> ... in this order."""
    ids = (tokenizer.token_to_id(f"<extra_id_{index}>") for index in range(NUM_SENTINELS))
    return [found for found in ids if found is not None]


class TokenStream:
    """The endless token examples of a phase. Its state is its source's and the number of examples drawn.

    denoise: the example's input and target as one text, span-corrupted; draw n has its own generator (seed, n).
    """

    def __init__(
        self, source: TextSource, tokenizer: Tokenizer, phase: PhaseConfig, *, overlong: Overlong, seed: int
    ) -> None:
        self.source, self.tokenizer, self.phase, self.overlong, self.seed = source, tokenizer, phase, overlong, seed
        self.eos_id = _eos_id(tokenizer)
        self._sentinels = sentinel_ids(tokenizer)
        self._num_draws = 0
        self.counts: Counter[str] = Counter()  # examples, trimmed_targets, trimmed_inputs, dropped

    def __iter__(self) -> Iterator[TokenExample]:
        return self

    def __next__(self) -> TokenExample:
        while True:
            example = self._make(next(self.source))
            self._num_draws += 1
            if example is not None:
                self.counts["examples"] += 1
                self.counts["trimmed_targets"] += example.trimmed
                return example
            self.counts["dropped"] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source.state_dict(), "num_draws": self._num_draws, "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        self._num_draws = state["num_draws"]
        self.counts = Counter(state["counts"])

    def _make(self, text: TextExample) -> TokenExample | None:
        if self.phase.objective == "denoise":
            return self._denoise(text)
        inputs, targets = self._ids(text.inputs), self._ids(text.targets)
        lengths = (self.phase.input_length, self.phase.target_length)
        fitted = fit_lengths(inputs, targets, self.eos_id, lengths=lengths, overlong=self.overlong)
        self.counts["trimmed_inputs"] += len(inputs) >= lengths[0]
        return None if fitted is None else TokenExample(fitted[0], fitted[1], text.task, fitted[2])

    def _denoise(self, text: TextExample) -> TokenExample | None:
        """None for a text too short to hide anything in. A long text is cut, so that both sides fit the row."""
        phase = self.phase
        ids = self._ids(f"{text.inputs}\n{text.targets}")[: phase.input_length - 2]
        if len(ids) < 4:
            return None
        rng = random.Random(f"{self.seed}/denoise/{self._num_draws}")
        corrupted = corrupt(
            ids,
            sentinel_ids=self._sentinels,
            eos_id=self.eos_id,
            rng=rng,
            noise_density=phase.noise_density,
            mean_span=phase.mean_span,
        )
        lengths = (phase.input_length, phase.target_length)
        bare = [side[:-1] for side in corrupted]  # EOS is put back after trimming
        fitted = fit_lengths(bare[0], bare[1], self.eos_id, lengths=lengths, overlong=self.overlong)
        return None if fitted is None else TokenExample(fitted[0], fitted[1], text.task, fitted[2])

    def _ids(self, text: str) -> list[int]:
        """Ids of a text. A literal "</s>" in it matches the model's own entry of that name; it becomes unknown."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [UNKNOWN_ID if token in (PAD_ID, self.eos_id) else token for token in ids]


def _eos_id(tokenizer: Tokenizer) -> int:
    found = tokenizer.token_to_id(EOS)
    if found is None:
        raise ValueError(f"the tokenizer has no {EOS}; is it one of a T5?")
    return int(found)


def train_tokenizer(texts: Iterable[str], num_pieces: int = 8000) -> Tokenizer:
    """A T5-style unigram tokenizer of `num_pieces` pieces plus the sentinels, from `texts`.

    Characters outside ALPHABET are left out of the training texts: each would otherwise cost a piece. The trainer adds
    up in parallel, so two runs agree in their pieces but for a few of the rarest, and in scores but for rounding.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = _normalizer()
    space = pre_tokenizers.Metaspace(replacement=_METASPACE, prepend_scheme="always", split=True)
    # Only while training: what was never one word in training never becomes a piece, so 17 and "end." stay apart.
    apart = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation(behavior="isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([space, *apart])
    trainer = trainers.UnigramTrainer(
        vocab_size=num_pieces,
        special_tokens=[PAD, EOS, UNKNOWN],
        unk_token=UNKNOWN,
        initial_alphabet=[*ALPHABET, _METASPACE],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(texts), trainer)
    return _finish(tokenizer, num_pieces)


def _training_texts(texts: Iterable[str]) -> Iterator[str]:
    """The texts without foreign characters, then every word that came often, once more with "x" and "z" behind it.

    Why the second helping: the trainer takes its candidates from the suffix tree of the *distinct* words, and there
    only what is followed by different characters is a candidate. A word that has no longer relatives ("What") would
    never become a piece.
    """
    keep = frozenset(ALPHABET + " \n\t")
    words: Counter[str] = Counter()
    for text in texts:
        clean = "".join(c if c in keep else " " for c in text)
        words.update(re.findall(r"[^\W\d_]+", clean))
        yield clean
    often = [word for word, count in words.items() if count >= 5]
    for ending in "xz":
        yield " ".join(word + ending for word in often)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json and a tokenizer_config.json that AutoTokenizer reads without a network."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        # The generic class: T5's own class in transformers 5 rebuilds normalizer and pre-tokenizer by its own idea.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [f"<extra_id_{index}>" for index in range(NUM_SENTINELS)],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _normalizer() -> normalizers.Normalizer:
    """SentencePiece's nmt_nfkc as far as these texts go: control characters and white space, then NFKC, one space."""
    return normalizers.Sequence(
        [
            normalizers.Nmt(),
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(left=True, right=True),
        ]
    )


def _finish(tokenizer: Tokenizer, num_pieces: int) -> Tokenizer:
    """The trained pieces as a tokenizer like T5's: sentinels on top, EOS appended."""
    scores: dict[str, float] = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    for name in (PAD, EOS, UNKNOWN):
        scores.pop(name, None)
    lowest = min(scores.values())
    for character in (*ALPHABET, _METASPACE):  # none may be lost, however rare
        scores.setdefault(character, lowest - 1.0)
    for word in _WORDS:  # likelier than the pieces it would fall into
        scores.setdefault(_METASPACE + word, max(scores[character] for character in word) - 0.5)
    needed = {*ALPHABET, _METASPACE, *(_METASPACE + word for word in _WORDS)}
    ranked = sorted(scores, key=lambda piece: (-scores[piece], piece))
    chosen = {*[piece for piece in ranked if piece not in needed][: num_pieces - 3 - len(needed)], *needed}
    pieces = [(piece, scores[piece]) for piece in ranked if piece in chosen]
    vocabulary = [(PAD, 0.0), (EOS, 0.0), (UNKNOWN, 0.0), *pieces]
    finished = Tokenizer(models.Unigram(vocabulary, unk_id=UNKNOWN_ID, byte_fallback=False))
    finished.normalizer = _normalizer()
    finished.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_METASPACE, prepend_scheme="always", split=True)
    finished.decoder = decoders.Metaspace(replacement=_METASPACE, prepend_scheme="always", split=True)
    finished.add_special_tokens([PAD, EOS, UNKNOWN])
    finished.add_special_tokens([f"<extra_id_{index}>" for index in reversed(range(NUM_SENTINELS))])
    finished.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, 1)]
    )
    return finished
