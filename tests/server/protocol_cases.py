"""The table of requests that every protocol must answer alike, and of mistakes that all must name alike.

Bodies are native JSON. Ranges stand here as the contract has them, each with both its ends and a step beyond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

MAX_INPUT_TOKENS, MAX_OUTPUT_TOKENS = 128, 32  # of the server that is asked
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
SETS = {
    "sums": [
        {"input": "Ann has 2 pens and buys 1 more. How many pens does she have?", "output": "3",
         "rationale": "Ann has 2 pens. 2 + 1 = 3."},
        {"input": "Bob has 5 cups and gives away 2. How many cups does he have?", "output": "3",
         "rationale": "Bob has 5 cups. 5 - 2 = 3."},
        {"input": "Eve has 4 hats and buys 4 more. How many hats does she have?", "output": "8",
         "rationale": "Eve has 4 hats. 4 + 4 = 8."},
    ],
    "reviews": [{"input": "A dull film.", "output": "negative"}, {"input": "A warm film.", "output": "positive"}],
}  # fmt: skip

REVIEW: Json = {"mode": "raw", "instruction": "Is this review positive or negative?\n\nI loved the story."}
LETTERS: Json = {
    "mode": "raw",
    "instruction": "Take the last letters of Paul Maria and join them. Let's think step by step.",
    "max_tokens": 8,
}  # "The last letter of Paul is l."; with more: "The last letter of Maria is a. The answer is la."
SUM: Json = {"mode": "cot", "instruction": "Tom has 3 apples and buys 4 more. How many apples does he have?"}
FEW: Json = {"mode": "few_shot", "instruction": "Is it positive or negative?", "input": "I loved the story."}
SAMPLED: Json = {**LETTERS, "temperature": 1.0, "seed": 5}

SAMPLING: dict[str, Json] = {
    "max_tokens 1": {**LETTERS, "max_tokens": 1},
    "max_tokens at the limit": {**LETTERS, "max_tokens": MAX_OUTPUT_TOKENS, "ignore_eos": True},
    "max_tokens above the limit": {**LETTERS, "max_tokens": MAX_OUTPUT_TOKENS + 1, "ignore_eos": True},
    "max_tokens, the largest": {**LETTERS, "max_tokens": INT64_MAX},
    "min_tokens 0": {**REVIEW, "min_tokens": 0},
    "min_tokens 9": {**REVIEW, "min_tokens": 9},
    "min_tokens as many as max_tokens": {**REVIEW, "min_tokens": 7, "max_tokens": 7},
    "min_tokens and max_tokens above the limit": {**REVIEW, "min_tokens": 900, "max_tokens": 900},
    "min_tokens holds back a stop string": {**LETTERS, "min_tokens": 5, "stop": "letter"},
    "temperature 0": {**LETTERS, "temperature": 0},
    "temperature -0.0": {**LETTERS, "temperature": -0.0},
    "temperature 1e-9": {**LETTERS, "temperature": 1e-9},
    "temperature 2": {**SAMPLED, "temperature": 2},
    "temperature and seed": SAMPLED,
    "temperature, seed and n": {**SAMPLED, "n": 4},
    "seed 0": {**SAMPLED, "seed": 0},
    "seed -1": {**SAMPLED, "seed": -1},
    "seed, the largest": {**SAMPLED, "seed": INT64_MAX},
    "seed, the least": {**SAMPLED, "seed": INT64_MIN},
    "seed without temperature": {**LETTERS, "seed": 5},
    "top_p 1": {**SAMPLED, "top_p": 1.0},
    "top_p 0.5": {**SAMPLED, "top_p": 0.5},
    "top_p, the least": {**SAMPLED, "top_p": 5e-324},
    "top_k 0": {**SAMPLED, "top_k": 0},
    "top_k 1": {**SAMPLED, "top_k": 1},
    "top_k 50": {**SAMPLED, "top_k": 50},
    "top_k, the largest": {**SAMPLED, "top_k": INT64_MAX},
    "repetition_penalty 1": {**LETTERS, "repetition_penalty": 1},
    "repetition_penalty 1.5": {**LETTERS, "repetition_penalty": 1.5},
    "repetition_penalty below 1": {**LETTERS, "repetition_penalty": 0.5, "max_tokens": 6},
    "repetition_penalty, the least": {**LETTERS, "repetition_penalty": 5e-324, "max_tokens": 6},
    "repetition_penalty, a huge one": {**LETTERS, "repetition_penalty": 1e300, "max_tokens": 6},
    "n 1": {**REVIEW, "n": 1},
    "n 3, greedy": {**REVIEW, "n": 3},
    "n 64": {**SAMPLED, "n": 64, "max_tokens": 3},
    "stop": {**LETTERS, "stop": "Paul"},
    "stop across tokens": {**LETTERS, "stop": ["tter of Pa"]},
    "stop at the very beginning": {**LETTERS, "stop": ["The"]},
    "stop, the first that comes": {**LETTERS, "stop": ["is", "Paul", "zzz"]},
    "stop that begins and never comes": {**LETTERS, "stop": ["l.!"]},
    "stop that never comes": {**LETTERS, "stop": ["~", "é"]},
    "stop, 16 of them": {**LETTERS, "stop": [f"{n}x" for n in range(15)] + ["l is"]},
    "stop with n": {**SAMPLED, "n": 3, "stop": ["of", " l"]},
    "stop, an empty list": {**REVIEW, "stop": []},
    "ignore_eos": {**REVIEW, "ignore_eos": True, "max_tokens": 8},
    "ignore_eos false": {**REVIEW, "ignore_eos": False},
    "special tokens shown": {**REVIEW, "skip_special_tokens": False},
    "special tokens shown and EOS ignored": {
        **REVIEW, "skip_special_tokens": False, "ignore_eos": True, "max_tokens": 5,
    },
    "special tokens hidden": {**REVIEW, "skip_special_tokens": True},
    "logprobs 0": {**LETTERS, "logprobs": 0},
    "logprobs 1": {**LETTERS, "logprobs": 1},
    "logprobs 20": {**REVIEW, "logprobs": 20},
    "logprobs of several outputs": {**SAMPLED, "n": 3, "logprobs": 2},
    "logprobs and a stop string": {**LETTERS, "stop": ["tter of Pa"], "logprobs": 2},
    "logprobs with EOS ignored": {**REVIEW, "ignore_eos": True, "max_tokens": 4, "logprobs": 2},
    "logprobs of impossible tokens": {**REVIEW, "logit_bias": {"51": -100}, "logprobs": 20, "top_k": 1},
    "logit_bias": {**LETTERS, "logit_bias": {"40": -100, "41": 2.5}, "max_tokens": 6},
    "logit_bias 100": {**LETTERS, "logit_bias": {"51": 100}, "max_tokens": 4},
    "logit_bias 0": {**REVIEW, "logit_bias": {"0": 0}},
    "logit_bias, an empty one": {**REVIEW, "logit_bias": {}},
    "all at once": {
        **SAMPLED, "n": 2, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2, "min_tokens": 3, "stop": [" l"],
        "logprobs": 2, "logit_bias": {"51": 1.5}, "skip_special_tokens": False,
    },
}  # fmt: skip

PROMPTS: dict[str, Json] = {
    "raw": REVIEW,
    "raw, unknown pieces": {"mode": "raw", "instruction": "return {x} if y < 3 ~ \\ ` ^"},
    "raw, literal special tokens": {"mode": "raw", "instruction": "the </s> cat <pad> <extra_id_0> <unk>"},
    "raw, one character": {"mode": "raw", "instruction": "a", "max_tokens": 4},
    "raw, as long as may be": {"mode": "raw", "instruction": "yes " * (MAX_INPUT_TOKENS - 1), "max_tokens": 4},
    "raw, many scripts": {"mode": "raw", "instruction": "naïve 日本 \u200b e\u0301 \U0001f600 ﬁ ٣", "max_tokens": 8},
    "raw, a blank input": {**REVIEW, "input": " "},
    "no mode": {"instruction": "Is this review positive or negative?", "input": "I hated it."},
    "instruction": {"mode": "instruction", "instruction": "Is it positive or negative?", "input": "I hated it."},
    "instruction, options": {
        "instruction": "Is it positive or negative?", "input": "I hated it.", "options": ["positive", "negative"],
    },
    "instruction, an empty input": {"instruction": "Name a colour.", "input": "", "options": []},
    "few_shot": {**FEW, "exemplars": SETS["reviews"]},
    "few_shot without any": FEW,
    "few_shot, an empty list": {**FEW, "exemplars": []},
    "few_shot with rationales, which are not shown": {**FEW, "exemplars": SETS["sums"], "debug": True},
    "few_shot, the query among the exemplars": {**FEW, "input": " a  WARM film.", "exemplars": SETS["reviews"]},
    "few_shot, more than fit": {**FEW, "exemplars": [*SETS["sums"], *SETS["reviews"]], "debug": True},
    "few_shot, a set": {**FEW, "exemplar_set": "reviews", "debug": True},
    "few_shot, a set, none of it": {**FEW, "exemplar_set": "reviews", "num_exemplars": 0},
    "few_shot, a set, one of it": {**FEW, "exemplar_set": "reviews", "num_exemplars": 1, "debug": True},
    "few_shot, a set, more than it has": {**FEW, "exemplar_set": "reviews", "num_exemplars": 2**31 - 1},
    "cot": SUM,
    "cot, exemplars": {**SUM, "exemplars": SETS["sums"][:2]},
    "cot, a set": {**SUM, "exemplar_set": "sums", "num_exemplars": 2, "debug": True},
    "cot, options": {**SUM, "options": ["7", "12"]},
    "cot, cut before the answer": {**SUM, "max_tokens": 5},
    "cot, cut, a number wanted": {**SUM, "max_tokens": 5, "answer_format": "number"},
    "cot, a text wanted": {**SUM, "answer_format": "text"},
    "cot, n": {**SUM, "n": 3, "temperature": 1.0, "seed": 3},
    "cot, stop": {**SUM, "stop": ["The answer"]},
    "cot, logprobs": {**SUM, "logprobs": 1},
    "cot, one sample": {**SUM, "samples": 1},
    "cot, one sample and n": {**SUM, "samples": 1, "n": 2},
    "self-consistency": {**SUM, "samples": 7, "seed": 3},
    "self-consistency, exemplars": {**SUM, "samples": 3, "seed": 3, "exemplar_set": "sums", "num_exemplars": 2},
    "self-consistency, temperature": {**SUM, "samples": 5, "seed": 8, "temperature": 1.5, "logprobs": 0},
    "self-consistency, all alike": {**SUM, "samples": 4, "temperature": 0},
    "self-consistency, no answer at all": {**SUM, "samples": 64, "seed": 3, "max_tokens": 2},
    "self-consistency, numbers": {**SUM, "samples": 5, "seed": 3, "max_tokens": 9, "answer_format": "number"},
    "debug": {**FEW, "debug": True, "stop": ["x", "y"]},
    "debug, raw": {**REVIEW, "debug": True},
    "the model's name": {**REVIEW, "model": "flan"},
    "its other name": {**REVIEW, "model": "other-name"},
    "default": {**REVIEW, "model": "default"},
    "tgi": {**REVIEW, "model": "tgi"},
    "dummy": {**REVIEW, "model": "dummy"},
    "a name for the request": {**REVIEW, "request_id": "A-z.0:9_" + "x" * 120},
}  # fmt: skip

REQUESTS = {**SAMPLING, **PROMPTS}


@dataclass(frozen=True)
class Mistake:
    """A wrong request, the error's kind and the field that it names."""

    body: Json
    field: str | None
    kind: str = "invalid"


def _wrong(name: str, *values: Any, base: Json = REVIEW) -> dict[str, Mistake]:
    return {f"{name} {str(value)[:30]}": Mistake({**base, name: value}, name) for value in values}


NAN, INF = float("nan"), float("inf")
MISTAKES: dict[str, Mistake] = {
    **_wrong("max_tokens", 0, -1, INT64_MIN),
    **_wrong("min_tokens", -1, INT64_MIN, MAX_OUTPUT_TOKENS * 1000),
    "min_tokens above max_tokens": Mistake({**REVIEW, "max_tokens": 2, "min_tokens": 3}, "min_tokens"),
    **_wrong("temperature", -1e-9, 2.0000001, -1, 1e300),
    **_wrong("top_p", 0.0, -0.0, -1e-9, 1.0000001, 1e300),
    **_wrong("top_k", -2, INT64_MIN),
    **_wrong("repetition_penalty", 0.0, -0.0, -1e-9),
    **_wrong("n", 0, -1, 65, 2**31 - 1),
    **_wrong("stop", "", ["a", ""], [str(n) for n in range(17)], ["a\0b"]),
    **_wrong("logprobs", -1, 21, 2**31 - 1),
    **_wrong("logit_bias", {"51": 100.0001}, {"51": -100.0001}, {"1000000": 1.0}, {str(2**32 - 1): 1.0}),
    **_wrong("samples", 0, -1, 65, base=SUM),
    **_wrong("samples", 1, 2),
    "n beside samples": Mistake({**SUM, "samples": 2, "n": 2}, "n"),
    **_wrong("instruction", "", " \n\t", "\u3000", "a\0b", "cat " * MAX_INPUT_TOKENS, "cat " * 50_000),
    "no instruction": Mistake({"mode": "raw"}, "instruction"),
    "no instruction, an input": Mistake({"input": "x"}, "instruction"),
    "an input in raw": Mistake({**REVIEW, "input": "x"}, "input"),
    "options in raw": Mistake({**REVIEW, "options": ["x"]}, "options"),
    **_wrong("options", ["yes", " "], ["a\0b"], ["x"] * 257, base=FEW),
    **_wrong("input", "a\0b", "cat " * MAX_INPUT_TOKENS, base=FEW),
    **_wrong(
        "exemplars", [{"input": "x"}], [{"output": "x"}], [{"input": " ", "output": "x"}],
        [{"input": "x", "output": ""}], [{"input": "a\0b", "output": "x"}], [{"input": "a", "output": "b"}] * 257,
        base=FEW,
    ),
    "exemplars in raw": Mistake({**REVIEW, "exemplars": SETS["sums"]}, "exemplars"),
    "exemplars in instruction": Mistake({"instruction": "x", "exemplars": SETS["sums"]}, "exemplars"),
    "a set in raw": Mistake({**REVIEW, "exemplar_set": "sums"}, "exemplar_set"),
    "a set and exemplars": Mistake({**SUM, "exemplar_set": "sums", "exemplars": SETS["sums"]}, "exemplar_set"),
    **_wrong("exemplar_set", "", "sum", "../sums", base=SUM),
    "num_exemplars without a set": Mistake({**SUM, "num_exemplars": 1}, "num_exemplars"),
    "num_exemplars with exemplars": Mistake({**SUM, "num_exemplars": 1, "exemplars": SETS["sums"]}, "num_exemplars"),
    "num_exemplars -1": Mistake({**SUM, "num_exemplars": -1, "exemplar_set": "sums"}, "num_exemplars"),
    "num_exemplars in raw": Mistake({**REVIEW, "num_exemplars": 1}, "num_exemplars"),
    **{f"model {name!r}": Mistake({**REVIEW, "model": name}, "model", "not_found") for name in ("", "gpt-4", "Flan")},
    **_wrong("request_id", "a b", "x" * 129, "é"),
}  # fmt: skip

# What JSON can say in a standard way only here, and other readers may refuse as no JSON: gRPC carries these numbers.
NOT_FINITE = {
    **{f"{name} {value}": Mistake({**REVIEW, name: value}, name)
       for name in ("temperature", "top_p", "repetition_penalty") for value in (NAN, INF, -INF)},
    **{f"logit_bias {value}": Mistake({**REVIEW, "logit_bias": {"51": value}}, "logit_bias") for value in (NAN, INF)},
}  # fmt: skip

# Values that a message cannot hold; JSON can, and the REST edges name the field.
ONLY_JSON = {
    **_wrong("max_tokens", 2**63, "5", 1.0, True, []),
    **_wrong("temperature", "0", True, [], 10**400),
    **_wrong("seed", 2**63, -(2**63) - 1, 1.5, "1"),
    **_wrong("n", 2**31, 2**63, 1.0),
    **_wrong("top_k", 2**63, 1.5),
    **_wrong("logprobs", 2**31),
    **_wrong("stop", 5, [5], {"a": 1}),
    **_wrong("ignore_eos", "false", 0),
    **_wrong("skip_special_tokens", "true", 1),
    **_wrong("logit_bias", {"-1": 1}, {"x": 1}, {"51": "1"}, [1], {str(2**64): 1}),
    **_wrong("model", 5, ["flan"]),
    **_wrong("instruction", 5, {"a": 1}, "\ud800", "a\udfff"),
}
ONLY_NATIVE_JSON = {
    **_wrong("mode", "", "Raw", "zero_shot", 1),
    **_wrong("answer_format", "integer", 1, base=SUM),
    **_wrong("samples", 2**31, 1.5, base=SUM),
    **_wrong("input", 5, "\ud800", base=FEW),
    **_wrong("options", "yes", [1], base=FEW),
    **_wrong("exemplars", {}, ["x"], [{"input": 1, "output": "x"}], [{"input": "a", "output": "b", "z": 1}], base=FEW),
    **_wrong("num_exemplars", "1", 2**63, base={**SUM, "exemplar_set": "sums"}),
    **_wrong("debug", "true"),
    **_wrong("request_id", 5),
    "an unknown field": Mistake({**REVIEW, "max_new_tokens": 5}, "max_new_tokens"),
}

CANDIDATES = ["positive", "negative", "the answer is 4", "é {x}"]
SCORES: dict[str, Json] = {
    "raw": {**REVIEW, "candidates": CANDIDATES},
    "instruction": {"instruction": "Is it positive or negative?", "input": "I hated it.", "candidates": CANDIDATES},
    "options": {**FEW, "options": ["positive", "negative"], "candidates": ["positive", "negative"]},
    "few_shot": {**FEW, "exemplars": SETS["reviews"], "candidates": CANDIDATES},
    "a set": {**FEW, "exemplar_set": "reviews", "num_exemplars": 1, "candidates": CANDIDATES},
    "cot": {**SUM, "exemplar_set": "sums", "num_exemplars": 2, "candidates": ["7", "12"]},
    "one": {**REVIEW, "candidates": ["positive"]},
    "twice the same": {**REVIEW, "candidates": ["positive", "positive"]},
    "the model's name": {**REVIEW, "candidates": ["positive"], "model": "other-name"},
}
SCORED = {**REVIEW, "candidates": ["positive"]}
SCORE_MISTAKES: dict[str, Mistake] = {
    **_wrong("candidates", [], [""], ["a", " "], ["a\0b"], ["a"] * 1025, ["cat " * MAX_OUTPUT_TOKENS], base=SCORED),
    "no candidates": Mistake(REVIEW, "candidates"),
    **_wrong("instruction", "", "a\0b", "cat " * MAX_INPUT_TOKENS, base=SCORED),
    **_wrong("model", "gpt-4", base=SCORED),
    **_wrong("request_id", "a b", base=SCORED),
    "exemplars in raw": Mistake({**SCORED, "exemplars": SETS["sums"]}, "exemplars"),
    "an exemplar without output": Mistake({**SCORED, "mode": "cot", "exemplars": [{"input": "a"}]}, "exemplars"),
}
SCORE_MISTAKES["model gpt-4"] = Mistake({**SCORED, "model": "gpt-4"}, "model", "not_found")
