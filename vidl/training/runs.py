"""The model of a run, as its newest checkpoint has it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vidl import models
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
    """What a run made, and by which configuration.

    Attributes:
        model: of `vidl.models`; `Answering` if the run has answers.
        tokenizer: of its captions.
        config: of the run.
    """

    model: Any
    tokenizer: Tokenizer
    config: Config


def folder_of(path: str | Path) -> Path:
    """The folder of a run, of which this is one, or one of its checkpoints.

    Raises:
        ValueError: it is neither.
    """
    path = Path(path)
    for folder in (path, *path.resolve().parents[1:2]):
        if (folder / "config.yaml").is_file() and (folder / "tokenizer.json").is_file():
            return folder
    raise ValueError(
        f"need the folder of a run, or one of its checkpoints, with config.yaml and tokenizer.json "
        f"in that folder, got {path}"
    )


def open_run(path: str | Path, device: torch.device | str = "cpu") -> Trained:
    """Load the model of a run.

    Args:
        path: its folder: the newest checkpoint; or one of its checkpoints.
        device: where to put the model.

    Raises:
        ValueError: there is no such run, or it has no checkpoint yet.
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
) -> Retrieval | Accuracy:
    """Evaluate the model of a run.

    Args:
        path: as `open_run` has it.
        task: "retrieval", "mc" or "qa".
        data: annotations, and the folder of their media; None: what the run's configuration names.
        ranks: of which this is one.
        options: of the evaluation.
        rerank: as `vidl.evaluation.retrieval` has it.

    Raises:
        ValueError: there is no such run, or it cannot do the task.
    """
    trained = open_run(path, ranks.device)
    model, config = trained.model, trained.config
    if (task == "qa") != isinstance(model, Answering):
        needed = "a run of `vidl finetune qa`" if task == "qa" else f"a run for {task}"
        raise ValueError(f"need {needed}, got {type(model).__name__} at {path}")
    if data is not None:
        media = None if data[1] is None else str(data[1])
        chosen = dataclasses.replace(config.evaluation, files=[str(data[0])], media=media)
        config = dataclasses.replace(config, evaluation=chosen)
    dataset = sources.open_searched(config, model.recipe, trained.tokenizer)
    if dataset is None:
        raise ValueError(f"need data to evaluate: {path} names none under evaluation.files")
    if task == "qa":
        return question_answering(model, dataset, options)
    if task == "mc":
        return multiple_choice(model, dataset, options)
    return retrieval(model, dataset, options, rerank=rerank)
