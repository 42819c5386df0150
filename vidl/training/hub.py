"""Trained models on the Hugging Face Hub, by the mixin of huggingface_hub."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors.torch import save_file

from vidl import models
from vidl.models.summary import Cost
from vidl.training import checkpoints
from vidl.training.config import Config
from vidl.training.runs import ANSWERS, folder_of, open_run

# What a run has besides weights, and its copy needs.
COPIED = ("tokenizer.json", ANSWERS)
STARTS = ("start.model", "start.vision", "start.text")


class Published(  # type: ignore[call-arg]  # mypy does not follow the import of the mixin
    ModelHubMixin, library_name="vidl", tags=["video", "video-text-retrieval"]
):
    """A trained model that is published on the Hub: `push_to_hub` and `from_pretrained`.

    `push_to_hub("user/name")` uploads the weights of the newest checkpoint, the tokenizer, the
    configuration without the paths of this machine, and a card with what the run recorded.
    `save_pretrained(folder)` writes the same files. `from_pretrained` takes the name of a
    repository or such a folder, as every command takes it for `--weights`.

    Args:
        run: folder of a run, one of its checkpoints, or a published folder.

    Attributes:
        trained: the model, its tokenizer and its configuration, see `vidl.training.Trained`.
        folder: folder of the run.

    Raises:
        ValueError: no such run, or it has no checkpoint yet.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.folder, self.trained = run, folder_of(run), open_run(run)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "Published":
        if Path(model_id).is_dir():
            return cls(Path(model_id))
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        given = {name: options[name] for name in known if name in options}
        return cls(Path(snapshot_download(model_id, **given)))

    def _save_pretrained(self, save_directory: Path) -> None:
        save_file(checkpoints.weights_of(self.run), save_directory / checkpoints.WEIGHTS)
        for name in COPIED:
            if (self.folder / name).is_file():
                (save_directory / name).write_bytes((self.folder / name).read_bytes())
        self._public().save(save_directory / "config.yaml")
        # Only for the Hub, which counts downloads by it; vidl reads config.yaml.
        recipe = {n: str(x) for n, x in dataclasses.asdict(self.trained.model.recipe).items()}
        about = {"library_name": "vidl", "system": self.trained.config.model.name, **recipe}
        (save_directory / "config.json").write_text(json.dumps(about, indent=1) + "\n")

    def _public(self) -> Config:
        """The configuration without folders of this machine."""
        values = self.trained.config.values()
        for name in ("data.files", "evaluation.files"):
            values[name] = [Path(file).name for file in values[name]]
        for name in ("data.media", "evaluation.media", "data.tokenizer", *STARTS):
            values[name] = None
        return Config.of(values | {"run.folder": self.folder.name, "data.outside": False})

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card: how to load the model, its data, cost and retrieval, and its configuration."""
        return ModelCard("\n".join(_card(self)))


def _card(published: Published) -> list[str]:
    trained, config = published.trained, published.trained.config
    recipe: Any = trained.model.recipe
    about = models.MODELS[config.model.name].model.card
    lines = ["---", "library_name: vidl", "tags: [video, video-text-retrieval, vidl]", "---", ""]
    lines += [f"# {about.title}, {config.model.preset}", ""]
    lines += [f"{about.features}; {about.architecture} ([paper](https://arxiv.org/abs/"
              f"{about.arxiv})), trained with vidl.", ""]  # fmt: skip
    lines += ["```python", "from vidl.training.hub import Published", ""]
    lines += ['published = Published.from_pretrained("NAMESPACE/NAME")']
    lines += ["model, tokenizer = published.trained.model, published.trained.tokenizer", "```", ""]
    lines += ["## Training", "", *_training(published), ""]
    lines += ["## Cost of a clip", "", *_costs(recipe, config), ""]
    if measured := _evaluation(published.folder):
        lines += ["## Evaluation", "", *measured, ""]
    fields = {n: getattr(recipe, n) for n in sorted(config.model.recipe)}
    if fields:
        lines += ["## Choices", "", "Fields of the recipe that differ from the preset:", ""]
        lines += [f"- `{name}: {value}`" for name, value in fields.items()]
    return lines


def _training(published: Published) -> list[str]:
    config = published.trained.config
    files = [Path(file).name for file in config.data.files]
    data = "moving_shapes (synthetic)" if config.data.source == "moving_shapes" else ""
    rows = {"data": data or f"{config.data.source}: {', '.join(files)}"}
    rows |= {"steps": f"{config.schedule.steps:,}", "optimizer": config.optimizer.name}
    rows |= {"learning rate": f"{config.optimizer.lr:g}", "seed": str(config.run.seed)}
    records = [r for r in _records(published.folder) if "seconds_per_step" in r]
    if records:
        clips = config.data.batch_size * config.optimizer.accumulate
        last = records[-1]
        ranks = max(1, round(last["clips_per_second"] * last["seconds_per_step"] / clips))
        steps = [0, *(record["step"] for record in records)]
        seconds = sum(
            record["seconds_per_step"] * (step - before)
            for record, before, step in zip(records, steps, steps[1:], strict=False)
        )
        rows |= {"clips of a step": f"{clips * ranks:,} on {ranks} process(es)"}
        rows |= {"hours x processes": f"{seconds * ranks / 3600:.2f}"}
        rows |= {"final loss": f"{last['loss']:.4f}"}
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _costs(recipe: Any, config: Config) -> list[str]:
    model = models.MODELS[config.model.name].model(recipe)
    costs: dict[str, Cost] = models.summarize(model, words=config.data.words).costs
    lines = ["| | tokens | GFLOP, forward and backward |", "|---|---|---|"]
    for name, cost in costs.items():
        tokens = ", ".join(f"{stage} {count}" for stage, count in cost.tokens.items())
        flops = (cost.forward_flops + cost.backward_flops) / 1e9
        lines.append(f"| {name} | {tokens} | {flops:.2f} |")
    return lines


def _evaluation(folder: Path) -> list[str]:
    records = [r for r in _records(folder) if any(n.startswith("evaluation/") for n in r)]
    if not records:
        return []
    values = {n.partition("/")[2]: v for n, v in records[-1].items() if n.startswith("evaluation/")}
    shown = [(n, f"{v:.1f}" if isinstance(v, float) else str(v)) for n, v in values.items()]
    rows = [f"| {name} | {value} |" for name, value in shown]
    return [f"At step {records[-1]['step']}:", "", "| metric | value |", "|---|---|", *rows]


def _records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "log.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]
