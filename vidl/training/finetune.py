"""Fine-tuning: what pre-training made goes on with retrieval, or learns to answer questions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vidl.data.dataset import Batch
from vidl.evaluation import Options, question_answering
from vidl.models import Answering, frequent_answers
from vidl.training import parallel, sources
from vidl.training.config import Config
from vidl.training.loop import Training
from vidl.training.runs import ANSWERS, folder_of

TASKS = ("retrieval", "qa")
# What differs from pre-training unless the user says otherwise: nothing is masked but the words of
# MLM, and the rate is that of Singularity (arXiv 2206.03428, appendix).
DEFAULTS = {"model.mask_ratio": 0.0, "optimizer.lr": 1e-5, "run.folder": "finetuned"}
DEFAULTS_OF = {"mac": {"model.word_ratio": 0.0}}


def configuration(
    weights: str | Path, file: str | Path | None = None, overrides: Sequence[str] = ()
) -> Config:
    """The configuration of a fine-tuning: that of the run it begins with, and what differs.

    Args:
        weights: the run, or one of its checkpoints.
        file, overrides: as `Config.read` has them; they are stronger than `DEFAULTS`, and these
            than the run's own values.

    Raises:
        ValueError: there is no such run, or the configuration is not one.
    """
    folder = folder_of(weights)
    base = Config.read(folder / "config.yaml").values() | DEFAULTS
    base |= DEFAULTS_OF.get(base["model.name"], {})
    base |= {"start.model": str(weights), "start.vision": None, "start.text": None}
    base |= {"data.tokenizer": str(folder / "tokenizer.json")}
    return Config.read(file, overrides, base)


def finetune(task: str, config: Config, *, answers: int = 1500) -> dict[str, Any]:
    """Train what is at `config.start.model` on.

    The loop is that of `pretrain`, and resumes as it does. For "qa" the rows are questions, and the
    fusion encoder gets a classifier of their most frequent answers, as `vidl.models.Answering`
    has it; these are kept in the run's answers.json.

    Args:
        task: "retrieval" or "qa".
        config: of `configuration`.
        answers: of "qa", how many can be given.

    Returns:
        As `pretrain`.

    Raises:
        ValueError: there is no such task, the model cannot learn it, or as `pretrain`.
    """
    if task not in TASKS:
        raise ValueError(f"need a task among {', '.join(TASKS)}, got {task!r}")
    with parallel.ranks(config.run.device) as ranks:
        if task == "retrieval":
            return Training(config, ranks).run()
        return Questions(config, ranks, answers).run()


class Questions(Training):
    """A run that learns to answer questions."""

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
            kept.write_text(json.dumps(self.answers))
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
    """The accuracy of a run's answers on what its configuration names, in percent."""
    config = training.config
    dataset = sources.open_searched(config, training.recipe, training.tokenizer)
    assert dataset is not None  # there are evaluation.files
    options = Options(batch_size=config.data.batch_size, dtype=training.dtype, quiet=True)
    return {"accuracy": question_answering(training.whole_model(), dataset, options).accuracy}
