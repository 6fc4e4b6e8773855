"""T5 span corruption: hide runs of tokens, and ask for them back.

    tokens            Thank you for inviting me to your party last week .
    encoder input     Thank you <extra_id_0> me to your party <extra_id_1> week . </s>
    decoder target    <extra_id_0> for inviting <extra_id_1> last <extra_id_2> </s>

Source: `random_spans_noise_mask` and `noise_span_to_unique_sentinel` of google-research/text-to-text-transfer-
transformer. Sentinels are unique and go down from the top of the vocabulary: <extra_id_0> is the highest id. The
target ends with one more sentinel, as T5's does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from finetune.example import TextExample

NOISE_DENSITY = 0.15
MEAN_SPAN = 3.0


class _Stream(Protocol):
    def __next__(self) -> TextExample: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def corrupt(
    ids: Sequence[int],
    *,
    sentinel_ids: Sequence[int],
    eos_id: int,
    rng: random.Random,
    noise_density: float = NOISE_DENSITY,
    mean_span: float = MEAN_SPAN,
) -> tuple[list[int], list[int]]:
    """Encoder input and decoder target of a corrupted text; both end in EOS.

    ids           the text's token ids without EOS, at least 2 of them
    sentinel_ids  ids of <extra_id_0>, <extra_id_1>, ... in this order

    >>> corrupt([10, 11, 12, 13, 14, 15, 16], sentinel_ids=[99, 98, 97], eos_id=1, rng=random.Random(3))
    ([10, 11, 12, 13, 14, 15, 99, 1], [99, 16, 98, 1])
    """
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens cannot be corrupted; at least 2 are needed")
    if not 0 < noise_density < 1 or mean_span < 1:
        raise ValueError(f"noise_density must be in (0, 1) and mean_span at least 1, not {noise_density}, {mean_span}")
    num_noise = min(max(round(len(ids) * noise_density), 1), len(ids) - 1)
    num_spans = min(max(round(num_noise / mean_span), 1), num_noise, len(ids) - num_noise, len(sentinel_ids) - 1)
    if num_spans < 1:
        raise ValueError(f"at least 2 sentinels are needed, {len(sentinel_ids)} given")
    noise_lengths = _random_parts(num_noise, num_spans, rng)
    kept_lengths = _random_parts(len(ids) - num_noise, num_spans, rng)
    inputs: list[int] = []
    targets: list[int] = []
    position = 0
    for span, (num_kept, num_hidden) in enumerate(zip(kept_lengths, noise_lengths, strict=True)):
        inputs += [*ids[position : position + num_kept], sentinel_ids[span]]
        position += num_kept
        targets += [sentinel_ids[span], *ids[position : position + num_hidden]]
        position += num_hidden
    return [*inputs, eos_id], [*targets, sentinel_ids[num_spans], eos_id]


class TextPieces:
    """The texts of a mixture without labels, for denoising: each example's input and target as one text.

    It reads the stream it is given and shares its position: give it a stream of its own.
    """

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        example = next(self._stream)
        return f"{example.inputs}\n{example.targets}"

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state_dict(state)


def _random_parts(total: int, num_parts: int, rng: random.Random) -> list[int]:
    """`total` cut at random into parts of at least 1, every way equally likely.

    >>> _random_parts(5, 1, random.Random(0))
    [5]
    """
    cuts = sorted(rng.sample(range(1, total), num_parts - 1))
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]
