"""What runs inside vLLM's workers: the repetition penalty of SPEC, and no ids that the tokenizer does not have.

vLLM's own repetition penalty counts the prompt's tokens, too; SPEC's counts generated tokens only. So vLLM's stays
off and the value comes here in `SamplingParams.extra_args`. vLLM has two model runners with an interface each; both
of its processors run after logit bias and before temperature.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

PENALTY = "flan_repetition_penalty"  # key of SamplingParams.extra_args
VOCAB_LIMIT = "flan_vocab_limit"  # key of the engine's additional_config


def penalty_of(params: SamplingParams) -> float:
    return float((params.extra_args or {}).get(PENALTY, 1.0))


def vocab_limit_of(config: VllmConfig) -> int | None:
    limit: int | None = config.additional_config.get(VOCAB_LIMIT)
    return limit


class OutputPenalty(LogitsProcessor):  # type: ignore[misc]
    """For vLLM's first runner: one row a request; vLLM tells who came, left and moved."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._limit = vocab_limit_of(vllm_config)
        self._rows: dict[int, tuple[float, dict[int, float], list[int]]] = {}  # penalty, bias, live list of output ids

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, output_ids in batch_update.added:
            self._rows.pop(row, None)
            if (penalty := penalty_of(params)) != 1.0:
                self._rows[row] = (penalty, params.logit_bias or {}, output_ids)
        for source, target, direction in batch_update.moved:
            moving, staying = self._rows.pop(source, None), self._rows.pop(target, None)
            if moving is not None:
                self._rows[target] = moving
            if staying is not None and direction is MoveDirectionality.SWAP:
                self._rows[source] = staying

    def apply(self, logits: Tensor) -> Tensor:
        if self._limit is not None and self._limit < logits.shape[1]:
            logits[:, self._limit :] = -math.inf
        for row, (penalty, bias, output_ids) in self._rows.items():
            seen = sorted({token_id for token_id in output_ids if token_id >= 0})  # -1: not known yet
            if seen:
                ids = torch.tensor(seen, device=logits.device)
                added = torch.tensor([bias.get(token_id, 0.0) for token_id in seen], device=logits.device)
                logits[row, ids] = penalized(logits[row, ids] - added, penalty) + added
        return logits


class OutputPenaltyV2(LogitsProcessorV2):  # type: ignore[misc]
    """For vLLM's second runner: state by slot, token history on the device. Penalizes after the bias."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self._limit = vocab_limit_of(vllm_config)
        self._states = req_states
        self._penalties = [1.0] * req_states.max_num_reqs

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self._penalties[req_idx] = penalty_of(sampling_params)
        return self._penalties[req_idx] != 1.0 or (self._limit is not None and self._limit < self._states.vocab_size)

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        if self._limit is not None and self._limit < logits.shape[1]:
            logits[:, self._limit :] = -math.inf
        values = [self._penalties[slot] for slot in ctx.idx_mapping_np.tolist()]
        if all(value == 1.0 for value in values):
            return logits
        by_slot = torch.tensor(self._penalties, device=logits.device)
        slots = ctx.expanded_idx_mapping.long()
        history = self._states.all_token_ids.gpu[slots].long()  # [rows, max length]
        places = torch.arange(history.shape[1], device=logits.device)
        begins, ends = self._states.prompt_len.gpu[slots], self._states.total_len.gpu[slots]
        generated = (places >= begins[:, None]) & (places < ends[:, None])
        beyond = logits.shape[1]  # a column for what does not count
        seen = torch.zeros((len(slots), beyond + 1), dtype=torch.bool, device=logits.device)
        seen.scatter_(1, torch.where(generated, history, beyond), True)
        return torch.where(seen[:, :beyond], penalized(logits, by_slot[slots][:, None]), logits)


def penalized(values: Tensor, penalty: Any) -> Tensor:
    return torch.where(values > 0, values / penalty, values * penalty)
