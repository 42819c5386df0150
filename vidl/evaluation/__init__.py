"""How good a model is: retrieval, multiple choice and open questions."""

from vidl.evaluation.encoding import Options
from vidl.evaluation.ranks import Ranking, ranking, ranks, reranked
from vidl.evaluation.retrieval import Retrieval, retrieval

__all__ = [
    "Options",
    "Ranking",
    "Retrieval",
    "ranking",
    "ranks",
    "reranked",
    "retrieval",
]
