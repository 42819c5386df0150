"""Where the right answer stands among all candidates, and what is told of many such ranks."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Recall is told at these ranks.
AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """How many queries find what they look for, and how far down.

    Attributes:
        queries: how many there were.
        recall: percentage of queries whose rank is at most k, by k.
        median, mean: of the ranks; 1 is the best.
    """

    queries: int
    recall: dict[int, float]
    median: float
    mean: float


def ranks(scores: Tensor, correct: Tensor) -> Tensor:
    """The rank of the best correct candidate of each query, ties counted against it.

        rank = 1 + #{j not correct: not scores[j] < max over correct i of scores[i]}

    So constant scores, or NaN, find nothing. Of several correct ones (a clip with several captions)
    the best one counts, and the others are not in its way.

    Args:
        scores: of queries and candidates, [Q, N], floating point.
        correct: which candidates are right, [Q, N] bool.

    Returns:
        [Q] int64, in 1 to N; where none is correct, N + 1.

    Raises:
        ValueError: the shapes do not fit.
    """
    if scores.ndim != 2 or scores.shape != correct.shape:
        raise ValueError(
            f"need scores and correct [Q, N], got {tuple(scores.shape)} and {tuple(correct.shape)}"
        )
    if not scores.shape[1]:
        return torch.ones(len(scores), dtype=torch.int64, device=scores.device)
    # A NaN among the correct ones makes the best one NaN, which nothing is below.
    best = scores.masked_fill(~correct, -math.inf).amax(1, keepdim=True)
    return 1 + (~(scores < best) & ~correct).sum(1)


def ranking(ranks: Tensor, found: Tensor | None = None, at: Sequence[int] = AT) -> Ranking:
    """What is told of ranks.

    Args:
        ranks: [Q] int64.
        found: false where the query is a miss at any k, however few candidates there are, [Q] bool.
        at: at which ranks recall is told.

    Raises:
        ValueError: there are no queries.
    """
    if not len(ranks):
        raise ValueError("need at least one query to rank, got none")
    hits = torch.ones_like(ranks, dtype=torch.bool) if found is None else found
    recall = {k: 100 * ((ranks <= k) & hits).double().mean().item() for k in at}
    values = ranks.double()
    # of an even number the mean of the two in the middle, as numpy has it
    return Ranking(len(ranks), recall, values.quantile(0.5).item(), values.mean().item())


def reranked(similarity: Tensor, matching: Tensor, correct: Tensor) -> Tensor:
    """Ranks where some candidates of each query were judged again.

    Those that were stand before all others, in the order of `matching`; the others stay behind them
    in the order of `similarity`.

    Args:
        similarity: [Q, N].
        matching: [Q, N], -inf where a candidate was not judged.
        correct: [Q, N] bool.

    Returns:
        [Q] int64.
    """
    judged = (correct & (matching != -math.inf)).any(1)
    return torch.where(judged, ranks(matching, correct), ranks(similarity, correct))
