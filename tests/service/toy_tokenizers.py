"""Small tokenizers built in memory: like T5's (Unigram with Metaspace), byte-level BPE, byte-fallback BPE."""

from __future__ import annotations

import functools
import json
import string

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from serve.tokenizer import Tokenizer

WORDS = (
    *("the", "answer", "is", "The", "Paris", "yes", "no", "so", "and", "cat", "dog", "step", "think", "positive"),
    *("negative", "hello", "world", "Q", "A", "one", "two", "three", "4", "5", "7", "12"),
)
T5_CHARACTERS = string.ascii_letters + string.digits + ".,:;!?'\"()$-_/&%+*=#@> é"  # like T5's: no < { } ~ ^ \ `


def t5_like_spec() -> str:
    """tokenizer.json of a small T5-like tokenizer: <pad> 0, </s> 1, <unk> 2, the pieces, three sentinels at the end."""
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(character, -6.0) for character in T5_CHARACTERS if character != " "]
    pieces += [(f"▁{word}", -3.0) for word in WORDS]
    pieces += [(word, -4.0) for word in WORDS if len(word) > 1]
    pieces += [(f"<extra_id_{n}>", 0.0) for n in (2, 1, 0)]
    library = Library(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    library.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    library.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in (2, 1, 0))]
    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    spec: str = library.to_str()
    return spec


@functools.cache
def t5_like() -> Tokenizer:
    return Tokenizer(t5_like_spec())


def byte_level_spec() -> str:
    """A byte-level BPE like GPT-2's: 256 bytes, a few merges, <|end|> as EOS (last id)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: n for n, character in enumerate(alphabet)}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "s"), ("Ġ", "is")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    library = Library(models.BPE(vocabulary, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    library.add_tokens([AddedToken("<a tool>", special=False, normalized=False)])
    spec: str = library.to_str()
    return spec


@functools.cache
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_spec(), eos="<|end|>")


def byte_fallback_spec() -> str:
    """A sentencepiece-style BPE with byte fallback, like Llama 2's: <unk> 0, <s> 1, </s> 2, bytes, characters."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for character in "▁abcdefgh.":
        vocabulary[character] = len(vocabulary)
    merges = [("▁", "a"), ("b", "c")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    library = Library(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    spec: str = library.to_str()
    return spec


@functools.cache
def byte_fallback() -> Tokenizer:
    return Tokenizer(byte_fallback_spec())


def library_of(spec: str) -> Library:
    """The plain library tokenizer of a spec: what ours is compared with."""
    library = Library.from_str(json.dumps(json.loads(spec)))
    library.no_truncation()
    return library
