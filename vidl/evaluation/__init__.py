"""Evaluation: retrieval, multiple choice, open questions, captions and pairs of clips."""

from vidl.evaluation.caption_metrics import bleu, cider_d, rouge_l
from vidl.evaluation.captioning import Captioned, CaptionScores, captioning
from vidl.evaluation.encoding import Options
from vidl.evaluation.pairs import pairs_of_clips
from vidl.evaluation.questions import Accuracy, multiple_choice, question_answering
from vidl.evaluation.ranks import RankStatistics, rank_statistics, ranks, reranked
from vidl.evaluation.retrieval import Retrieval, retrieval
from vidl.models.vqa import vqa_accuracy

__all__ = [
    "Accuracy",
    "CaptionScores",
    "Captioned",
    "Options",
    "RankStatistics",
    "Retrieval",
    "bleu",
    "captioning",
    "cider_d",
    "multiple_choice",
    "pairs_of_clips",
    "question_answering",
    "rank_statistics",
    "ranks",
    "reranked",
    "retrieval",
    "rouge_l",
    "vqa_accuracy",
]
