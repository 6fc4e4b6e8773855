"""Carries out the scheduler's decisions on CUDA: pages instead of rows, Triton attention, decode steps as graphs.

What stays float32 in a bfloat16 or float16 model: the statistics of the norms, scores, softmax and sums of
attention, the sums inside matrix products (but where cuBLAS splits one, whose parts torch lets it add up in half
precision), the logits once they are made, and all sampling; and in float16, which T5's feed-forward overflows, the
`wo` layers whole (layers.Float32Linear).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from serve.engine.config import EngineSettings
from serve.engine.gpu.decode_step import DecodeSteps
from serve.engine.gpu.paged_cache import PagedCache
from serve.engine.gpu.ragged_kernel import RaggedKernel, bias_table
from serve.engine.model import T5Model
from serve.engine.runner import rows_in_use
from serve.engine.sampler import Sampled, sample, wants_best_only
from serve.engine.scheduler import ScoreChunk, StepPlan
from serve.engine.scoring import score_candidates
from serve.engine.sequence import Prompt
from serve.engine.transfer import to_device


class PagedRunner:
    """Implements runner.Runner over a paged cache that is taken at once."""

    def __init__(self, model: T5Model, settings: EngineSettings, *, processors: int | None = None) -> None:
        config = model.config
        self._model = model
        self.cache = PagedCache(
            config.num_decoder_layers,
            config.num_heads,
            config.d_kv,
            cache_bytes=settings.cache_bytes,
            device=model.device,
            dtype=model.dtype,
        )
        max_distance = config.relative_attention_max_distance
        self._encoder_table = bias_table(model.encoder_bias, max_distance, model.device)
        self._decoder_table = bias_table(model.decoder_bias, max_distance, model.device)
        self._steps = DecodeSteps(
            model,
            self.cache,
            max_rows=settings.max_running_sequences,
            max_distance=max_distance,
            processors=processors,
        )
        self._compile_ragged()

    @torch.inference_mode()
    def _compile_ragged(self) -> None:
        """Run the kernels of encoding and scoring once on a token, so that no request waits for their compilation."""
        model, config = self._model, self._model.config
        token = to_device([config.eos_token_id], model.device)
        states = model.encode(token, [1], self._attend([1], causal=False))
        cross = [part[0].unsqueeze(2) for part in model.cross_keys_values(states)]
        model.decode_forced(token, [1], cross, self._attend([1], causal=True))

    def _attend(self, lengths: list[int], *, causal: bool) -> RaggedKernel:
        table = self._decoder_table if causal else self._encoder_table
        return RaggedKernel(lengths, table, causal=causal, dtype=self._model.dtype)

    def prepare(self, plan: StepPlan) -> None:
        self.cache.apply(plan.operations)
        self.cache.settle(rows_in_use(plan.decode), rows_in_use(plan.prompts))

    def encode(self, prompts: SequenceOf[Prompt]) -> None:
        model = self._model
        lengths = [len(prompt.token_ids) for prompt in prompts]
        token_ids = to_device([token_id for prompt in prompts for token_id in prompt.token_ids], model.device)
        states = model.encode(token_ids, lengths, self._attend(lengths, causal=False))
        pages, offsets = self.cache.positions(prompts)
        for layer, keys_values in enumerate(model.cross_keys_values(states)):
            self.cache.arena[layer][pages, :, :, offsets] = keys_values

    def score(self, chunk: ScoreChunk) -> list[float]:
        prompt = chunk.job.prompt
        if prompt is None:
            raise ValueError("a job that is scored holds its prompt")
        lengths = [len(candidate) for candidate in chunk.candidates]
        attend = self._attend(lengths, causal=True)
        return score_candidates(self._model, chunk.candidates, self.cache.prompt(prompt), attend)

    def decode(self, plan: StepPlan) -> Tensor:
        return self._steps.decode(plan.decode)

    def sample(self, logits: Tensor, plan: StepPlan) -> Sampled:
        if not all(wants_best_only(sequence) for sequence in plan.decode):
            return sample(logits, plan.decode, eos_token_id=self._model.config.eos_token_id)
        token_ids, flags = self._steps.choose(logits).tolist()
        return Sampled(token_ids, [bool(flag) for flag in flags])
