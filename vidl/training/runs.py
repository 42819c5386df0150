"""Load and evaluate the model of a run."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vidl import models
from vidl.data.dataset import TooManyBroken
from vidl.data.text import Tokenizer, load_tokenizer
from vidl.evaluation import (
    Accuracy,
    Options,
    Retrieval,
    multiple_choice,
    question_answering,
    retrieval,
)
from vidl.models import Answering
from vidl.training import checkpoints, parallel, sources
from vidl.training.config import Config

ANSWERS = "answers.json"


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model with its tokenizer and configuration.

    Attributes:
        model: a model of `vidl.models`; `Answering` if the run has answers.
        tokenizer: tokenizer of the captions.
        config: configuration of the run.
    """

    model: Any
    tokenizer: Tokenizer
    config: Config


def folder_of(path: str | Path) -> Path:
    """The folder of a run, given the folder or one of its checkpoints.

    Raises:
        ValueError: the path is neither.
    """
    path = Path(path)
    for folder in (path, *path.resolve().parents[1:2]):
        if (folder / "config.yaml").is_file() and (folder / "tokenizer.json").is_file():
            return folder
    raise ValueError(
        "need the folder of a run (with config.yaml and tokenizer.json) or one of its "
        f"checkpoints, got {path}"
    )


def open_run(path: str | Path, device: torch.device | str = "cpu") -> Trained:
    """Load the model of a run.

    Args:
        path: folder of the run, for its newest checkpoint; or one of its checkpoints.
        device: device of the model.

    Raises:
        ValueError: no such run, or it has no checkpoint yet.
    """
    folder = folder_of(path)
    config = Config.read(folder / "config.yaml")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    recipe = config.recipe(vocabulary=sources.vocabulary(tokenizer))
    model = models.MODELS[config.model.name][0](recipe)
    if (folder / ANSWERS).is_file():
        model = Answering(model, json.loads((folder / ANSWERS).read_text()))
    model.load_state_dict(checkpoints.weights_of(path))
    return Trained(model.to(device).eval(), tokenizer, config)


def evaluate(
    path: str | Path,
    task: str,
    data: tuple[str | Path, str | Path | None] | None,
    ranks: parallel.Ranks,
    options: Options,
    rerank: int = 0,
    *,
    outside: bool = False,
) -> Retrieval | Accuracy:
    """Evaluate the model of a run.

    Args:
        path: see `open_run`.
        task: "retrieval", "mc" or "qa".
        data: annotation file and the folder of its media; None: the synthetic evaluation set of
            moving_shapes. Files that the run's configuration names are not read: the run may be
            that of a stranger.
        ranks: this rank.
        options: batches, masks, pruning.
        rerank: see `vidl.evaluation.retrieval`.
        outside: see `vidl.data.annotations.Annotations`.

    Raises:
        ValueError: no such run, its model does not support the task, or there are no data.
        TooManyBroken: no clip at all can be read; the folder is probably wrong.
    """
    trained = open_run(path, ranks.device)
    model, config = trained.model, trained.config
    if (task == "qa") != isinstance(model, Answering):
        needed = "a run of `vidl finetune qa`" if task == "qa" else f"a run for {task}"
        raise ValueError(f"need {needed}, got {type(model).__name__} at {path}")
    file, media = data or (None, None)
    chosen = dataclasses.replace(
        config.evaluation,
        files=[] if file is None else [str(file)],
        media=None if media is None else str(media),
    )
    trusted = dataclasses.replace(config.data, outside=outside)
    config = dataclasses.replace(config, evaluation=chosen, data=trusted)
    dataset = sources.open_searched(config, model.recipe, trained.tokenizer)
    if dataset is None:
        raise ValueError(f"need data to evaluate {path}: name an annotation file (--data)")
    result: Retrieval | Accuracy
    if task == "qa":
        result = question_answering(model, dataset, options)
    elif task == "mc":
        result = multiple_choice(model, dataset, options)
    else:
        result = retrieval(model, dataset, options, rerank=rerank)
    if result.broken:
        names = {dataset.row(index).media for index in range(len(dataset))}
        if names <= result.broken.keys():
            name, why = next(iter(result.broken.items()))
            raise TooManyBroken(
                f"none of {len(names)} clips can be read, so there is no result; is the folder of "
                f"the clips right (--media)? The first is {name}: {why}"
            )
    return result
