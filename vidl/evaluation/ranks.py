"""Ranks of the correct candidates, and recall, median and mean over all queries."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Recall is reported at these ranks.
AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class RankStatistics:
    """Statistics of the ranks of all queries.

    Attributes:
        queries: number of queries.
        recall: percentage of queries with rank <= k, by k.
        median, mean: median and mean rank; 1 is the best.
    """

    queries: int
    recall: dict[int, float]
    median: float
    mean: float


def ranks(scores: Tensor, correct: Tensor) -> Tensor:
    """The rank of the best correct candidate of each query; ties count against it.

        rank = 1 + #{j not correct: not scores[j] < max over correct i of scores[i]}

    Constant or NaN scores therefore give the worst rank. If several candidates are correct (a clip
    with several captions), the best one counts and the others are ignored.

    Args:
        scores: [num_queries, candidates], floating point.
        correct: [num_queries, candidates] bool.

    Returns:
        [num_queries] int64, from 1 to the number of candidates; one more if none is correct.

    Raises:
        ValueError: the shapes do not fit.
    """
    if scores.ndim != 2 or scores.shape != correct.shape:
        raise ValueError(
            f"need two [num_queries, candidates], got {tuple(scores.shape)}, {tuple(correct.shape)}"
        )
    if not scores.shape[1]:
        return torch.ones(len(scores), dtype=torch.int64, device=scores.device)
    # A NaN among the correct scores makes `best` NaN, and no score is below NaN.
    best = scores.masked_fill(~correct, -math.inf).amax(1, keepdim=True)
    return 1 + (~(scores < best) & ~correct).sum(1)


def rank_statistics(
    ranks: Tensor, readable: Tensor | None = None, at: Sequence[int] = AT
) -> RankStatistics:
    """Recall, median and mean of ranks.

    Args:
        ranks: [num_queries] int64.
        readable: [num_queries] bool; a query that is not readable is a miss at any k, even with few
            candidates.
        at: the values of k for recall@k.

    Raises:
        ValueError: there are no queries.
    """
    if not len(ranks):
        raise ValueError("need at least one query to rank, got none")
    hits = torch.ones_like(ranks, dtype=torch.bool) if readable is None else readable
    recall = {k: 100 * ((ranks <= k) & hits).double().mean().item() for k in at}
    values = ranks.double()
    # with an even number of ranks, the mean of the middle two, as in numpy
    return RankStatistics(len(ranks), recall, values.quantile(0.5).item(), values.mean().item())


def reranked(similarity: Tensor, matching: Tensor, correct: Tensor) -> Tensor:
    """Ranks after re-ranking the best candidates of each query.

    Re-ranked candidates come first, in the order of `matching`; the others follow in the order of
    `similarity`.

    Args:
        similarity: [num_queries, candidates].
        matching: [num_queries, candidates], -inf where a candidate was not re-ranked.
        correct: [num_queries, candidates] bool.

    Returns:
        [num_queries] int64.
    """
    rescored = (correct & (matching != -math.inf)).any(1)
    return torch.where(rescored, ranks(matching, correct), ranks(similarity, correct))
