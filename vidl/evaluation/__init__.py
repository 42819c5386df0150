"""Evaluation: retrieval, multiple choice and open-ended question answering."""

from vidl.evaluation.encoding import Options
from vidl.evaluation.questions import Accuracy, multiple_choice, question_answering
from vidl.evaluation.ranks import Ranking, ranking, ranks, reranked
from vidl.evaluation.retrieval import Retrieval, retrieval

__all__ = [
    "Accuracy",
    "Options",
    "Ranking",
    "Retrieval",
    "multiple_choice",
    "question_answering",
    "ranking",
    "ranks",
    "reranked",
    "retrieval",
]
