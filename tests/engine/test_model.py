"""Our logits, ids and scores are transformers', for every kind of T5; and the tests would notice a lost bias."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serve.checkpoint import DEMO_FOLDER
from serve.engine.layers import RelativeBias
from serve.engine.loading import load_model
from serve.engine.model import T5Model
from serve.engine.native.library import Level
from serve.engine.runner import ModelRunner
from serve.engine.sampler import BestTokens, Sampled
from serve.engine.scheduler import StepPlan
from serve.engine.weights import load_checkpoint
from serve.sampling_params import SamplingParams
from tests.engine.checkpoints import FLAN_T5_SMALL, Kind, make_t5_checkpoint
from tests.engine.driving import drain, engine_of, same_up_to_near_tie

STEPS = 40
TOLERANCE = 1e-4
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("kernels")

SHAPES: dict[str, tuple[Kind, dict[str, Any]]] = {
    "t5": ("t5", {"dims": {"num_layers": 3}}),
    "t5_v1_1": ("t5_v1_1", {}),
    "mt5": ("mt5", {"vocab_size": 512, "dims": {"d_model": 96, "num_heads": 3}}),
    "ul2_like": ("t5_v1_1", {"feed_forward_proj": "gated-silu"}),
    "flan_t5_small": ("t5_v1_1", {"dims": FLAN_T5_SMALL, "vocab_size": 32128}),
}


def reference(folder: Path) -> Any:
    """transformers' model of the folder."""
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_prompts(lengths: tuple[int, ...], vocabulary: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [(*torch.randint(2, vocabulary, (length - 1,), generator=generator).tolist(), 1) for length in lengths]


class Recording(ModelRunner):
    """Keeps the raw logits of every step by request."""

    def __init__(self, model: T5Model) -> None:
        super().__init__(model, cache_bytes=1 << 30)
        self.logits: dict[str, list[Tensor]] = {}

    def sample(self, logits: Tensor | BestTokens, plan: StepPlan) -> Sampled:
        assert isinstance(logits, Tensor), "a small vocabulary has no shortlist"
        for sequence, row in zip(plan.decode, logits, strict=True):
            self.logits.setdefault(sequence.request_id, []).append(row.clone())
        return super().sample(logits, plan)


def greedy(model: T5Model, prompts: list[tuple[int, ...]], steps: int) -> tuple[list[list[int]], list[Tensor]]:
    """Ids and raw logits [steps, vocabulary] of each prompt, all decoded together.

    They ask for log-probabilities, because the logits of a request that does not are good for an argmax only.
    """
    runner = Recording(model)
    engine = engine_of(model, runner)
    for number, prompt in enumerate(prompts):
        engine.add(str(number), [prompt], SamplingParams(max_tokens=steps, ignore_eos=True, logprobs=0))
    results = drain(engine)
    ids = [results.sequences[str(number), 0].token_ids for number in range(len(prompts))]
    return ids, [torch.stack(runner.logits[str(number)]) for number in range(len(prompts))]


@pytest.fixture(scope="module", params=SHAPES)
def folder_and_reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    kind, options = SHAPES[request.param]
    folder = make_t5_checkpoint(tmp_path_factory.mktemp(request.param), kind, **options)
    return folder, reference(folder)


@pytest.fixture
def pair(folder_and_reference: tuple[Path, Any], kernels: Level) -> tuple[T5Model, Any]:
    """Our model, with the kernels and without, and transformers' of the same folder."""
    folder, theirs = folder_and_reference
    return _loaded(folder, kernels), theirs


@cache
def _loaded(folder: Path, kernels: Level) -> T5Model:
    model = load_model(folder, device=CPU, dtype=torch.float32)
    assert (model.native_decoder is None) is (kernels is Level.NONE)
    return model


def test_the_head_is_tied_and_scaled_only_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    for kind, tied in (("t5", True), ("t5_v1_1", False), ("mt5", False)):
        folder = make_t5_checkpoint(tmp_path / kind, kind)  # type: ignore[arg-type]
        checkpoint = load_checkpoint(folder)
        assert checkpoint.tied is tied
        model, theirs = load_model(folder, device=CPU, dtype=torch.float32), reference(folder)
        assert torch.equal(theirs.shared.weight, theirs.lm_head.weight) is tied
        assert getattr(theirs.config, "scale_decoder_outputs", tied) is tied  # MT5Config has none
        states = torch.randn(3, model.config.d_model)
        scale = model.config.d_model**-0.5 if tied else 1.0
        expected = (states * scale) @ theirs.lm_head.weight.detach().t()
        assert torch.allclose(model.logits(states), expected, atol=1e-5)


def test_encoder_states_of_a_ragged_batch(pair: tuple[T5Model, Any]) -> None:
    model, theirs = pair
    prompts = random_prompts((1, 7, 60, 128, 129, 300, 300), model.config.vocab_size)
    lengths = [len(prompt) for prompt in prompts]
    with torch.inference_mode():
        states = model.encode(torch.tensor([token for prompt in prompts for token in prompt]), lengths)
        for prompt, ours in zip(prompts, torch.split(states, lengths), strict=True):
            expected = theirs.encoder(input_ids=torch.tensor([prompt])).last_hidden_state[0]
            assert (ours - expected).abs().max() < TOLERANCE


def test_logits_and_greedy_ids_of_cached_steps(pair: tuple[T5Model, Any]) -> None:
    model, theirs = pair
    prompts = random_prompts((8, 200, 33), model.config.vocab_size)
    ids, logits = greedy(model, prompts, STEPS)
    if model.config.gated:  # a tied random head only repeats its input
        assert min(len(set(tokens)) for tokens in ids) >= 10
    for prompt, ours, rows in zip(prompts, ids, logits, strict=True):
        with torch.inference_mode():
            decoder_input = torch.tensor([[0, *ours[:-1]]])
            full = theirs(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_input).logits[0]
            made = theirs.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False, eos_token_id=[]
            )[0, 1:].tolist()
        assert rows.shape == full.shape == (STEPS, model.config.vocab_size)
        assert (rows - full).abs().amax(-1).max() < TOLERANCE
        best = rows.topk(2).values
        margins = dict(enumerate((best[:, 0] - best[:, 1]).tolist()))
        assert same_up_to_near_tie(ours, made, margins) == (True, False)


def test_scores_are_a_teacher_forced_forward(pair: tuple[T5Model, Any]) -> None:
    model, theirs = pair
    (prompt,) = random_prompts((50,), model.config.vocab_size)
    candidates = [(5, 1), (9, 8, 7, 1), tuple(range(10, 160)), (1,)]
    engine = engine_of(model, encode_tokens_per_step=60)
    engine.add_score("all", prompt, candidates)
    engine.add_score("reversed", prompt, candidates[::-1])
    engine.add_score("one", prompt, candidates[1:2])
    results = drain(engine)
    for number, candidate in enumerate(candidates):
        with torch.inference_mode():
            decoder_input = torch.tensor([[0, *candidate[:-1]]])
            full = theirs(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_input).logits[0]
            expected = full.log_softmax(-1)[torch.arange(len(candidate)), torch.tensor(candidate)].sum().item()
        logprob, num_tokens = results.scores["all"].scores[number]
        assert num_tokens == len(candidate)
        assert logprob == pytest.approx(expected, abs=2e-3, rel=1e-5)
        assert results.scores["reversed"].scores[-1 - number][0] == pytest.approx(logprob, abs=1e-3)
    assert results.scores["one"].scores[0][0] == pytest.approx(results.scores["all"].scores[1][0], abs=1e-3)


def test_the_score_of_a_greedy_output_is_the_sum_of_its_logprobs(model: T5Model) -> None:
    (prompt,) = random_prompts((30,), 380)
    engine = engine_of(model)
    engine.add("generated", [prompt], SamplingParams(max_tokens=30, logprobs=0))
    result = drain(engine).sequences["generated", 0]
    engine.add_score("scored", prompt, [tuple(result.token_ids)])
    ((logprob, num_tokens),) = drain(engine).scores["scored"].scores
    assert num_tokens == len(result.token_ids)
    assert logprob == pytest.approx(sum(entry.logprob for entry in result.logprobs), abs=1e-2)


@pytest.mark.parametrize("first_distance", [0, 96])
def test_losing_the_bias_is_noticed(small_folder: Path, first_distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the decoder's bias at distances from `first_distance` on, outputs differ there and not before."""
    (prompt,) = random_prompts((20,), 380)
    intact = load_model(small_folder, device=CPU, dtype=torch.float32)
    broken = load_model(small_folder, device=CPU, dtype=torch.float32)
    table = broken.decoder_bias._table
    middle = table.shape[1] // 2
    table[:, : middle + 1 - first_distance] = 0.0  # keys that lie so far back, or farther
    if broken.native_decoder is not None:  # which has a copy
        assert broken.native_decoder.bias.shape == (4, 129)
        broken.native_decoder.bias[:, : 129 - first_distance] = 0.0
    steps = 130
    (_, (good,)), (_, (bad,)) = greedy(intact, [prompt], steps), greedy(broken, [prompt], steps)
    first = next(step for step in range(steps) if (good[step] - bad[step]).abs().max() > 1e-3)
    assert first == max(first_distance, 1)  # at step 0 there is one key, which gets all the weight anyway


def test_bias_table_is_transformers_formula_at_every_distance() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    weight = torch.arange(32.0)[:, None].repeat(1, 2)  # the bias of a bucket is its number
    distances = torch.arange(-3000, 3001)
    for causal in (False, True):
        bias = RelativeBias(weight, max_distance=128, causal=causal, device=CPU, dtype=torch.float32)
        expected = T5Attention._relative_position_bucket(distances, bidirectional=not causal)
        ours = bias.at(distances)
        if causal:
            assert bool(ours[:, distances > 0].isneginf().all())
            assert torch.equal(ours[0, distances <= 0], expected[distances <= 0].float())
        else:
            assert torch.equal(ours[1], expected.float())


def test_bias_square_by_overlapping_strides() -> None:
    bias = RelativeBias(torch.randn(32, 4), max_distance=128, causal=False, device=CPU, dtype=torch.float32)
    positions = torch.arange(300)
    square = bias.at(positions[None, :] - positions[:, None])
    assert torch.equal(bias.reversed_square(300)[0].flip(-1), square)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(small_folder: Path, model: T5Model, dtype: torch.dtype) -> None:
    half = load_model(small_folder, device=CPU, dtype=dtype, vocab_limit=380)
    prompts = random_prompts((8, 40), 380)
    _, wide = greedy(model, prompts, 1)
    ids, narrow = greedy(half, prompts, 12)
    assert all(len(tokens) == 12 for tokens in ids)
    for ours, theirs in zip(narrow, wide, strict=True):
        assert (ours[0] - theirs[0]).abs().max() < 0.15


def test_the_folder_that_finetune_wrote_has_transformers_logits() -> None:
    """The bundled demo: trained by our finetune, loaded by transformers and by our engine."""
    from transformers import AutoTokenizer

    model, theirs = load_model(DEMO_FOLDER, device=CPU, dtype=torch.float32), reference(DEMO_FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER, local_files_only=True)
    texts = ("Find the odd one out. lemonade, spinach, garlic, broccoli", "What is 33 + 9? Let's think step by step.")
    prompts = [tuple(tokenizer(text).input_ids) for text in texts]
    ids, logits = greedy(model, prompts, STEPS)
    for prompt, ours, rows in zip(prompts, ids, logits, strict=True):
        with torch.inference_mode():
            decoder_input = torch.tensor([[0, *ours[:-1]]])
            full = theirs(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_input).logits[0]
        assert rows.shape == full.shape
        assert (rows - full).abs().max() < TOLERANCE
        assert rows.argmax(-1).tolist() == full.argmax(-1).tolist() == ours
