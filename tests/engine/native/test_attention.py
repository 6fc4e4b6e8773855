"""Attention within texts is its definition at every length: blocks, panels of a last block, and pieces of queries."""

from __future__ import annotations

import pytest
import torch

from serve.engine.native.attention import NativeRaggedAttention
from serve.engine.native.library import Level, level, limited

LEVELS = [some for some in Level if Level.NONE < some <= level()]
pytestmark = pytest.mark.skipif(not LEVELS, reason="the kernels are not built, or not for this processor")
HEADS, D_KV = 2, 32


@pytest.mark.parametrize("most", LEVELS, ids=lambda some: some.name)
def test_every_length_is_the_definition(most: Level) -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (*range(1, 132), 191, 192, 193, 256, 257, 300):
        lengths = (length, 7)
        # As a fused product leaves them: q, k and v of a token side by side.
        q, k, v = torch.randn(sum(lengths), 3, HEADS, D_KV, generator=generator).unbind(1)
        longest = max(lengths)
        line = torch.randn(HEADS, 2 * longest - 1, generator=generator)
        with limited(most):
            made = NativeRaggedAttention(lengths, line)(q, k, v)
        start = 0
        for own in lengths:
            query, key, value = (x[start : start + own].transpose(0, 1).double() for x in (q, k, v))
            distance = torch.arange(own)[None, :] - torch.arange(own)[:, None]
            scores = query @ key.transpose(1, 2) + line.double()[:, distance + longest - 1]
            expected = (scores.softmax(-1) @ value).transpose(0, 1).float()
            torch.testing.assert_close(made[start : start + own], expected, rtol=1e-4, atol=1e-5)
            start += own
