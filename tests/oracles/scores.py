"""When two computations of one trial's scores agree."""

import torch

from locos_fast import HeadScores

BOUND = 1e-5  # of the largest magnitude: the same sums in another order, in float32


def assert_same(found: HeadScores, expected: HeadScores) -> None:
    assert found.names == expected.names
    for name in expected.names:
        a, b = (torch.from_numpy(scores.array(name)) for scores in (found, expected))
        size = float(b.nan_to_num().abs().max())
        assert torch.equal(a.isnan(), b.isnan()), name
        assert float((a - b).nan_to_num().abs().max()) <= BOUND * max(size, 1e-30), name


class NumberNames:
    """A tokenizer whose tokens are called by their ids."""

    def decode(self, token_ids: list[int], **_: object) -> str:
        return str(token_ids[0])
