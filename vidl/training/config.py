"""The configuration of a run: a YAML file and `section.field=value` overrides."""

import dataclasses
import inspect
import shutil
import textwrap
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from vidl import models
from vidl import overrides as grammar
from vidl.data.augment import Augment
from vidl.files import replaced
from vidl.models import Recipe
from vidl.models.recipe import types_of
from vidl.training.trackers import Tracker

# What the rows of moving_shapes have.
Text = Literal["caption", "question", "choice", "pair"]


def _field(default: Any, about: str) -> Any:
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata={"about": about})
    return dataclasses.field(default=default, metadata={"about": about})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The model. Any field of its recipe may be set in this section too."""

    name: str = _field("smaug", "a model of `vidl systems`")
    preset: str = _field("tiny", "tiny (trains on a CPU), small, base, or another of the model")
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Initial weights: safetensors or a state_dict from torch.save (default: random weights)."""

    model: str | None = _field(
        None, "all weights: folder of a run, a checkpoint or a file of weights"
    )
    vision: str | None = _field(
        None,
        "vision encoder: weights of ViT, DeiT, MAE or CLIP (clipbert: a ResNet of timm or "
        "torchvision); or hf-hub:REPOSITORY",
    )
    text: str | None = _field(
        None,
        "text encoder: weights of BERT or DistilBERT, or a repository such as bert-base-uncased; "
        "needs their data.tokenizer",
    )
    teacher: str | None = _field(
        None, "alpro: a run of alpro, frozen, that tells which entities a part of a clip shows"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Training data. model.frames and model.image_size set the size of a clip."""

    source: Literal["clips", "shards", "datasets", "moving_shapes"] = _field(
        "clips",
        "clips (annotation files), shards (webdataset), datasets (streamed by Hugging Face "
        "datasets) or moving_shapes (synthetic)",
    )
    files: list[str] = _field(
        [],
        "annotations (.arrow, .json, .csv, folders), shards (.tar), or for datasets: tables "
        "(.parquet, .arrow, .jsonl, .csv, .tar), a folder, or hf-hub:USER/NAME; globs of files",
    )
    subset: str | None = _field(None, "datasets: subset (configuration) of a folder or repository")
    split: str | None = _field(None, "datasets: split of a folder or repository; default: train")
    columns: dict[str, str] = _field(
        {}, "datasets: the columns of fields, e.g. {video: clip, caption: description}"
    )
    buffer: int = _field(
        1000, "shards and datasets: encoded clips that a worker keeps in memory to shuffle them"
    )
    media: str | None = _field(None, "folder of the clips; default: beside each annotation file")
    outside: bool = _field(
        False, "annotations may name files outside the folder of the clips; only if you trust them"
    )
    tokenizer: str | None = _field(
        None,
        "tokenizer.json, vocab.txt or a repository of the Hub; default: built from captions",
    )
    words: int = _field(32, "tokens of a caption, including [CLS] and [SEP]")
    batch_size: int = _field(16, "clips of one forward pass on one rank")
    workers: int = _field(2, "loader processes on each rank; 0: the training process")
    decoder: str = _field("auto", "pyav, torchcodec or auto")
    sampling: Literal["spans", "rate", "headtail"] = _field(
        "spans",
        "frames of a video: one of each equal span; at a fixed rate (data.rate); or half of each "
        "half, in training",
    )
    rate: float = _field(7.5, "frames per second of data.sampling=rate")
    cache: bool = _field(
        False, "decode each clip once and keep its frames, downscaled, in $VIDL_CACHE"
    )
    flip: bool = _field(
        True, "flip half of the clips, except those whose caption says left or right"
    )
    scale: tuple[float, float] = _field((0.5, 1.0), "smallest and largest area of a random crop")
    augment: Augment = _field(
        "none",
        "randaugment, trivialaugment or jitter (torchvision), the same for all frames of a clip; "
        "none",
    )
    broken: float = _field(0.1, "stop if a larger share of the clips cannot be read")
    match: Literal["clip", "caption"] = _field(
        "clip", "samples with the same clip, or caption, are not negatives of each other"
    )
    clips: int = _field(10_000, "moving_shapes: clips of an epoch")
    task: Text = _field(
        "caption", "moving_shapes: the text of a clip; `vidl finetune` and `eval` set it"
    )
    difficulty: int = _field(1, "moving_shapes: 1, 2 or 3")
    looks: int = _field(0, "moving_shapes: different coloured shapes in a batch; 0: no limit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW or Muon. No weight decay on norms, biases, positions, tokens and temperature."""

    name: Literal["adamw", "muon"] = _field(
        "adamw", "adamw; muon: Muon for weight matrices, AdamW for embeddings and the rest"
    )
    lr: float = _field(1e-4, "peak learning rate")
    betas: tuple[float, float] = _field((0.9, 0.98), "betas of AdamW")
    eps: float = _field(1e-8, "eps of AdamW")
    weight_decay: float = _field(0.05, "weight decay, of the parameters that decay")
    clip: float = _field(1.0, "maximal gradient norm; 0: no clipping")
    factors: dict[str, float] = _field(
        {},
        "learning rates of parts of the model, as factors of lr by the beginnings of the names of "
        "parameters, e.g. {vision: 0.1, matches: 5}; 0 freezes a part; the longest name counts",
    )
    accumulate: int = _field(
        1, "batches of a step; contrastive negatives come from one batch of all ranks"
    )
    chunk: int = _field(
        0,
        "clips encoded at a time, for contrastive batches larger than the memory: the same "
        "gradients for a second forward pass; 0: all of data.batch_size",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of the training, and how learning rate and keep rate change."""

    steps: int = _field(1000, "optimizer steps")
    warmup: int = _field(100, "steps of linear learning rate warm-up")
    final: float = _field(0.01, "learning rate at the end, as a share of the peak")
    prune_over: int = _field(
        0, "steps in which the keep rate falls from 1 to model.keep_rate, as in EViT; 0: none"
    )
    shape: Literal["cosine", "linear", "poly"] = _field(
        "cosine", "decay of the learning rate: cosine, linear, or poly: (1 - progress)^power"
    )
    power: float = _field(1.0, "exponent of shape=poly; 1 is linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Output, device and precision. A run resumes from the newest checkpoint in its folder."""

    folder: str = _field("run", "folder of checkpoints, log.jsonl, config.yaml and tokenizer.json")
    seed: int = _field(0, "seed of weights, data, masks and dropout")
    device: Literal["auto", "cpu", "cuda"] = _field("auto", "cpu, cuda, or auto: cuda if available")
    precision: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", "precision of matmuls; auto: bfloat16 by autocast on cuda, else float32"
    )
    parallel: Literal["ddp", "fsdp"] = _field(
        "ddp", "how the ranks of torchrun share the work; fsdp is FSDP2"
    )
    checkpoint_activations: bool = _field(
        False, "recompute transformer blocks in the backward pass"
    )
    threads: int = _field(0, "CPU threads; 0: PyTorch's default")
    log_every: int = _field(10, "steps between records of the log")
    save_every: int = _field(500, "steps between checkpoints; the last step is always saved")
    keep: int = _field(3, "number of checkpoints to keep")
    resume: int | None = _field(
        None,
        "step of the checkpoint to resume from, e.g. if the newest is damaged; later ones are "
        "renamed; default: the newest",
    )
    trackers: list[Tracker] = _field(
        [], "tensorboard, wandb (offline) or mlflow; several as a list"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Retrieval during and after training; needs files unless data.source is moving_shapes."""

    every: int = _field(0, "steps between evaluations; 0: only at the end")
    files: list[str] = _field([], "annotations of the evaluation set, as in data.files")
    media: str | None = _field(None, "folder of its clips; default: beside each annotation file")
    rerank: int = _field(0, "top results to re-rank with the fusion encoder; 0: none")
    pairs: int = _field(
        100, "moving_shapes: clips of its val set; captions of retrieval differ in the motion only"
    )


SECTIONS: dict[str, type] = {
    "model": Model,
    "start": Start,
    "data": Data,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "evaluation": Evaluation,
    "run": Run,
}
# Sources that are read as a stream, so that their captions are not known in advance.
STREAMS = ("shards", "datasets")
# Fields that may change when a run resumes: they do not affect what is computed.
FREE = ("run.", "evaluation.", "data.workers", "data.broken", "data.media", "data.outside")
NOT_FREE = ("run.seed", "run.precision")
# Recipe fields that the run sets itself: its seed, and the vocabulary of its tokenizer.
GIVEN = ("seed", "vocabulary")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration of a run.

    Raises:
        ValueError: values are out of range or inconsistent.
    """

    model: Model = Model()
    start: Start = Start()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()
    run: Run = Run()

    def __post_init__(self) -> None:
        self.recipe()  # raises its errors
        least = {
            "data.words": 3, "data.batch_size": 1, "data.workers": 0, "data.clips": 1,
            "data.looks": 0,
            "optimizer.lr": 0, "optimizer.clip": 0, "optimizer.accumulate": 1,
            "optimizer.chunk": 0,
            "schedule.steps": 1, "schedule.warmup": 0, "schedule.prune_over": 0,
            "run.threads": 0, "run.log_every": 1, "run.save_every": 1, "run.keep": 1,
            "evaluation.every": 0, "evaluation.rerank": 0, "evaluation.pairs": 1,
        }  # fmt: skip
        values = self.values()
        for name, number in least.items():
            if values[name] < number:
                raise ValueError(f"need {name} >= {number}, got {values[name]}")
        most = {"data.broken": 1, "schedule.final": 1, "data.difficulty": 3}
        for name, number in most.items():
            if not 0 <= values[name] <= number:
                raise ValueError(f"need {name} from 0 to {number}, got {values[name]}")
        if not 0 < self.data.scale[0] <= self.data.scale[1] <= 1:
            raise ValueError(
                f"need data.scale as two ascending shares of the area above 0, up to 1, got "
                f"{list(self.data.scale)}"
            )
        chunk = self.optimizer.chunk
        if chunk and self.data.batch_size % chunk:
            raise ValueError(
                f"need data.batch_size as a multiple of optimizer.chunk={chunk}, got "
                f"{self.data.batch_size}"
            )
        if self.data.source != "moving_shapes" and not self.data.files:
            raise ValueError(f"need data.files with data.source {self.data.source!r}, got none")
        if not self.data.rate > 0:
            raise ValueError(f"need data.rate > 0, got {self.data.rate}")
        if self.data.source == "moving_shapes" and self.data.sampling != "spans":
            raise ValueError(
                "need data.sampling=spans with data.source=moving_shapes, whose frames are drawn, "
                f"got {self.data.sampling}"
            )
        if self.data.source == "moving_shapes" and self.data.augment != "none":
            raise ValueError(
                "need data.augment=none with data.source moving_shapes, whose captions name "
                f"colours, got {self.data.augment}"
            )
        if self.start.text and not self.data.tokenizer:
            raise ValueError("need data.tokenizer, the tokenizer of start.text")
        if self.schedule.power <= 0:
            raise ValueError(f"need schedule.power > 0, got {self.schedule.power}")
        for name, factor in self.optimizer.factors.items():
            if factor < 0:
                raise ValueError(f"need optimizer.factors >= 0, got {factor} for {name}")
        if self.optimizer.name == "muon" and self.run.parallel == "fsdp":
            raise ValueError(
                "need run.parallel=ddp with optimizer.name=muon: its update needs whole matrices"
            )

    @classmethod
    def read(
        cls,
        file: str | Path | None = None,
        overrides: Sequence[str] = (),
        base: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> "Config":
        """Read a configuration from a file and from `section.field=value` overrides.

        Args:
            file: YAML of sections and their fields; None: all defaults.
            overrides: see `vidl.overrides.parse`; they take precedence over the file.
            base: values by their dotted names, in place of the defaults.

        Raises:
            ValueError: a section or field is unknown (the message suggests the closest match), or
                a value has another type.
        """
        values = dict(base)
        if file is not None:
            try:
                sections = yaml.safe_load(Path(file).read_text()) or {}
            except (OSError, yaml.YAMLError) as error:
                raise ValueError(f"cannot read {file}: {error}") from None
            if not isinstance(sections, dict):
                raise ValueError(f"{file}: need sections among {', '.join(SECTIONS)}")
            for section, fields in sections.items():
                if not isinstance(fields, dict):
                    raise ValueError(f"{file}: need fields under {section!r}, got {fields!r}")
                values |= {f"{section}.{name}": value for name, value in fields.items()}
        return cls.of(values | grammar.parse(overrides, "section.field=value"))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration with these values, by dotted names; errors are those of `read`."""
        name, preset = (
            values.get("model.name", Model.name),
            values.get("model.preset", Model.preset),
        )
        hints = _hints(str(name), str(preset))
        sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for key, value in grammar.convert(values, hints, of="the configuration").items():
            section, _, field = key.partition(".")
            sections[section][field] = value
        own = {field.name for field in dataclasses.fields(Model)}
        recipe = {name: v for name, v in sections["model"].items() if name not in own}
        sections["model"] = {name: v for name, v in sections["model"].items() if name in own}
        sections["model"]["recipe"] = recipe
        return cls(**{name: SECTIONS[name](**fields) for name, fields in sections.items()})

    def values(self) -> dict[str, Any]:
        """All values by dotted names; of the recipe, only the fields that override the preset."""
        values: dict[str, Any] = {}
        for section in SECTIONS:
            fields = dataclasses.asdict(getattr(self, section))
            fields |= fields.pop("recipe", {})
            values |= {f"{section}.{name}": value for name, value in fields.items()}
        return values

    def recipe(self, **given: Any) -> Recipe:
        """The recipe of the model; `given`: fields that the run sets itself, see `GIVEN`."""
        overrides = self.model.recipe | {"seed": self.run.seed} | given
        return models.recipe(self.model.name, self.model.preset, **overrides)

    def changed(self, other: "Config") -> list[str]:
        """The fields that differ and change what a run computes."""
        own, others = self.values(), other.values()
        names = [n for n in own | others if own.get(n) != others.get(n)]
        return [n for n in names if n in NOT_FREE or not n.startswith(FREE)]

    def save(self, file: str | Path) -> None:
        """Write all values as YAML, atomically."""
        sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for key, value in self.values().items():
            section, _, name = key.partition(".")
            sections[section][name] = list(value) if isinstance(value, tuple) else value
        with replaced(Path(file)) as unfinished:
            unfinished.write_text(yaml.safe_dump(sections, sort_keys=False))


def explain() -> str:
    """Every section and field with its meaning and default, for --help."""
    lines = []
    for section, kind in SECTIONS.items():
        lines += [_filled(f"{section}: {inspect.getdoc(kind)}", "", "  ")]
        defaults = kind()
        for field in dataclasses.fields(kind):
            if "about" in field.metadata:
                name, default = f"{section}.{field.name}", getattr(defaults, field.name)
                shown = "" if default in (None, [], {}) else f" (default: {_shown(default)})"
                lines += [_paragraph(name, field.metadata["about"] + shown)]
        if section == "model":
            about = "fields of every recipe (`vidl recipe NAME` prints those of one):"
            lines += [_filled(about, "  ", "  ")]
            lines += explain_recipe(Recipe)
        lines += [""]
    return "\n".join(lines)


def explain_recipe(recipe: Recipe | type[Recipe]) -> list[str]:
    """The fields of a recipe that a configuration may set: meaning and value, or default."""
    of_class = isinstance(recipe, type)
    about = meanings(recipe if isinstance(recipe, type) else type(recipe))
    return [
        _paragraph(
            f"model.{field.name}",
            f"{about[field.name].removesuffix('.')} ({'default: ' * of_class}{_shown(value)})",
        )
        for field in dataclasses.fields(recipe)
        if field.name not in GIVEN and (value := getattr(recipe, field.name)) is not None
    ]


def meanings(kind: type) -> dict[str, str]:
    """The meaning of each field of a recipe class, from its docstring and those of its bases."""
    about: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(vars(base).get("__doc__") or "").partition("Attributes:\n")[2]
        entries = textwrap.dedent(text.split("\n\n")[0]).replace("\n    ", " ").splitlines()
        for names, _, meaning in (entry.partition(": ") for entry in entries):
            about |= dict.fromkeys(names.split(", "), meaning)
    return about


def _paragraph(name: str, text: str) -> str:
    return _filled(f"{name}: {text}", "  ", "      ")


def _filled(text: str, first: str, others: str) -> str:
    """A paragraph with these indents that is as wide as the terminal, as those of argparse are."""
    width = max(40, shutil.get_terminal_size().columns - 2)
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):  # as in YAML
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)


def _hints(model: str, preset: str) -> dict[str, Any]:
    """The types of all fields by dotted names."""
    hints = {
        f"{section}.{name}": hint
        for section, kind in SECTIONS.items()
        for name, hint in get_type_hints(kind).items()
    }
    del hints["model.recipe"]
    recipe = types_of(models.recipe(model, preset))
    return hints | {f"model.{name}": hint for name, hint in recipe.items() if name not in GIVEN}
