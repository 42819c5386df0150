"""Load and evaluate the model of a run."""

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vidl import models
from vidl.data.dataset import TooManyBroken
from vidl.data.text import Tokenizer, load_tokenizer
from vidl.evaluation import (
    Accuracy,
    CaptionScores,
    Options,
    Retrieval,
    captioning,
    multiple_choice,
    pairs_of_clips,
    question_answering,
    retrieval,
)
from vidl.files import replaced
from vidl.models import Answering, Answers, Captioning, Pairing, Ranking, System
from vidl.models.captioning import BEAMS
from vidl.training import checkpoints, parallel, sources
from vidl.training.config import Config, Text

ANSWERS = "answers.json"
DECODER = "decoder.json"
PAIR = "pair.json"
# How a model answers questions: by a classifier, or by a decoder that ranks answers.
FORMS = ("classifier", "ranking")
# The text that each task needs of moving_shapes, as data.task.
TEXTS: dict[str, Text] = {
    "retrieval": "caption", "mc": "choice", "qa": "question", "caption": "caption", "pair": "pair",
}  # fmt: skip
# The models of tasks with layers of their own, which `vidl finetune` adds.
FINETUNED: dict[str, Any] = {"qa": Answers, "caption": Captioning, "pair": Pairing}


@dataclass(frozen=True)
class AnswerForm:
    """How a model answers questions.

    Attributes:
        name: "classifier" or "ranking".
        layers, top: of `vidl.models.Ranking`; a classifier has neither.
        soft: whether several people answered some of the training questions, so that the targets
            are soft; a run finds it in its data.

    Raises:
        ValueError: unknown name, layers or top is not a positive integer, or soft no boolean.
    """

    name: str = "classifier"
    layers: int = 3
    top: int = 128
    soft: bool = False

    def __post_init__(self) -> None:
        if self.name not in FORMS:
            raise ValueError(f"need a form among {', '.join(FORMS)}, got {self.name!r}")
        for name in ("layers", "top"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"need {name} >= 1 of the ranking decoder, got {value!r}")
        if not isinstance(self.soft, bool):
            raise ValueError(f"need soft as true or false, got {self.soft!r}")

    def __str__(self) -> str:
        if self.name == "classifier":
            return self.name
        return f"{self.name}, layers={self.layers} and top={self.top}"


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """How captions are written; see `vidl.evaluation.captioning`."""

    words: int | None = None
    beams: int = BEAMS
    length_penalty: float = 1.0


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model with its tokenizer and configuration.

    Attributes:
        model: a model of `vidl.models`; `Answering` or `Ranking` if the run has answers,
            `Captioning` if it has a decoder of captions, `Pairing` if it compares two clips.
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
    model = models.MODELS[config.model.name].model(recipe)
    if (folder / ANSWERS).is_file():
        model = answering(model, *read_answers(folder), tokenizer)
    elif (folder / DECODER).is_file():
        model = Captioning(model, tokenizer, layers=read_layers(folder))
    elif (folder / PAIR).is_file():
        model = Pairing(model)
    model.load_state_dict(checkpoints.weights_of(path))
    return Trained(model.to(device).eval(), tokenizer, config)


def answering(model: Any, form: AnswerForm, answers: list[str], tokenizer: Tokenizer) -> Answers:
    """The model with the layers that give an answer."""
    if form.name == "ranking":
        return Ranking(model, answers, tokenizer, layers=form.layers, top=form.top)
    return Answering(model, answers)


def read_answers(folder: Path) -> tuple[AnswerForm, list[str]]:
    """The form and the answers of a run for question answering, as `write_answers` stored them.

    Raises:
        ValueError: the file has something else.
    """
    kept = json.loads((folder / ANSWERS).read_text())
    try:
        form = kept["form"]
        soft = form.get("soft", False)
        return AnswerForm(form["name"], form["layers"], form["top"], soft), kept["answers"]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"need an object of form (name {' or '.join(FORMS)}, layers and top) and answers in "
            f"{folder / ANSWERS}, got {kept!r:.80}"
        ) from None


def write_answers(folder: Path, form: AnswerForm, answers: list[str]) -> None:
    """Store the form and the answers of a run, atomically."""
    with replaced(folder / ANSWERS) as unfinished:
        unfinished.write_text(json.dumps({"form": asdict(form), "answers": answers}))


def read_layers(folder: Path) -> int:
    """The layers of the decoder of a run for captions, as `write_layers` stored them.

    Raises:
        ValueError: the file has something else.
    """
    kept = json.loads((folder / DECODER).read_text())
    layers = kept.get("layers") if isinstance(kept, dict) else None
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ValueError(
            f"need an object with layers of 1 or more in {folder / DECODER}, got {kept!r:.80}"
        )
    return layers


def write_layers(folder: Path, layers: int) -> None:
    """Store the layers of the decoder of a run, atomically."""
    with replaced(folder / DECODER) as unfinished:
        unfinished.write_text(json.dumps({"layers": layers}))


def write_pair(folder: Path) -> None:
    """Mark a run for pairs of clips, atomically."""
    with replaced(folder / PAIR) as unfinished:
        unfinished.write_text(json.dumps({"clips": 2}))


def evaluate(
    path: str | Path,
    task: str,
    data: tuple[str | Path, str | Path | None] | None,
    ranks: parallel.Ranks,
    options: Options,
    rerank: int = 0,
    *,
    caption: CaptionOptions = CaptionOptions(),  # noqa: B008  (it is frozen)
    outside: bool = False,
) -> Retrieval | Accuracy | CaptionScores:
    """Evaluate the model of a run.

    Args:
        path: see `open_run`.
        task: "retrieval", "mc", "qa", "caption" or "pair".
        data: annotation file and the folder of its media; None: the synthetic evaluation set of
            moving_shapes. Files that the run's configuration names are not read: the run may be
            that of a stranger.
        ranks: this rank.
        options: batches, masks, pruning.
        rerank: see `vidl.evaluation.retrieval`.
        caption: how captions are written.
        outside: see `vidl.data.annotations.Annotations`.

    Raises:
        ValueError: unknown task, no such run, its model does not support the task, or there are no
            data.
        TooManyBroken: no clip at all can be read; the folder is probably wrong.
    """
    if task not in TEXTS:
        raise ValueError(f"need a task among {', '.join(TEXTS)}, got {task!r}")
    trained = open_run(path, ranks.device)
    model, config = trained.model, trained.config
    if not isinstance(model, FINETUNED.get(task, System)):
        needed = f"a run of `vidl finetune {task}`" if task in FINETUNED else f"a run for {task}"
        raise ValueError(f"need {needed}, got {type(model).__name__} at {path}")
    file, media = data or (None, None)
    chosen = dataclasses.replace(
        config.evaluation,
        files=[] if file is None else [str(file)],
        media=None if media is None else str(media),
    )
    source = dataclasses.replace(config.data, outside=outside, task=TEXTS[task])
    config = dataclasses.replace(config, evaluation=chosen, data=source)
    dataset = sources.open_searched(config, model.recipe, trained.tokenizer, task=task)
    if dataset is None:
        raise ValueError(f"need data to evaluate {path}: name an annotation file (--data)")
    result: Retrieval | Accuracy | CaptionScores
    if task == "qa":
        result = question_answering(model, dataset, options)
    elif task == "caption":
        result = captioning(model, dataset, options, **vars(caption))
    elif task == "pair":
        result = pairs_of_clips(model, dataset, options)
    elif task == "mc":
        result = multiple_choice(model, dataset, options)
    else:
        result = retrieval(model, dataset, options, rerank=rerank)
    if result.broken:
        rows = map(dataset.row, range(len(dataset)))
        names = {name for row in rows for name in (row.media, row.second) if name is not None}
        if names <= result.broken.keys():
            name, why = next(iter(result.broken.items()))
            raise TooManyBroken(
                f"none of {len(names)} clips can be read, so there is no result; is the folder of "
                f"the clips right (--media)? The first is {name}: {why}"
            )
    return result
