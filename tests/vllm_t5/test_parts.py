"""The parts of the plugin that need no vLLM: bias, ragged attention, paged attention, names of weights, hooks."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.vllm_t5 import hooks, torch_attention
from serve.vllm_t5.bias import bucket_of, decoder_table, encoder_line, encoder_square
from serve.vllm_t5.encoder_order import by_row, in_row_order
from serve.vllm_t5.openai_answers import about_encoder
from serve.vllm_t5.plugin import SUPPORTED_VLLM, version_problem
from serve.vllm_t5.prompt_routing import to_encoder, with_true_ids
from serve.vllm_t5.ragged import RaggedAttention
from serve.vllm_t5.torch_attention import TorchPlan
from serve.vllm_t5.weights import Place, load, place_of


class TestBias:
    @pytest.mark.parametrize("bidirectional", [True, False])
    def test_buckets_are_transformers(self, bidirectional: bool) -> None:
        from transformers.models.t5.modeling_t5 import T5Attention

        relative = torch.arange(-600, 601)
        want = T5Attention._relative_position_bucket(relative, bidirectional, 32, 128)
        assert torch.equal(bucket_of(relative, bidirectional=bidirectional, buckets=32, max_distance=128), want)

    def test_the_table_is_exact_beyond_its_end(self) -> None:
        weight = torch.randn(32, 3)
        table = decoder_table(weight, max_distance=128)
        distance = torch.arange(2000)
        bucket = bucket_of(-distance, bidirectional=False, buckets=32, max_distance=128)
        assert torch.equal(table[:, distance.clamp(max=128)], weight[bucket].t())

    def test_a_square_out_of_a_line(self) -> None:
        weight = torch.randn(32, 2)
        position = torch.arange(150)
        bucket = bucket_of(position - position[:, None], bidirectional=True, buckets=32, max_distance=128)
        square = encoder_square(encoder_line(weight, 150, max_distance=128), 150)
        assert torch.equal(square.flip(-1), weight[bucket].permute(2, 0, 1))


def test_ragged_attention_is_each_text_alone() -> None:
    lengths, heads = (1, 200, 5, 7, 130, 64, 40), 3
    weight = torch.randn(32, heads)
    query, key, value = (torch.randn(sum(lengths), heads, 16) for _ in range(3))
    got = RaggedAttention(lengths, weight, max_distance=128)(query, key, value)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        position = torch.arange(length)
        bucket = bucket_of(position - position[:, None], bidirectional=True, buckets=32, max_distance=128)
        scores = torch.einsum("qhd,khd->hqk", query[part], key[part]) + weight[bucket].permute(2, 0, 1)
        want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[part])
        torch.testing.assert_close(got[part], want, atol=1e-5, rtol=1e-4)
        start += length


class Batch:
    """Five requests in a paged cache: two decode, one resumes with 6 tokens, one decodes, one has a prefix of 3."""

    def __init__(self, block_size: int = 16, heads: int = 3, width: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.starts = torch.tensor([0, 1, 2, 8, 9, 12])
        self.lengths = torch.tensor([150, 1, 40, 17, 3])
        self.request = torch.tensor([0, 1, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4])
        self.position = torch.tensor([149, 0, 34, 35, 36, 37, 38, 39, 16, 0, 1, 2])
        self.pages = torch.randperm(60, generator=generator)[:50].view(5, 10)
        slots = self.pages[self.request, self.position // block_size] * block_size + self.position % block_size
        self.slots = torch.cat([slots, torch.tensor([-1, -1])])  # two rows of padding
        self.cache = torch.randn(60, heads, block_size, 2 * width, generator=generator)
        self.query, self.key, self.value = (torch.randn(14, heads, width, generator=generator) for _ in range(3))
        self.table = decoder_table(torch.randn(32, heads, generator=generator) * 1.5, max_distance=128)

    def plainly(self) -> Tensor:
        """Row by row, from the definition."""
        width = self.query.shape[2]
        out = torch.zeros_like(self.query)
        cache = self.cache.clone()
        for row, slot in enumerate(self.slots.tolist()):
            if slot >= 0:
                cache[slot // 16, :, slot % 16] = torch.cat([self.key[row], self.value[row]], dim=-1)
        for row, (request, position) in enumerate(zip(self.request.tolist(), self.position.tolist(), strict=True)):
            places = [(self.pages[request, n // 16], n % 16) for n in range(position + 1)]
            both = torch.stack([cache[block, :, offset] for block, offset in places], dim=1)
            distance = position - torch.arange(position + 1)
            scores = torch.einsum("hd,hkd->hk", self.query[row], both[..., :width])
            scores = scores + self.table[:, distance.clamp(max=128)]
            out[row] = torch.einsum("hk,hkd->hd", F.softmax(scores, -1), both[..., width:])
        return out

    def by_torch(self, cache: Tensor) -> Tensor:
        out = torch.full_like(self.query, math.nan)
        torch_attention.write_keys_values(self.key, self.value, cache, self.slots)
        plan = TorchPlan.of(self.starts, self.lengths, self.pages, 16, self.table)
        torch_attention.attend(self.query, cache, plan, out)
        return out


def test_paged_attention_of_torch() -> None:
    batch = Batch()
    torch.testing.assert_close(batch.by_torch(batch.cache.clone()), batch.plainly(), atol=1e-5, rtol=1e-4)


KERNEL = """
import torch
from serve.vllm_t5 import paged_kernel
from tests.vllm_t5.test_parts import Batch
for physical in ((0, 1, 2, 3), (0, 2, 1, 3)):  # heads before slots in memory, and behind them
    batch = Batch()
    back = torch.tensor(physical).argsort().tolist()
    caches = [batch.cache.permute(physical).contiguous().permute(back) for _ in range(2)]
    want = batch.by_torch(caches[0])
    request, keys = torch.zeros(20, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
    request[:12], keys[:12] = batch.request, batch.position + 1
    out = torch.full_like(want, float("nan"))
    paged_kernel.write_keys_values(batch.key, batch.value, caches[1], batch.slots)
    paged_kernel.attend(batch.query, caches[1], batch.table, batch.pages.int(), request, keys, out)
    assert torch.equal(*caches)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
print("equal")
"""


def test_the_triton_kernel_equals_torch() -> None:
    """Through Triton's interpreter, in a process of its own because Triton reads the variable when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    run = subprocess.run(
        [sys.executable, "-c", KERNEL],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "equal", run.stderr[-2000:]


WITH_VLLM = """
import json, uvicorn, torch
from vllm import ModelRegistry
from vllm.config import model as model_config
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from serve.vllm_t5 import encoder_order, openai_answers, prompt_routing, register, request_outputs
for _ in "ab":
    register()
    for module in (encoder_order, openai_answers, prompt_routing, request_outputs):
        module.install()
from serve.vllm_t5.attention import RelativeBiasBackend, rows_of_tokens
rows, request, keys = (torch.arange(8, dtype=torch.int32) for _ in range(3))
starts = torch.tensor([0, 1, 4, 5, 5, 5], dtype=torch.int32)
lengths = torch.tensor([9, 7, 1, 0, 77], dtype=torch.int32)
rows_of_tokens(rows, starts, lengths, request=request, keys=keys)
try:
    model_config._check_valid_dtype("t5", torch.float16)
    refused = ""
except ValueError as error:
    refused = str(error)
print(json.dumps({
    "request": request[:5].tolist(),
    "keys": keys.tolist(),
    "architectures": sorted(a for a in ModelRegistry.get_supported_archs() if "T5For" in a),
    "backend": AttentionBackendEnum[RelativeBiasBackend.get_name()].get_class() is RelativeBiasBackend,
    "graphs": RelativeBiasBackend.get_builder_cls()._cudagraph_support.name,
    "float16": refused,
}))
"""


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")
def test_the_installed_vllm_is_what_the_plugin_expects() -> None:
    """Every method that is wrapped is what it was; and what a GPU would get, which no test here has."""
    run = subprocess.run([sys.executable, "-c", WITH_VLLM], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    seen = json.loads(run.stdout.strip().splitlines()[-1])
    # requests without rows are the padding of a CUDA graph, and so are the rows behind the last request
    assert seen["request"] == [0, 1, 1, 1, 2]
    assert seen["keys"] == [9, 5, 6, 7, 1, 0, 0, 0]
    assert seen["architectures"] == ["MT5ForConditionalGeneration", "T5ForConditionalGeneration"]
    assert seen["backend"]
    assert seen["graphs"] == "UNIFORM_SINGLE_TOKEN_DECODE"
    assert "bfloat16" in seen["float16"]


class TestWeights:
    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("shared.weight", Place("shared.weight")),
            ("encoder.embed_tokens.weight", Place("shared.weight")),
            ("lm_head.weight", Place("lm_head.weight")),
            ("encoder.final_layer_norm.weight", Place("encoder.norm.weight")),
            ("encoder.block.2.layer.0.SelfAttention.k.weight", Place("encoder.layers.2.attention.qkv.weight", "k")),
            (
                "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                Place("decoder.relative_bias.weight"),
            ),
            (
                "decoder.block.1.layer.1.EncDecAttention.v.weight",
                Place("decoder.layers.1.cross_attention.kv.weight", 1),
            ),
            ("decoder.block.1.layer.2.DenseReluDense.wi_0.weight", Place("decoder.layers.1.feed_forward.wi.weight", 0)),
            ("encoder.block.1.layer.1.layer_norm.weight", Place("encoder.layers.1.feed_forward.norm.weight")),
            ("encoder.block.1.layer.1.SelfAttention.q.weight", None),
            ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", None),
            ("encoder.block.1.layer.2.layer_norm.weight", None),
            ("decoder.block.1.layer.0.SelfAttention.q.bias", None),
        ],
    )
    def test_places(self, name: str, place: Place | None) -> None:
        assert place_of(name) == place

    @staticmethod
    def model() -> torch.nn.Module:
        model = torch.nn.Module()
        model.shared = torch.nn.Embedding(4, 2)
        model.lm_head = torch.nn.Linear(2, 4, bias=False)
        return model

    def test_the_checkpoint_decides_whether_the_head_is_tied(self) -> None:
        embedding, head = torch.randn(4, 2), torch.randn(4, 2)
        assert load(self.model(), [("shared.weight", embedding)], gated=True)
        assert load(self.model(), [("shared.weight", embedding), ("lm_head.weight", embedding.clone())], gated=True)
        assert not load(self.model(), [("lm_head.weight", head), ("shared.weight", embedding)], gated=True)

    def test_missing_and_unknown_tensors_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"missing \['shared.weight'\], unknown \['adapter.weight'\]"):
            load(self.model(), [("adapter.weight", torch.zeros(1))], gated=True)


class TestHooks:
    def test_another_vllm_is_told_apart_and_what_to_do(self) -> None:
        assert version_problem(SUPPORTED_VLLM) is None
        assert version_problem(f"{SUPPORTED_VLLM}+cpu") is None
        assert version_problem("0.33.0", "1") is None
        problem = version_problem("0.33.0")
        assert problem is not None
        assert f"vllm=={SUPPORTED_VLLM}" in problem
        assert "0.33.0" in problem

    def test_a_method_that_moved_is_named(self) -> None:
        gone = hooks.Hook("collections", "OrderedDict", "no_such", ("self",))
        with pytest.raises(hooks.VllmMovedError, match="no_such is gone"):
            hooks.wrap(gone, lambda inner: inner)
        other = hooks.Hook("argparse", "ArgumentParser", "exit", ("self", "status"))
        with pytest.raises(hooks.VllmMovedError, match="now takes"):
            hooks.wrap(other, lambda inner: inner)

    def test_wrapped_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import string

        monkeypatch.setattr(string.Formatter, "vformat", string.Formatter.vformat)
        hook = hooks.Hook("string", "Formatter", "vformat", ("self", "format_string", "args", "kwargs"))
        for _ in range(3):
            hooks.wrap(hook, lambda inner: lambda *args: inner(*args) + "!")
        assert string.Formatter().format("{}", 1) == "1!"


class TestOrder:
    def test_by_row(self) -> None:
        assert list(by_row({"resumed": [0], "new": [0]}, {"new": 0, "resumed": 1})) == ["new", "resumed"]

    def test_the_runner_sees_rows_in_order_and_the_scheduler_keeps_its_own(self) -> None:
        seen: list[list[str]] = []
        method = in_row_order(lambda self, output: seen.append(list(output.scheduled_encoder_inputs)))
        output = SimpleNamespace(scheduled_encoder_inputs={"c": [0], "a": [0], "b": [0]})
        rows = SimpleNamespace(req_id_to_index={"a": 0, "b": 1, "c": 2})
        for encoder_decoder in (True, False):
            config = SimpleNamespace(is_encoder_decoder=encoder_decoder)
            method(SimpleNamespace(model_config=config, input_batch=rows), output)
        assert seen == [["a", "b", "c"], ["c", "a", "b"]]
        assert list(output.scheduled_encoder_inputs) == ["c", "a", "b"]


class TestRouting:
    def test_a_plain_prompt_goes_to_the_encoder(self) -> None:
        routed = to_encoder({"encoder_prompt": {"prompt": "hi", "prompt_token_ids": [5, 1]}, "decoder_prompt": None}, 1)
        assert routed["encoder_prompt"]["multi_modal_data"] == {"text": [[5, 1]]}
        assert routed["decoder_prompt"] == {"prompt_token_ids": []}

    def test_a_decoder_text_loses_its_end_and_ids_do_not(self) -> None:
        encoder = {"prompt_token_ids": [5, 1]}
        text = {"prompt": "yes", "prompt_token_ids": [7, 1]}
        assert to_encoder({"encoder_prompt": encoder, "decoder_prompt": text}, 1)["decoder_prompt"][
            "prompt_token_ids"
        ] == [7]
        ids = {"prompt_token_ids": [7, 1]}
        assert to_encoder({"encoder_prompt": encoder, "decoder_prompt": ids}, 1)["decoder_prompt"] == ids

    def test_the_rendered_prompt_tells_the_true_ids(self) -> None:
        prompt = to_encoder({"encoder_prompt": {"prompt_token_ids": [5, 9, 1]}, "decoder_prompt": None}, 1)
        rendered: dict[str, Any] = {"encoder_prompt": {"prompt_token_ids": [0, 0, 0]}}
        assert with_true_ids(rendered, prompt)["encoder_prompt"]["prompt_token_ids"] == [5, 9, 1]

    def test_answers_are_about_the_encoders_prompt(self) -> None:
        output = SimpleNamespace(prompt_token_ids=[0], encoder_prompt_token_ids=[5, 9, 1])
        assert about_encoder(output).prompt_token_ids == [5, 9, 1]
        assert output.prompt_token_ids == [0]


def test_register_is_quiet_where_vllm_is_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from serve.vllm_t5 import register

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="9.9.9"))
    with caplog.at_level("WARNING", logger="vllm.flan_t5"):
        register()
    assert "T5 is not offered" in caplog.text


def test_no_event_loop_is_needed_to_refuse_echo() -> None:
    from serve.vllm_t5.openai_answers import NO_ECHO, _without_echo

    async def inner(self: Any, request: Any) -> str:
        return "served"

    refuse = _without_echo(inner)
    serving = SimpleNamespace(
        model_config=SimpleNamespace(architectures=["T5ForConditionalGeneration"]),
        create_error_response=lambda message, param: (message, param),
    )
    assert asyncio.run(refuse(serving, SimpleNamespace(echo=True))) == (NO_ECHO, "echo")
    assert asyncio.run(refuse(serving, SimpleNamespace(echo=False))) == "served"
    other = SimpleNamespace(model_config=SimpleNamespace(architectures=["LlamaForCausalLM"]))
    assert asyncio.run(refuse(other, SimpleNamespace(echo=True))) == "served"
