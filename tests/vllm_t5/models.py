"""Checkpoints that vLLM serves in these tests, and what transformers makes of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.engine.checkpoints import FLAN_T5_SMALL, Kind, make_t5_checkpoint, random_tensors, write_tensors

SPARE = 28  # rows of the vocabulary that no token has, as in T5
SMALL = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
EOS = 1


def flan_t5_small(folder: Path) -> Path:
    """The true shapes of flan-t5-small, random weights."""
    make_t5_checkpoint(folder, "t5_v1_1", vocab_size=32128, dims=FLAN_T5_SMALL, seed=3)
    return with_tokenizer(folder, 32128 - SPARE)


def small(folder: Path, kind: Kind, *, seed: int = 0, vocab_size: int = 1024) -> Path:
    """Two layers a stack. A tied head sees its own token best: there the decoder's layers speak louder than the
    embedding, or every token would repeat the one before."""
    make_t5_checkpoint(folder, kind, vocab_size=vocab_size, dims=SMALL, seed=seed)
    if kind == "t5":
        tensors = random_tensors(folder, seed=seed)
        tensors["shared.weight"] *= 0.2
        for name in tensors:
            if name.startswith("decoder."):
                tensors[name] *= {"q": 2.0, "wo": 4.0}.get(name.split(".")[-2], 1.0)
        write_tensors(folder, tensors)
    return with_tokenizer(folder, vocab_size - SPARE)


def with_tokenizer(folder: Path, size: int) -> Path:
    """A tokenizer of `size` words `w3` ... that puts </s> behind a text, as T5's does."""
    vocabulary = {"<pad>": 0, "</s>": EOS, "<unk>": 2, **{f"w{number}": number for number in range(3, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}), encoding="utf-8")
    return folder


def text_of(ids: Sequence[int]) -> str:
    """The text whose tokens are `ids`, without the last one, </s>."""
    assert ids[-1] == EOS
    return " ".join(f"w{number}" for number in ids[:-1])


def random_prompts(lengths: Sequence[int], *, size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of `lengths` tokens below `size`, each ending in </s>."""
    source = random.Random(seed)
    return [[source.randrange(3, size) for _ in range(length - 1)] + [EOS] for length in lengths]


@dataclass(frozen=True)
class Reference:
    """What transformers writes greedily after each prompt, and how sure it was.

    `margins` [prompts, tokens]: the distance between the two best logits of each step.
    """

    tokens: list[list[int]]
    margins: list[list[float]]


def reference(folder: Path, prompts: list[list[int]], tokens: int, dtype: torch.dtype = torch.float32) -> Reference:
    """`tokens` greedy tokens after each prompt; EOS is an ordinary token, the spare rows are never chosen."""
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    rows = model.config.vocab_size
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            eos_token_id=None,
            suppress_tokens=list(range(rows - SPARE, rows)),
            return_dict_in_generate=True,
            output_scores=True,
        )
    best = torch.stack([scores.topk(2).values for scores in output.scores], dim=1)
    return Reference(output.sequences[:, 1:].tolist(), (best[..., 0] - best[..., 1]).tolist())
