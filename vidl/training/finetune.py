"""Fine-tuning of a pre-trained model for retrieval or question answering."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vidl.data.dataset import Batch
from vidl.evaluation import Options, question_answering
from vidl.files import replaced
from vidl.models import Answering, frequent_answers
from vidl.training import parallel, sources
from vidl.training.config import Config
from vidl.training.frozen import frozen
from vidl.training.lock import locked
from vidl.training.loop import Training
from vidl.training.runs import ANSWERS, folder_of

TASKS = ("retrieval", "qa")
# Defaults that differ from the pre-training run: no visual mask, and the learning rate of
# Singularity (arXiv 2206.03428, appendix).
DEFAULTS = {"model.mask_ratio": 0.0, "optimizer.lr": 1e-5, "run.folder": "finetuned"}
DEFAULTS_OF = {"mac": {"model.word_ratio": 0.0}}
# Fields that a run never hands on: the run of a stranger must not choose what is read here.
SOURCES = (
    "data.source", "data.files", "data.media", "data.outside", "evaluation.files",
    "evaluation.media",
)  # fmt: skip


def configuration(
    weights: str | Path, file: str | Path | None = None, overrides: Sequence[str] = ()
) -> Config:
    """The configuration of a fine-tuning run, based on that of the pre-training run.

    The data are named anew: files and folders of the pre-training run are not taken over.

    Args:
        weights: the pre-training run or one of its checkpoints.
        file, overrides: see `Config.read`; they take precedence over `DEFAULTS`, and `DEFAULTS`
            over the values of the pre-training run.

    Raises:
        ValueError: no such run, or the configuration is invalid.
    """
    folder = folder_of(weights)
    base = Config.read(folder / "config.yaml").values() | DEFAULTS
    synthetic = base["data.source"] == "moving_shapes"
    base = {name: value for name, value in base.items() if name not in SOURCES}
    if synthetic:
        base["data.source"] = "moving_shapes"
    base |= DEFAULTS_OF.get(base["model.name"], {})
    base |= {"start.model": str(weights), "start.vision": None, "start.text": None}
    base |= {"data.tokenizer": str(folder / "tokenizer.json")}
    return Config.read(file, overrides, base)


def finetune(task: str, config: Config, *, answers: int = 1500) -> dict[str, Any]:
    """Fine-tune the model at `config.start.model`.

    The loop is that of `pretrain`, and so is resumption. For "qa" the rows are questions, and the
    model becomes a `vidl.models.Answering` with the most frequent answers; they are saved in the
    run's answers.json.

    Args:
        task: "retrieval" or "qa".
        config: from `configuration`.
        answers: size of the answer set of "qa".

    Returns:
        See `pretrain`.

    Raises:
        ValueError: unknown task, the model does not support it, or see `pretrain`.
    """
    if task not in TASKS:
        raise ValueError(f"need a task among {', '.join(TASKS)}, got {task!r}")
    folder = Path(config.run.folder)
    with parallel.ranks(config.run.device) as ranks, locked(folder, ranks), frozen(folder, ranks):
        if task == "retrieval":
            return Training(config, ranks).run()
        return Questions(config, ranks, answers).run()


class Questions(Training):
    """A fine-tuning run for question answering."""

    def __init__(self, config: Config, ranks: parallel.Ranks, most: int) -> None:
        folder = Path(config.run.folder)
        kept = folder / ANSWERS
        if kept.is_file():
            self.answers = json.loads(kept.read_text())
        else:
            rows = sources.annotated(config)
            self.answers = frequent_answers((row.answer for row in rows), most)
        super().__init__(config, ranks, accuracy if config.evaluation.files else None)
        if ranks.first and not kept.is_file():
            with replaced(kept) as unfinished:
                unfinished.write_text(json.dumps(self.answers))
        ranks.wait()

    def new_model(self) -> Answering:
        return Answering(super().new_model(), self.answers)

    def begin_with(self, model: nn.Module, weights: dict[str, Any]) -> None:
        whole: Any = model
        answered = any(name.startswith("head.") for name in weights)
        super().begin_with(whole if answered else whole.model, weights)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        numbers = self.model.numbers(row.answer for row in batch.rows)
        return super()._inputs(batch) | {"answers": numbers.to(self.ranks.device)}


def accuracy(training: Any) -> dict[str, float]:
    """The accuracy on the evaluation set of the configuration, in percent."""
    config = training.config
    dataset = sources.open_searched(config, training.recipe, training.tokenizer)
    assert dataset is not None  # the caller checks evaluation.files
    options = Options(batch_size=config.data.batch_size, dtype=training.dtype, quiet=True)
    return {"accuracy": question_answering(training.whole_model(), dataset, options).accuracy}
