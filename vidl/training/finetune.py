"""Fine-tuning of a pre-trained model for retrieval, questions, captions or pairs of clips."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vidl.data.dataset import Batch, ClipSet
from vidl.evaluation import Options, captioning, pairs_of_clips, question_answering
from vidl.models import Answers, Captioning, Pairing, Ranking, frequent_answers
from vidl.training import parallel, sources
from vidl.training.config import Config
from vidl.training.frozen import frozen
from vidl.training.lock import locked
from vidl.training.loop import Training
from vidl.training.runs import (
    ANSWERS,
    DECODER,
    TEXTS,
    AnswerForm,
    answering,
    folder_of,
    read_answers,
    read_layers,
    write_answers,
    write_layers,
    write_pair,
)

TASKS = ("retrieval", "qa", "caption", "pair")
# Defaults that differ from the pre-training run: no visual mask, and the learning rate of
# Singularity (arXiv 2206.03428, appendix).
DEFAULTS = {"model.mask_ratio": 0.0, "optimizer.lr": 1e-5, "run.folder": "finetuned"}
DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "mac": {"model.word_ratio": 0.0},
    "alpro": {"model.pem": 0.0},
    "omnivl": {"model.queue": 0},
}
# Fields that a run never hands on: the run of a stranger must not choose what is read here.
SOURCES = (
    "data.source", "data.files", "data.media", "data.outside", "evaluation.files",
    "evaluation.media",
)  # fmt: skip


def configuration(
    weights: str | Path,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    task: str = "retrieval",
) -> Config:
    """The configuration of a fine-tuning run, based on that of the pre-training run.

    The data are named anew: files and folders of the pre-training run are not taken over.

    Args:
        weights: the pre-training run or one of its checkpoints.
        file, overrides: see `Config.read`; they take precedence over `DEFAULTS`, and `DEFAULTS`
            over the values of the pre-training run.
        task: see `finetune`.

    Raises:
        ValueError: unknown task, no such run, or the configuration is invalid.
    """
    _check_task(task)
    folder = folder_of(weights)
    base = Config.read(folder / "config.yaml").values() | DEFAULTS
    synthetic = base["data.source"] == "moving_shapes"
    base = {name: value for name, value in base.items() if name not in SOURCES}
    if synthetic:
        base["data.source"] = "moving_shapes"
    base |= DEFAULTS_OF.get(base["model.name"], {})
    base |= {"start.model": str(weights), "start.vision": None, "start.text": None}
    base["start.teacher"] = None
    base |= {"data.tokenizer": str(folder / "tokenizer.json"), "data.task": TEXTS[task]}
    return Config.read(file, overrides, base)


def finetune(
    task: str,
    config: Config,
    *,
    answers: int = 1500,
    form: str = "classifier",
    layers: int = 3,
    top: int = 128,
) -> dict[str, Any]:
    """Fine-tune the model at `config.start.model`.

    The loop is that of `pretrain`, and so is resumption. For "qa" the rows are questions, and the
    model becomes a `vidl.models.Answering` or a `vidl.models.Ranking` with the most frequent
    answers; the form and the answers are saved in the run's answers.json. If some rows have the
    answers of several people, the targets are soft; see `Answers.targets`. For "caption" it becomes
    a `vidl.models.Captioning`, whose number of layers is saved in the run's decoder.json. For
    "pair" the rows have two clips, a caption and a label, and it becomes a `vidl.models.Pairing`.

    Args:
        task: "retrieval", "qa", "caption" or "pair".
        config: from `configuration`.
        answers: size of the answer set of "qa".
        form: how "qa" answers: "classifier" or "ranking".
        layers: layers of the decoder of "caption", and of "qa" with the form "ranking".
        top: number of answers that a ranking scores by all of their words.

    Returns:
        See `pretrain`.

    Raises:
        ValueError: unknown task or form, the model does not support it, the run that is resumed has
            another form, other layers or top, captions are longer than the decoder, or see
            `pretrain`.
    """
    _check_task(task)
    asked = AnswerForm(form, layers, top) if task == "qa" else AnswerForm()
    sources.require_text(config, TEXTS[task])
    folder = Path(config.run.folder)
    with parallel.ranks(config.run.device) as ranks, locked(folder, ranks), frozen(folder, ranks):
        if task == "retrieval":
            return Training(config, ranks).run()
        if task == "caption":
            return Captions(config, ranks, layers).run()
        if task == "pair":
            return Pairs(config, ranks).run()
        return Questions(config, ranks, answers, asked).run()


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"need a task among {', '.join(TASKS)}, got {task!r}")


class Heads(Training):
    """A fine-tuning run whose model has layers for a task."""

    def begin_with(self, model: Any, weights: dict[str, Any]) -> None:
        """Load the weights of a pre-training run, or of a run for the same task."""
        tuned = any(name.startswith("model.") for name in weights)
        super().begin_with(model if tuned else model.model, weights)
        if isinstance(model, (Ranking, Captioning)) and not tuned:
            model.start_decoder()


class Questions(Heads):
    """A fine-tuning run for question answering."""

    def __init__(self, config: Config, ranks: parallel.Ranks, most: int, form: AnswerForm) -> None:
        folder = Path(config.run.folder)
        kept = (folder / ANSWERS).is_file()
        if kept:
            self.form, self.answers = read_answers(folder)
        else:
            soft = False

            def given() -> Iterator[Any]:
                nonlocal soft
                for answer in sources.training_answers(config):
                    soft = soft or isinstance(answer, tuple)
                    yield answer

            self.answers = frequent_answers(given(), most)
            self.form = dataclasses.replace(form, soft=soft)
        if str(self.form) != str(form):
            raise ValueError(
                f"{folder} has a run with form {self.form}: need the same to resume it, or another "
                f"run.folder, got {form}"
            )
        super().__init__(config, ranks, accuracy if evaluated(config) else None)
        if ranks.first and not kept:
            write_answers(folder, self.form, self.answers)
        ranks.wait()

    def new_model(self) -> Answers:
        return answering(super().new_model(), self.form, self.answers, self.tokenizer)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        wanted = self.model.targets if self.form.soft else self.model.numbers
        answers = wanted(row.given for row in batch.rows)
        return super()._inputs(batch) | {"answers": answers.to(self.ranks.device)}


class Captions(Heads):
    """A fine-tuning run for captions."""

    def __init__(self, config: Config, ranks: parallel.Ranks, layers: int) -> None:
        folder = Path(config.run.folder)
        kept = read_layers(folder) if (folder / DECODER).is_file() else None
        if kept not in (None, layers):
            raise ValueError(
                f"{folder} has a run with layers={kept}: need the same to resume it, or another "
                f"run.folder, got {layers}"
            )
        self.layers = layers
        super().__init__(config, ranks, scores if evaluated(config) else None)
        if ranks.first and kept is None:
            write_layers(folder, layers)
        ranks.wait()

    def new_model(self) -> Captioning:
        model = Captioning(super().new_model(), self.tokenizer, layers=self.layers)
        if self.config.data.words > model.longest:
            raise ValueError(
                f"need data.words <= {model.longest}, the positions of the decoder, got "
                f"{self.config.data.words}"
            )
        return model


class Pairs(Heads):
    """A fine-tuning run for sentences about two clips."""

    def __init__(self, config: Config, ranks: parallel.Ranks) -> None:
        if config.data.source == "shards":
            raise ValueError("need data.source clips or moving_shapes for pairs, got shards")
        super().__init__(config, ranks, pair_accuracy if evaluated(config) else None)
        if ranks.first:
            write_pair(Path(config.run.folder))
        ranks.wait()

    def new_model(self) -> Pairing:
        return Pairing(super().new_model())

    def _example(self) -> dict[str, Any]:
        example = super()._example()
        return example | {"video": example["video"].repeat(1, 1, 2, 1, 1)}

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        labels = torch.tensor([bool(row.label) for row in batch.rows])
        return super()._inputs(batch) | {"labels": labels.to(self.ranks.device)}


def evaluated(config: Config) -> bool:
    """Whether the configuration has an evaluation set."""
    return bool(config.evaluation.files) or config.data.source == "moving_shapes"


def accuracy(training: Any) -> dict[str, float]:
    """The accuracy on the evaluation set of the configuration, in percent."""
    dataset, options = _evaluation_set(training, "qa")
    return {"accuracy": question_answering(training.whole_model(), dataset, options).accuracy}


def pair_accuracy(training: Any) -> dict[str, float]:
    """The accuracy on the pairs of the evaluation set of the configuration, in percent."""
    dataset, options = _evaluation_set(training, "pair")
    return {"accuracy": pairs_of_clips(training.whole_model(), dataset, options).accuracy}


def scores(training: Any) -> dict[str, float]:
    """The metrics of greedy captions of the evaluation set of the configuration."""
    dataset, options = _evaluation_set(training, "caption")
    return captioning(training.whole_model(), dataset, options, beams=1).numbers()


def _evaluation_set(training: Any, task: str) -> tuple[ClipSet, Options]:
    config = training.config
    dataset = sources.open_searched(config, training.recipe, training.tokenizer, task=task)
    assert dataset is not None  # the caller checks that there is one
    return dataset, Options(batch_size=config.data.batch_size, dtype=training.dtype, quiet=True)
