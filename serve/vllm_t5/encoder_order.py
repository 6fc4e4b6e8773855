"""The order of encoder outputs in vLLM's older model runner, which can give requests each other's text.

That runner (the only one on a CPU) hands the model its encoder outputs in the order in which requests were scheduled,
while cross-attention's cache slots go by the rows of the batch. The two differ when one step admits new requests and
resumes a preempted one, and then answers are silently wrong: of 30 requests with 25 preemptions, 10. The newer runner
sorts by row; this does the same for the older one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from serve.vllm_t5.hooks import Hook, wrap

SCHEDULED = Hook(
    "vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_batch_mm_inputs_from_scheduler", ("self", "scheduler_output")
)


def install() -> None:
    """Wrap the runner, once a process; called when a T5 is built, so in the processes that run one."""
    wrap(SCHEDULED, in_row_order)


def in_row_order(inner: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The runner's method with the scheduled encoder inputs of an encoder-decoder model sorted by batch row."""

    def batch_inputs(self: Any, scheduler_output: Any) -> Any:
        if self.model_config.is_encoder_decoder and len(scheduler_output.scheduled_encoder_inputs) > 1:
            scheduler_output = copy.copy(scheduler_output)
            scheduler_output.scheduled_encoder_inputs = by_row(
                scheduler_output.scheduled_encoder_inputs, self.input_batch.req_id_to_index
            )
        return inner(self, scheduler_output)

    return batch_inputs


def by_row(inputs: Mapping[str, Any], rows: Mapping[str, int]) -> dict[str, Any]:
    """`inputs` by request id, in the order of the requests' rows."""
    return dict(sorted(inputs.items(), key=lambda item: rows[item[0]]))
