"""The fields of the native requests, as tables: `/v1/generate`, `/v1/score`, `/v1/tokenize`."""

from __future__ import annotations

from serve.request import Mode
from serve.rest.fields import Bias, Field, Flag, Integer, Number, Object, Objects, Table, Text, Texts, Word
from serve.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_SEQUENCES, MAX_STOP_STRINGS

EXEMPLAR_FIELDS: Table = {
    "input": Field(Text(), "The case.", required=True),
    "output": Field(Text(), "Its solution.", required=True),
    "rationale": Field(Text(), "The reasoning that leads to the solution; shown in mode cot."),
}

# What a request says about its prompt and about itself.
PROMPT_FIELDS: Table = {
    "mode": Field(Word(tuple(mode.value for mode in Mode)), "How the prompt is rendered. Default: instruction."),
    "instruction": Field(Text(), "The task in words (raw: the whole prompt). Not blank.", required=True),
    "input": Field(Text(), "The instance that the instruction applies to."),
    "options": Field(Texts(), "A closed list of answers, shown to the model in Flan's OPTIONS form."),
    "exemplars": Field(
        Objects(Object(EXEMPLAR_FIELDS)),
        "Solved cases, for the modes few_shot and cot. Where the prompt would be too long, the first are dropped.",
    ),
    "exemplar_set": Field(Text(), "Name of a set of exemplars that the server has loaded, instead of `exemplars`."),
    "num_exemplars": Field(Integer(low=0), "How many of `exemplar_set` are shown, the first ones. Default: all."),
    "model": Field(Text(), "A name of the model, as the server knows it. Default: the model that is served."),
    "request_id": Field(
        Text(),
        "The caller's name for the request: 1 to 128 of A-Z a-z 0-9 . _ : - (the header x-request-id goes before it).",
    ),
}

# How an output is made. The OpenAI routes have these too.
SAMPLING_FIELDS: Table = {
    "max_tokens": Field(
        Integer(low=1),
        "Most tokens of an output. Above the server's limit it is lowered to that; the response says what was in "
        "effect. Default: the server's, 256.",
    ),
    "min_tokens": Field(
        Integer(low=0), "Until so many tokens neither the end token nor a stop string ends an output. Default: 0."
    ),
    "temperature": Field(Number(0, 2), "Randomness; 0 takes the likeliest token (greedy)."),
    "top_p": Field(
        Number(0, 1, excludes_low=True), "Sample from the likeliest tokens whose probabilities sum to this. Default: 1."
    ),
    "top_k": Field(Integer(low=0), "Sample from so many likeliest tokens; 0 = all. Default: 0."),
    "repetition_penalty": Field(
        Number(0, excludes_low=True), "Divides the score of tokens that the output already has; 1 = off. Default: 1."
    ),
    "seed": Field(Integer(), "Makes sampling repeatable. Default: another text every time."),
    "n": Field(Integer(1, MAX_SEQUENCES), "Outputs to generate. Default: 1."),
    "stop": Field(
        Texts(or_one=True, most=MAX_STOP_STRINGS), "Texts that end an output, none empty; they are not part of it."
    ),
    "ignore_eos": Field(Flag(), "The end token is an ordinary one: kept, and generation goes on. Default: false."),
    "skip_special_tokens": Field(Flag(), "Leave special tokens out of the text. Default: true."),
    "logit_bias": Field(Bias(MAX_LOGIT_BIAS), "Token id to what is added to that token's logit."),
}

GENERATE_FIELDS: Table = {
    **PROMPT_FIELDS,
    **SAMPLING_FIELDS,
    "temperature": Field(
        SAMPLING_FIELDS["temperature"].kind, "Randomness; 0 takes the likeliest token (greedy). Default: 0."
    ),
    "logprobs": Field(
        Integer(0, MAX_LOGPROBS),
        "Return each token's log-probability, and so many likeliest alternatives. Default: none at all.",
    ),
    "samples": Field(
        Integer(1, MAX_SEQUENCES), "Mode cot: so many sampled sequences vote on the answer. Default: 1, no vote."
    ),
    "answer_format": Field(
        Word(("text", "number")),
        "Mode cot; number: where the text has no answer sentence, its last number is the answer. Default: text.",
    ),
    "stream": Field(Flag(), "Answer with server-sent events as the text is made. Default: false."),
    "debug": Field(Flag(), "Return the rendered prompt and the stop list in effect. Default: false."),
}

SCORE_FIELDS: Table = {
    **PROMPT_FIELDS,
    "candidates": Field(Texts(), "The texts to score as continuations of the prompt.", required=True),
}

TOKENIZE_FIELDS: Table = {
    "text": Field(Text(), "The text.", required=True),
    "add_special_tokens": Field(Flag(), "Add what the tokenizer adds to a prompt (T5: one end token). Default: true."),
    "model": PROMPT_FIELDS["model"],
}
