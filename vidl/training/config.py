"""What a run is: a YAML file and `section.field=value`, checked, and saved beside the run."""

import dataclasses
import difflib
import inspect
import os
import textwrap
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vidl import models
from vidl.models import Recipe


def _field(default: Any, about: str) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"about": about})
    return dataclasses.field(default=default, metadata={"about": about})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Which model is trained; any field of its recipe may stand here too."""

    name: str = _field("smaug", "smaug or mac")
    preset: str = _field("tiny", "tiny (trains on a CPU), small or base")
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Weights to begin with, safetensors or a state_dict of torch.save; none: fresh ones."""

    model: str | None = _field(None, "of a run: its folder, a checkpoint, or a file of weights")
    vision: str | None = _field(None, "of a ViT, DeiT, MAE or CLIP, for the vision encoder")
    text: str | None = _field(None, "of BERT or DistilBERT; needs their data.tokenizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What is seen. Frames and size of a clip are model.frames and model.image_size."""

    source: Literal["clips", "shards", "moving_shapes"] = _field(
        "clips", "clips (annotation files), shards (webdataset) or moving_shapes (drawn)"
    )
    files: list[str] = _field([], "annotation files (.arrow, .json), or shards (.tar)")
    media: str | None = _field(None, "folder of the clips; default: beside each annotation file")
    tokenizer: str | None = _field(None, "tokenizer.json or vocab.txt; default: made of captions")
    words: int = _field(32, "tokens of a caption, [CLS] and [SEP] among them")
    batch_size: int = _field(16, "clips of one forward on one rank")
    workers: int = _field(2, "processes that read ahead, on each rank; 0: none")
    decoder: str = _field("auto", "pyav, torchcodec or auto")
    cache: bool = _field(False, "decode each clip once, and keep small pictures of it in the run")
    flip: bool = _field(True, "mirror half of the clips, but none whose caption says left or right")
    scale: tuple[float, float] = _field((0.5, 1.0), "area of a random crop, smallest and largest")
    broken: float = _field(0.1, "stop if more than this share of the clips cannot be read")
    match: Literal["clip", "caption"] = _field(
        "clip", "samples that are no negatives of each other: of one clip, or of one caption"
    )
    clips: int = _field(10_000, "moving_shapes: how many clips an epoch has")
    difficulty: int = _field(1, "moving_shapes: 1, 2 or 3")
    looks: int = _field(0, "moving_shapes: coloured shapes of one batch; 0: any")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW or Muon. Norms, biases, positions, tokens and the temperature do not decay."""

    name: Literal["adamw", "muon"] = _field(
        "adamw", "adamw, or muon for matrices and adamw for the others and for embeddings"
    )
    lr: float = _field(1e-4, "the highest learning rate")
    betas: tuple[float, float] = _field((0.9, 0.98), "of AdamW")
    eps: float = _field(1e-8, "of AdamW")
    weight_decay: float = _field(0.05, "of what decays")
    clip: float = _field(1.0, "largest norm of the gradient; 0: any")
    accumulate: int = _field(
        1, "batches of a step; a clip is contrasted with its own batch, of all ranks, alone"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, and how the learning rate and the share of kept tokens change."""

    steps: int = _field(1000, "of the optimizer")
    warmup: int = _field(100, "steps in which the learning rate rises to its highest")
    final: float = _field(0.01, "share of the learning rate at the end of the cosine")
    prune_over: int = _field(
        0, "steps in which the keep rate falls from 1 to model.keep_rate, as in EViT; 0: at once"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Where and how. A run in a folder that has checkpoints goes on from the newest one."""

    folder: str = _field("run", "for checkpoints, log.jsonl, config.yaml and tokenizer.json")
    seed: int = _field(0, "of weights, data, masks and dropout")
    device: str = _field("auto", "cpu, cuda, or auto: cuda if there is one")
    precision: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", "of products; auto: bfloat16 by autocast on cuda, else float32"
    )
    parallel: Literal["ddp", "fsdp"] = _field("ddp", "over the ranks of torchrun")
    checkpoint_activations: bool = _field(False, "compute blocks again in the backward")
    threads: int = _field(0, "of the CPU; 0: as PyTorch chooses")
    log_every: int = _field(10, "steps")
    save_every: int = _field(500, "steps; the last one is always saved")
    keep: int = _field(3, "how many checkpoints stay")
    tensorboard: bool = _field(True, "write its files too, if it is installed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Retrieval on the way and at the end; without data.source moving_shapes it needs files."""

    every: int = _field(0, "steps; 0: only at the end")
    files: list[str] = _field([], "annotation files of the clips that are searched")
    media: str | None = _field(None, "folder of these clips; default: beside each annotation file")
    rerank: int = _field(0, "how many of the best the fusion encoder judges again; 0: none")
    pairs: int = _field(100, "moving_shapes: clips of val whose captions differ in motion only")


SECTIONS: dict[str, type] = {
    "model": Model,
    "start": Start,
    "data": Data,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "evaluation": Evaluation,
    "run": Run,
}
# What may differ when a run goes on: it changes no number that is computed.
FREE = ("run.", "evaluation.", "data.workers", "data.broken", "data.media")
NOT_FREE = ("run.seed", "run.precision")
# What the run knows by itself: its seed, and its tokenizer's vocabulary.
GIVEN = ("seed", "vocabulary")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run needs to know.

    Raises:
        ValueError: numbers are out of range, or do not fit together.
    """

    model: Model = Model()
    start: Start = Start()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    evaluation: Evaluation = Evaluation()
    run: Run = Run()

    def __post_init__(self) -> None:
        self.recipe()  # its errors
        least = {
            "data.batch_size": 1, "data.workers": 0, "data.clips": 1, "data.looks": 0,
            "optimizer.lr": 0, "optimizer.clip": 0, "optimizer.accumulate": 1,
            "schedule.steps": 1, "schedule.warmup": 0, "schedule.prune_over": 0,
            "run.threads": 0, "run.log_every": 1, "run.save_every": 1, "run.keep": 1,
            "evaluation.every": 0, "evaluation.rerank": 0, "evaluation.pairs": 1,
        }  # fmt: skip
        values = self.values()
        for name, number in least.items():
            if values[name] < number:
                raise ValueError(f"need {name} >= {number}, got {values[name]}")
        if self.data.source != "moving_shapes" and not self.data.files:
            raise ValueError(f"need data.files with data.source {self.data.source!r}, got none")
        if self.start.text and not self.data.tokenizer:
            raise ValueError("need data.tokenizer, that of start.text")
        if self.optimizer.name == "muon" and self.run.parallel == "fsdp":
            raise ValueError(
                "need run.parallel=ddp with optimizer.name=muon, whose update needs whole matrices"
            )

    @classmethod
    def read(
        cls,
        file: str | Path | None = None,
        overrides: Sequence[str] = (),
        base: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> "Config":
        """The configuration of a file, and of `section.field=value` on top of it.

        Args:
            file: YAML of sections and their fields; None: all defaults.
            overrides: values as in YAML.
            base: values by their dotted names, in place of the defaults.

        Raises:
            ValueError: names a section or a field that there is not and the nearest that there is,
                or a value of another type.
        """
        import yaml

        values = dict(base)
        if file is not None:
            try:
                found = yaml.safe_load(Path(file).read_text()) or {}
            except (OSError, yaml.YAMLError) as error:
                raise ValueError(f"cannot read {file}: {error}") from None
            if not isinstance(found, dict):
                raise ValueError(f"{file}: need sections among {', '.join(SECTIONS)}")
            for section, fields in found.items():
                if not isinstance(fields, dict):
                    raise ValueError(f"{file}: need fields under {section!r}, got {fields!r}")
                values |= {f"{section}.{name}": value for name, value in fields.items()}
        for override in overrides:
            name, equals, text = override.partition("=")
            if not equals:
                raise ValueError(f"need section.field=value, got {override!r}")
            try:
                values[name] = yaml.safe_load(text)
            except yaml.YAMLError:
                values[name] = text
        return cls.of(values)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration of values by their dotted names, as `read` checks them."""
        name = values.get("model.name", Model.name)
        known = _known(str(name), str(values.get("model.preset", Model.preset)))
        sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"there is no {key!r}{_nearest(key, known)}")
            section, _, field = key.partition(".")
            sections[section][field] = _typed(key, value, known[key])
        own = {field.name for field in dataclasses.fields(Model)}
        recipe = {name: v for name, v in sections["model"].items() if name not in own}
        sections["model"] = {name: v for name, v in sections["model"].items() if name in own}
        sections["model"]["recipe"] = recipe
        return cls(**{name: SECTIONS[name](**fields) for name, fields in sections.items()})

    def values(self) -> dict[str, Any]:
        """All values by their dotted names; of the recipe those that the preset does not have."""
        found: dict[str, Any] = {}
        for section in SECTIONS:
            fields = dataclasses.asdict(getattr(self, section))
            fields |= fields.pop("recipe", {})
            found |= {f"{section}.{name}": value for name, value in fields.items()}
        return found

    def recipe(self, **given: Any) -> Recipe:
        """The recipe of the model; `given` is what the run knows by itself."""
        overrides = self.model.recipe | {"seed": self.run.seed} | given
        return models.recipe(self.model.name, self.model.preset, **overrides)

    def changed(self, other: "Config") -> list[str]:
        """The fields that differ and of which the numbers of a run depend."""
        own, others = self.values(), other.values()
        names = [n for n in own | others if own.get(n) != others.get(n)]
        return [n for n in names if n in NOT_FREE or not n.startswith(FREE)]

    def save(self, file: str | Path) -> None:
        """Write all values as YAML; the file appears when it is whole."""
        import yaml

        sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for key, value in self.values().items():
            section, _, name = key.partition(".")
            sections[section][name] = list(value) if isinstance(value, tuple) else value
        file = Path(file)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        unfinished.write_text(yaml.safe_dump(sections, sort_keys=False))
        unfinished.replace(file)


def explain() -> str:
    """Every section and field, what it is and its default, for --help."""
    lines = []
    for section, kind in SECTIONS.items():
        lines += [f"{section}: {inspect.getdoc(kind)}"]
        defaults = kind()
        for field in dataclasses.fields(kind):
            if "about" in field.metadata:
                name, default = f"{section}.{field.name}", getattr(defaults, field.name)
                shown = "" if default in (None, []) else f" (default {_shown(default)})"
                lines += [_paragraph(name, field.metadata["about"] + shown)]
        if section == "model":
            lines += _recipe_fields()
        lines += [""]
    return "\n".join(lines)


def _recipe_fields() -> list[str]:
    """What the docstrings of the recipes say about their fields."""
    kinds = {"any model": Recipe}
    for name, (_, presets) in models.MODELS.items():
        kinds[name] = type(presets["base"])
    lines = []
    for name, kind in kinds.items():
        about = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
        about = textwrap.dedent(about.split("\n\n")[0])
        entries = about.replace("\n    ", " ").splitlines()
        lines += [f"  recipe of {name}:"]
        for entry in entries:
            fields, _, text = entry.partition(": ")
            names = [n for n in fields.split(", ") if n not in GIVEN]
            if names:
                lines += [_paragraph(", ".join(f"model.{n}" for n in names), text)]
    return lines


def _paragraph(name: str, text: str) -> str:
    return textwrap.fill(f"{name}: {text}", 90, initial_indent="  ", subsequent_indent="      ")


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def _known(model: str, preset: str) -> dict[str, Any]:
    """The types of all fields by their dotted names."""
    known = {
        f"{section}.{name}": hint
        for section, kind in SECTIONS.items()
        for name, hint in get_type_hints(kind).items()
    }
    del known["model.recipe"]
    hints = get_type_hints(type(models.recipe(model, preset)))
    return known | {f"model.{name}": hint for name, hint in hints.items() if name not in GIVEN}


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    """The known field that was meant: one of this name in another section, or one like it."""
    field = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == field]
    near += difflib.get_close_matches(key, known, 1, 0.5)
    return f"; the nearest is {near[0]!r}" if near else ""


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its type has it: YAML has no tuples, and takes 1e-4 for a word."""
    made = _cast(value, hint)
    if made is _WRONG:
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise ValueError(f"need {name} as {wanted}, got {value!r}")
    return made


_WRONG = object()


def _cast(value: Any, hint: Any) -> Any:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None if type(None) in parts else _WRONG
        made = (_cast(value, part) for part in parts if part is not type(None))
        return next((one for one in made if one is not _WRONG), _WRONG)
    if origin is Literal:
        return value if value in parts else _WRONG
    if origin in (list, tuple):
        values = list(value) if isinstance(value, list | tuple) else [value]
        if origin is list or parts[-1] is ...:
            parts = (parts[0],) * len(values)
        made_all = [_cast(one, part) for one, part in zip(values, parts, strict=False)]
        wrong = len(values) != len(parts) or _WRONG in made_all
        return _WRONG if wrong else origin(made_all)
    if hint is float and not isinstance(value, bool):
        return _number(value)
    if hint is int and not isinstance(value, bool):
        number = _number(value)
        return int(number) if number is not _WRONG and number == int(number) else _WRONG
    if hint is str and isinstance(value, int | float):
        return str(value)
    return value if isinstance(value, hint) else _WRONG


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return _WRONG
