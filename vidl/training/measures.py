"""Retrieval during and after training."""

from collections.abc import Callable
from typing import Any

from vidl.evaluation import Options, Retrieval, retrieval
from vidl.evaluation.retrieval import matches
from vidl.models import Aligns, can
from vidl.training import sources
from vidl.training.config import Config


def chosen(config: Config) -> Callable[[Any], dict[str, float]] | None:
    """The function that evaluates a run, if its configuration has an evaluation set."""
    searched = config.evaluation.files or config.data.source == "moving_shapes"
    return recalls if searched else None


def recalls(training: Any) -> dict[str, float]:
    """Recall of a run's retrieval, and the number of clips that count as misses, if any."""
    result = search(training)
    broken = {"clips not read": len(result.broken)} if result.broken else {}
    return numbers(result) | broken


def numbers(result: Retrieval) -> dict[str, float]:
    """Recall in percent by direction and k."""
    rankings = dict(result.rankings)
    rankings |= {f"{name} re-ranked": ranking for name, ranking in result.reranked.items()}
    return {
        f"{name} R@{k}": recall
        for name, ranking in rankings.items()
        for k, recall in ranking.recall.items()
    }


def search(training: Any) -> Retrieval:
    """Evaluate retrieval with the current model on the evaluation set of the configuration.

    Args:
        training: a `vidl.training.loop.Training`.

    Raises:
        ValueError: there is no evaluation set.
    """
    config = training.config
    dataset = sources.open_searched(config, training.recipe, training.tokenizer)
    if dataset is None:
        raise ValueError("need evaluation.files to evaluate retrieval")
    model = training.whole_model()
    # A model without features matches all pairs: nothing is left to re-rank.
    rerank = config.evaluation.rerank if matches(model) and can(model, Aligns) else 0
    options = Options(batch_size=config.data.batch_size, dtype=training.dtype, quiet=True)
    return retrieval(model, dataset, options, rerank=rerank)
