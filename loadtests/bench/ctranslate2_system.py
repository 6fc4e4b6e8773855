"""CTranslate2 as a system under test: its converter, its translator, and a callback that stops each request."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests.bench.prompts import Request
from loadtests.bench.queueing import serve_in_batches
from loadtests.bench.shapes import word
from loadtests.bench.system import OnToken, Place, Tokens, Tuning, by_length

NAME = "ctranslate2"
CONVERTED = "ctranslate2"  # folder inside the checkpoint's
_TOKENS = (4096, 2048, 8192)  # of a batch, tried in this order where there are many requests
_MANY = 32


def installed() -> bool:
    return importlib.util.find_spec("ctranslate2") is not None


def convert(folder: Path) -> Path:
    """Convert a checkpoint, in float32; the translator quantizes when it loads. Done already = not done again."""
    from ctranslate2.converters import TransformersConverter

    class UntiedConverter(TransformersConverter):  # type: ignore[misc]  # the package has no types
        """transformers 5 calls every T5 tied; believing it, the converter would scale the logits."""

        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super().load_model(*args, **kwargs)
            model.config.tie_word_embeddings = False
            return model

    target = folder / CONVERTED
    if not (target / "model.bin").is_file():
        UntiedConverter(str(folder)).convert(str(target), force=True)
    return target


class CTranslate2System:
    """See loadtests.bench.system.System."""

    name = NAME

    def __init__(self, place: Place, setting: str) -> None:
        if place.folder is None:
            raise ValueError("a peer needs a checkpoint folder")
        self.setting = setting
        self._place = place
        self._folder = convert(Path(place.folder))
        self._ids = self._read_vocabulary()
        self.vocab_size = len(self._ids)
        self._tuning = Tuning(threads=place.threads)
        self._translator = self._open(self._tuning)

    def candidates(self, count: int) -> list[Tuning]:
        """All threads on one batch, one thread on it, or a thread for each of several; in sizes that `count` allows."""
        threads = self._place.threads
        tunings = []
        splits = ((threads, 1), (1, threads)) if count > 1 else ((1, threads), (1, 1))
        for streams, of_each in dict.fromkeys(splits):
            split: dict[str, Any] = {"streams": streams, "threads": of_each}
            if count > _MANY:
                tunings += [Tuning(batch=tokens, by_tokens=True, **split) for tokens in _TOKENS]
            else:
                tunings.append(Tuning(batch=-(-count // streams) if streams > 1 else 0, **split))
        return tunings

    def use(self, tuning: Tuning) -> None:
        if (tuning.streams, tuning.threads) != (self._tuning.streams, self._tuning.threads):
            self._translator = self._open(tuning)
        self._tuning = tuning

    def generate(self, requests: Sequence[Request], *, at_once: int = 0, on_token: OnToken | None = None) -> Tokens:
        order = by_length(requests) if at_once else list(range(len(requests)))
        size = at_once or len(requests)
        tokens: Tokens = [[] for _ in requests]
        for start in range(0, len(order), size):
            places = order[start : start + size]
            for place, made in zip(places, self._batch(requests, places, on_token), strict=True):
                tokens[place] = made
        return tokens

    def _batch(self, requests: Sequence[Request], places: Sequence[int], on_token: OnToken | None) -> Tokens:
        """One call. EOS is off up to `min_decoding_length`; the callback's True ends its request and no other."""
        lengths = [requests[place].length for place in places]
        longest = max(lengths)

        def told(step: Any) -> bool:
            if on_token is not None:
                on_token(places[step.batch_id])
            return bool(step.step + 1 >= lengths[step.batch_id])

        results = self._translator.translate_batch(
            [self._words(requests[place].ids) for place in places],
            beam_size=1,
            min_decoding_length=longest,
            max_decoding_length=longest,
            max_input_length=0,
            max_batch_size=self._tuning.batch,
            batch_type="tokens" if self._tuning.by_tokens else "examples",
            **({"callback": told} if on_token is not None or len(set(lengths)) > 1 else {}),
        )
        return [[self._ids[token] for token in result.hypotheses[0]] for result in results]

    def sample(self, request: Request, count: int, seed: int) -> Tokens:
        import ctranslate2

        ctranslate2.set_random_seed(seed)
        [result] = self._translator.translate_batch(
            [self._words(request.ids)],
            beam_size=1,
            num_hypotheses=count,
            sampling_topk=0,
            sampling_temperature=1.0,
            min_decoding_length=request.length,
            max_decoding_length=request.length,
            max_input_length=0,
        )
        return [[self._ids[token] for token in hypothesis] for hypothesis in result.hypotheses]

    def score(self, ids: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[float]:
        """It takes a prompt for each candidate, and puts EOS behind a candidate by itself."""
        results = self._translator.score_batch(
            [self._words(ids)] * len(candidates),
            [self._words(candidate[:-1]) for candidate in candidates],
            max_input_length=0,
        )
        return [sum(result.log_probs) for result in results]

    def serve(self, requests: Sequence[Request], due: Sequence[float]) -> list[list[float]]:
        return serve_in_batches(lambda batch, tell: self.generate(batch, on_token=tell), requests, due)

    def _open(self, tuning: Tuning) -> Any:
        import ctranslate2

        return ctranslate2.Translator(
            str(self._folder),
            device=self._place.device,
            compute_type=self.setting,
            inter_threads=tuning.streams,
            intra_threads=tuning.threads,
        )

    def _read_vocabulary(self) -> dict[str, int]:
        tokens = json.loads((self._folder / "shared_vocabulary.json").read_text(encoding="utf-8"))
        return {token: token_id for token_id, token in enumerate(tokens)}

    def _words(self, ids: Sequence[int]) -> list[str]:
        return [word(token_id) for token_id in ids]
