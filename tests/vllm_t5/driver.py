"""vLLM in a process of its own: `python -m tests.vllm_t5.driver IN OUT '{"model": ...}'`.

IN and OUT are file descriptors of pipes. A job is one JSON line; so is its answer. The process keeps vLLM's settings of
torch, signals and warnings away from the tests, and one start serves many of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine is in this process, within reach

from vllm import LLM, SamplingParams
from vllm.compilation.counter import compilation_counter
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from serve.vllm_t5.attention import TABLE

Job = dict[str, Any]


def generate(llm: LLM, job: Job) -> Job:
    """`prompts` at once through LLM.generate, in the form `as`: ids, text or explicit."""
    params = [SamplingParams(**{"temperature": 0, "ignore_eos": True, **job["params"]}) for _ in job["prompts"]]
    prompts = [job["texts"][n] if "texts" in job else {"prompt_token_ids": p} for n, p in enumerate(job["prompts"])]
    if "decoder" in job:
        prompts = [{"encoder_prompt": prompt, "decoder_prompt": job["decoder"]} for prompt in prompts]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return {
        "tokens": [[list(choice.token_ids) for choice in output.outputs] for output in outputs],
        "logprobs": [
            [{str(token): entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs or []]
            for output in outputs
        ],
        "prompt_logprobs": [
            [None if step is None else {str(t): e.logprob for t, e in step.items()} for step in output.prompt_logprobs]
            if output.prompt_logprobs
            else None
            for output in outputs
        ],
        "encoder_ids": [output.encoder_prompt_token_ids for output in outputs],
        "decoder_ids": [output.prompt_token_ids for output in outputs],
    }


def crowd(llm: LLM, job: Job) -> Job:
    """`requests` [(prompt, tokens)] arriving one by one at random steps; at most `slots` run at once."""
    engine, source = llm.llm_engine, random.Random(job["seed"])
    scheduler = engine.engine_core.engine_core.scheduler
    waiting = list(enumerate(job["requests"]))
    written: dict[int, list[int]] = {}
    together = 0
    with changed(scheduler, "max_num_active_reqs", job["slots"]), ordered(job["ordered"]), ablated(llm, job["ablate"]):
        before = preemptions(llm)
        while waiting or engine.has_unfinished_requests():
            while waiting and (source.random() < job["arrival"] or not engine.has_unfinished_requests()):
                number, (prompt, tokens) = waiting.pop(0)
                params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens)
                [rendered] = llm.renderer.render_cmpl([parse_model_prompt(llm.model_config, prompt)])
                engine.add_request(str(number), rendered, params)
            for output in engine.step():
                if output.finished:
                    written[int(output.request_id)] = list(output.outputs[0].token_ids)
            together = max(together, len(scheduler.running))
        after = preemptions(llm)
    tokens = [written[number] for number in range(len(job["requests"]))]
    compiled = compilation_counter.num_aot_compiles + compilation_counter.num_aot_artifacts_loaded  # torch.compile's
    return {"tokens": tokens, "preemptions": after - before, "together": together, "compiled": compiled}


def preemptions(llm: LLM) -> int:
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


@contextlib.contextmanager
def changed(owner: object, name: str, value: object) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, kept if value is None else value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


@contextlib.contextmanager
def ordered(on: bool) -> Iterator[None]:
    """With False: vLLM's runner as it is, without the plugin's order of encoder outputs."""
    name = "_batch_mm_inputs_from_scheduler"
    fixed = getattr(GPUModelRunner, name)
    with changed(GPUModelRunner, name, fixed if on else fixed.__wrapped__):
        yield


@contextlib.contextmanager
def ablated(llm: LLM, beyond: int | None) -> Iterator[None]:
    """The decoder's bias zeroed for distances from `beyond` on."""
    tables: list[Any] = []

    def zero(model: Any) -> None:
        for layer in model.decoder.layers:
            table = getattr(layer.attention.attn, TABLE)
            tables.append(table)
            blank = table.clone()
            blank[:, beyond:] = 0
            setattr(layer.attention.attn, TABLE, blank)

    def restore(model: Any) -> None:
        for layer, table in zip(model.decoder.layers, tables, strict=True):
            setattr(layer.attention.attn, TABLE, table)

    if beyond is not None:
        llm.apply_model(zero)
    try:
        yield
    finally:
        if beyond is not None:
            llm.apply_model(restore)


JOBS: dict[str, Callable[[LLM, Job], Job]] = {"generate": generate, "crowd": crowd}


def main() -> None:
    jobs = os.fdopen(int(sys.argv[1]), "r")
    answers = os.fdopen(int(sys.argv[2]), "w")
    llm = LLM(**json.loads(sys.argv[3]))
    for line in jobs:
        job = json.loads(line)
        try:
            answer = JOBS[job.pop("job")](llm, job)
        except Exception as error:
            traceback.print_exc()  # into the log
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
