"""What a run measures of itself: retrieval, on the way and at the end."""

from collections.abc import Callable
from typing import Any

from vidl.evaluation import Options, Retrieval, retrieval
from vidl.evaluation.retrieval import matches
from vidl.training import sources
from vidl.training.config import Config


def chosen(config: Config) -> Callable[[Any], dict[str, float]] | None:
    """What is called to evaluate a run, if its configuration names anything to search."""
    searched = config.evaluation.files or config.data.source == "moving_shapes"
    return recalls if searched else None


def recalls(training: Any) -> dict[str, float]:
    """The numbers of a run's retrieval."""
    return numbers(search(training))


def numbers(found: Retrieval) -> dict[str, float]:
    """The recalls in percent, by direction and rank."""
    rankings = dict(found.rankings)
    rankings |= {f"{name} re-ranked": each for name, each in found.reranked.items()}
    return {
        f"{name} R@{k}": recall
        for name, each in rankings.items()
        for k, recall in each.recall.items()
    }


def search(training: Any) -> Retrieval:
    """Retrieval with a run's model as it is now, on what its configuration names.

    Args:
        training: a `vidl.training.loop.Training`.

    Raises:
        ValueError: nothing is named.
    """
    config = training.config
    dataset = sources.open_searched(config, training.recipe, training.tokenizer)
    if dataset is None:
        raise ValueError("need evaluation.files to search")
    model = training.whole_model()
    rerank = config.evaluation.rerank if matches(model) else 0
    options = Options(batch_size=config.data.batch_size, dtype=training.dtype, quiet=True)
    return retrieval(model, dataset, options, rerank=rerank)
