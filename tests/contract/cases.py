"""The runtimes under contract, each over a tiny random checkpoint, and transformers' own answers to compare with."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.output import FinishReason, TokenDelta
from serve.request import Mode, PreparedPrompt, PreparedRequest, PreparedScore
from serve.runtimes.base import Runtime, StepStats, TokenStream
from serve.sampling_params import SamplingParams
from tests.contract.causal_checkpoints import make_causal_checkpoint
from tests.engine.checkpoints import make_t5_checkpoint

T5_TOKENIZER = Path(__file__).parents[2] / "finetune" / "configs" / "tokenizer"
EOS = 1
VOCABULARY = {"t5": 8100, "causal": 384}
_NO_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
_VLLM_MARKS = (pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore"), _NO_VLLM)

CASES = (
    pytest.param("torch+t5"),
    pytest.param("transformers+causal"),
    pytest.param("vllm+causal", marks=_VLLM_MARKS),
    pytest.param("vllm+t5", marks=_VLLM_MARKS),
)


@dataclass
class Served:
    """A started runtime, the stats it has given, and the same weights in transformers."""

    name: str
    runtime: Runtime
    reference: Any
    stats: list[StepStats] = field(default_factory=list)

    @property
    def is_vllm(self) -> bool:
        return self.name.startswith("vllm")

    @property
    def is_causal(self) -> bool:
        return self.name.endswith("causal")

    @property
    def vocabulary(self) -> int:
        return VOCABULARY[self.name.partition("+")[2]]

    def prompts(self, *lengths: int, seed: int = 3) -> list[tuple[int, ...]]:
        """Random prompts of so many tokens; an encoder's end in EOS."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randint(3, self.vocabulary, (length,), generator=generator).tolist() for length in lengths]
        return [tuple(ids) if self.is_causal else (*ids[:-1], EOS) for ids in drawn]

    async def texts(self, *prompts: tuple[int, ...], **sampling: Any) -> list[tuple[int, ...]]:
        """The token ids of every sequence of one request, by index."""
        deltas = await collect(self.runtime.generate(request(*prompts, **sampling)))
        return [ids_of(deltas[index]) for index in sorted(deltas)]

    def logits(self, prompt: Sequence[int], made: Sequence[int]) -> torch.Tensor:
        """transformers' logits of the token after each prefix of `made`: [len(made) + 1, vocabulary]."""
        with torch.no_grad():
            if self.is_causal:
                logits: torch.Tensor = self.reference(torch.tensor([[*prompt, *made]])).logits[0, len(prompt) - 1 :]
            else:
                decoder = torch.tensor([[0, *made]])
                logits = self.reference(torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
        return logits[:, : self.vocabulary]

    def greedy(self, prompt: Sequence[int], tokens: int, penalty: float = 1.0) -> tuple[int, ...]:
        """What the reference says, token by token; the penalty is over generated tokens only."""
        made: list[int] = []
        for _ in range(tokens):
            logits = self.logits(prompt, made)[-1]
            if made and penalty != 1.0:
                seen = torch.tensor(sorted(set(made)))
                logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
            made.append(int(logits.argmax()))
        return tuple(made)


def request(*prompts: tuple[int, ...], name: str = "r", **sampling: Any) -> PreparedRequest:
    params = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **sampling})
    return PreparedRequest(name, Mode.RAW, tuple(PreparedPrompt(ids) for ids in prompts), params)


def scoring(prompt: tuple[int, ...], *candidates: tuple[int, ...]) -> PreparedScore:
    return PreparedScore("s", PreparedPrompt(prompt), tuple("x" for _ in candidates), candidates)


async def collect(stream: TokenStream) -> dict[int, list[TokenDelta]]:
    deltas: dict[int, list[TokenDelta]] = {}
    async for delta in stream:
        deltas.setdefault(delta.index, []).append(delta)
    return deltas


def ids_of(deltas: Sequence[TokenDelta]) -> tuple[int, ...]:
    assert deltas[-1].finish_reason is not FinishReason.ERROR, deltas[-1].error
    return tuple(token_id for delta in deltas for token_id in delta.token_ids)


@asynccontextmanager
async def started(name: str, folder: Path, **options: Any) -> AsyncIterator[Served]:
    """The case of that name, over a checkpoint written into `folder`."""
    runtime_name, _, model = name.partition("+")
    make_checkpoint(model, folder)
    stats: list[StepStats] = []
    runtime = make_runtime(runtime_name, folder, vocab_limit=VOCABULARY[model], on_step=stats.append, **options)
    await runtime.start()
    try:
        yield Served(name, runtime, load_reference(model, folder), stats)
    finally:
        await runtime.stop()


def make_checkpoint(model: str, folder: Path) -> None:
    """Heads of 32, because vLLM's attention on a CPU takes no smaller ones; T5 has rows beyond its tokenizer."""
    if model == "causal":
        make_causal_checkpoint(folder, hidden_size=128)
    else:
        make_t5_checkpoint(folder, vocab_size=8128, dims={"d_kv": 32})
        for path in T5_TOKENIZER.iterdir():
            shutil.copy(path, folder)


def make_runtime(name: str, folder: Path, **options: Any) -> Runtime:
    options = {"device": "cpu", "dtype": "float32", **options}
    if name == "torch":
        from serve.runtimes.torch_runtime import TorchRuntime

        return TorchRuntime(folder, **options)
    if name == "transformers":
        from serve.runtimes.transformers_runtime import TransformersRuntime

        return TransformersRuntime(folder, **options)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    from serve.runtimes.vllm_runtime import VllmRuntime

    arguments = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_model_len": 512}
    return VllmRuntime(folder, runtime_args=arguments, **options)


def load_reference(model: str, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForCausalLM if model == "causal" else AutoModelForSeq2SeqLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()
