"""T5 on vLLM, through our plugin, as a system under test; the engine runs in this process and is stepped by us."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from loadtests.bench.prompts import Request
from loadtests.bench.system import OnToken, Place, Tokens, Tuning

NAME = "vllm"
_CACHE_BYTES = 2 << 30
_STEP_TOKENS = 2048
Take = Callable[[int, int, list[int]], None]


class VllmSystem:
    """See loadtests.bench.system.System."""

    name = NAME

    def __init__(self, place: Place, setting: str) -> None:
        if place.folder is None:
            raise ValueError("a peer needs a checkpoint folder")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vLLM is imported
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # as many threads as the others have
        from vllm import LLM

        self.setting = setting
        self._threads = place.threads
        llm: Any = LLM(
            model=place.folder,
            dtype=setting,
            skip_tokenizer_init=False,
            max_model_len=640,
            max_num_seqs=place.max_running,
            max_num_batched_tokens=_STEP_TOKENS,
            kv_cache_memory_bytes=_CACHE_BYTES,
            disable_log_stats=True,
        )
        self._llm = llm
        self._engine = llm.llm_engine
        self._keys = itertools.count()
        self.vocab_size: int = llm.model_config.get_vocab_size()

    def candidates(self, count: int) -> list[Tuning]:
        del count
        return [Tuning(threads=self._threads)]

    def use(self, tuning: Tuning) -> None:
        """There is nothing to choose: vLLM batches by itself."""

    def generate(self, requests: Sequence[Request], *, at_once: int = 0, on_token: OnToken | None = None) -> Tokens:
        tokens: Tokens = [[] for _ in requests]

        def take(place: int, index: int, ids: list[int]) -> None:
            del index
            tokens[place] += ids
            if on_token is not None:
                for _ in ids:
                    on_token(place)

        waiting = deque(enumerate(requests))
        places: dict[str, int] = {}
        while waiting or places:
            while waiting and (at_once == 0 or len(places) < at_once):
                place, request = waiting.popleft()
                places[self._submit(request)] = place
            self._step(places, take)
        return tokens

    def sample(self, request: Request, count: int, seed: int) -> Tokens:
        tokens: Tokens = [[] for _ in range(count)]
        places = {self._submit(request, n=count, temperature=1.0, seed=seed): 0}
        while places:
            self._step(places, lambda _place, index, ids: tokens[index].extend(ids))
        return tokens

    def score(self, ids: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[float]:
        """A decoder prompt for each candidate, whose tokens' log-probabilities vLLM tells."""
        from vllm import SamplingParams

        asked = [
            {"encoder_prompt": {"prompt_token_ids": list(ids)}, "decoder_prompt": {"prompt_token_ids": list(candidate)}}
            for candidate in candidates
        ]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        told = self._llm.generate(asked, params, use_tqdm=False)
        return [
            sum(step[token].logprob for step, token in zip(output.prompt_logprobs[1:], candidate, strict=True))
            for output, candidate in zip(told, candidates, strict=True)
        ]

    def serve(self, requests: Sequence[Request], due: Sequence[float]) -> list[list[float]]:
        told: list[list[float]] = [[] for _ in requests]
        places: dict[str, int] = {}
        began = time.perf_counter()
        first = 0
        while first < len(requests) or places:
            now = time.perf_counter() - began
            while first < len(requests) and due[first] <= now:
                places[self._submit(requests[first])] = first
                first += 1
            if not places:
                time.sleep(max(0.0, due[first] - now))
                continue
            self._step(places, lambda place, _index, ids: told[place].extend([time.perf_counter() - began] * len(ids)))
        return told

    def _submit(self, request: Request, **fields: Any) -> str:
        from vllm import SamplingParams
        from vllm.renderers.inputs.preprocess import parse_model_prompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            **{"temperature": 0.0, **fields},
            max_tokens=request.length,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = parse_model_prompt(self._llm.model_config, {"prompt_token_ids": list(request.ids)})
        [rendered] = self._llm.renderer.render_cmpl([prompt])
        key = str(next(self._keys))
        self._engine.add_request(key, rendered, params)
        return key

    def _step(self, places: dict[str, int], take: Take) -> None:
        """One step; what ended leaves `places`."""
        for output in self._engine.step():
            for made in output.outputs:
                take(places[output.request_id], made.index, list(made.token_ids))
            if output.finished:
                del places[output.request_id]
