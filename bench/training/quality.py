"""Accuracy at equal training time: dense and sparse models, trained for the same seconds.

A run is `vidl.training.pretrain` on moving shapes, whose captions describe motions. The number of
steps that fit into the budget is measured first, because the learning-rate schedule needs it.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from vidl.bench.measure.cases import BENCH, short
from vidl.bench.measure.record import circumstances
from vidl.bench.report.records import Record
from vidl.progress import Bar
from vidl.training import Config, pretrain

EXAMPLES = BENCH.parent / "examples"
# The speed is that of the later half of so many steps; the second number applies if the first takes
# less than a tenth of the budget. The fastest of several rounds counts: the machine may be busy.
TRIAL_STEPS = (4, 20)
TRIAL_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """The configuration, the seconds of each run and the number of seeds."""

    config: Config
    seconds: float
    seeds: int

    @property
    def shape(self) -> str:
        model = self.config.model
        return f"{model.name} {model.preset}, {self.seconds:g} s of {self.config.data.source}"


def plan(
    name: str,
    seconds: float,
    overrides: Sequence[str] = (),
    *,
    seeds: int = 3,
    preset: str | None = None,
    file: Path | None = None,
) -> Plan:
    """Plan the runs.

    Args:
        name: the model.
        seconds: wall-clock time of training, without evaluation.
        overrides: changes of the configuration, section.field=value; without a section, of the
            model.
        seeds: the number of seeds.
        preset: the preset of the model; default: that of the configuration.
        file: the configuration; default: examples/moving_shapes_NAME.yaml.

    Raises:
        ValueError: the configuration has no such fields, or a number is out of range.
    """
    if seconds <= 0 or seeds < 1:
        raise ValueError(f"need seconds > 0 and seeds >= 1, got {seconds} and {seeds}")
    given = [text if "." in text.partition("=")[0] else f"model.{text}" for text in overrides]
    given += [f"model.name={name}"] + ([f"model.preset={preset}"] if preset else [])
    config = Config.read(file or EXAMPLES / f"moving_shapes_{name}.yaml", given)
    if config.data.source != "moving_shapes" and not config.evaluation.files:
        raise ValueError("need evaluation.files or data.source=moving_shapes to evaluate")
    return Plan(config, seconds, seeds)


def rows(config: Config) -> dict[str, dict[str, Any]]:
    """The changed fields of the recipe by row: those that make it dense, none for sparse."""
    recipe: Any = config.recipe()
    dense = recipe.variants()["dense"]
    names = [field.name for field in dataclasses.fields(recipe)]
    changed = {n: getattr(dense, n) for n in names if getattr(dense, n) != getattr(recipe, n)}
    if not changed:
        raise ValueError("need a configuration that masks or prunes tokens")
    return {"dense": changed, "sparse": {}}


def run(plan: Plan, write: Callable[[list[Record]], object] = lambda records: None) -> list[Record]:
    """Train dense and sparse models alternately, seed by seed.

    Args:
        write: called with the records after each seed; the newest record of a key counts.
    """
    configs = {row: _with(plan.config, fields) for row, fields in rows(plan.config).items()}
    fastest = dict.fromkeys(configs, math.inf)
    bar = Bar(plan.seeds)  # lines only: every run shows a bar of its own
    for number in range(1, TRIAL_ROUNDS + 1):
        for row, config in configs.items():
            bar.say(f"[0/{plan.seeds}] {plan.shape}: {row}, trial {number} of {TRIAL_ROUNDS}")
            fastest[row] = min(fastest[row], _seconds_per_step(config, plan.seconds))
    steps = {row: max(1, round(plan.seconds / least)) for row, least in fastest.items()}
    runs: dict[str, list[Record]] = {row: [] for row in configs}
    records: list[Record] = []
    for seed in range(plan.seeds):
        for row, config in configs.items():
            bar.say(f"[{seed + 1}/{plan.seeds}] {plan.shape}: {row}, {steps[row]} steps")
            runs[row].append(_train(config, steps[row], seed))
        records = list(_records(plan, configs, runs))
        write(records)
    return records


def _with(config: Config, fields: dict[str, Any]) -> Config:
    recipe = config.model.recipe | fields
    return dataclasses.replace(config, model=dataclasses.replace(config.model, recipe=recipe))


def _seconds_per_step(config: Config, budget: float) -> float:
    seconds = 0.0
    for steps in TRIAL_STEPS:
        if seconds * steps < budget / 10:
            log = _run(config, steps, 0, log_every=steps // 2, evaluate=lambda training: {})[1]
            seconds = float(log[-1]["seconds_per_step"])
    return seconds


def _train(config: Config, steps: int, seed: int) -> Record:
    """Train once: seed, steps, seconds, final loss and R@1."""
    result, log = _run(config, steps, seed, log_every=min(config.run.log_every, steps))
    spent, last = 0.0, 0
    for record in log:
        spent += record["seconds_per_step"] * (record["step"] - last)
        last = record["step"]
    recalls = {n: r for n, r in result["evaluation"].items() if n.endswith("R@1")}
    return {"seed": seed, "steps": steps, "seconds": spent, "loss": log[-1]["loss"], "r1": recalls}


def _run(
    config: Config, steps: int, seed: int, log_every: int, evaluate: Any = None
) -> tuple[Record, list[Record]]:
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = dict(
            folder=folder, seed=seed, log_every=log_every, save_every=steps, keep=1
        )
        warmup = min(config.schedule.warmup, steps // 10)
        config = dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, **options),
            schedule=dataclasses.replace(config.schedule, steps=steps, warmup=warmup),
            evaluation=dataclasses.replace(config.evaluation, every=0),
        )
        result = pretrain(config, evaluate)
        log = (Path(folder) / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    return result, [record for record in records if "seconds_per_step" in record]


def _records(
    plan: Plan, configs: dict[str, Config], runs_of: dict[str, list[Record]]
) -> Iterator[Record]:
    device = plan.config.run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for row, runs in runs_of.items():
        values = {name: [run["r1"][name] for run in runs] for name in runs[0]["r1"]}
        yield {
            "op": "quality",
            "shape": plan.shape,
            "sizes": {
                n: str(v) for n, v in configs[row].values().items() if not n.startswith("run.")
            },
            "dtype": short(torch.bfloat16 if device == "cuda" else torch.float32),
            "mode": "train",
            **circumstances(device, torch.get_num_threads()),
            "quick": plan.seeds < 3,
            "candidate": f"{row}, vidl",
            "kind": "ours",
            "row": row,
            "status": "ok",
            "reason": None,
            "budget_s": plan.seconds,
            "runs": list(runs),
            "pairs": plan.config.evaluation.pairs,
            "r1": {
                name: {"mean": mean(v), "lowest": min(v), "highest": max(v)}
                for name, v in values.items()
            },
        }


def table(records: Sequence[Record]) -> str:
    """R@1 of dense and sparse, for a terminal."""
    first = records[0]
    names = list(first["r1"])
    lines = [f"\n{first['shape']} · {first['device_type'].upper()}: {first['device']}"]
    lines += [f"{'row':16}{'steps':>8}{'seconds':>14}" + "".join(f"{n:>26}" for n in names)]
    for r in records:
        spent = [run["seconds"] for run in r["runs"]]
        cells = (r["r1"][n] for n in names)
        texts = (f"{c['mean']:.1f} ({c['lowest']:.1f}-{c['highest']:.1f}) %" for c in cells)
        seconds = f"{min(spent):.0f}-{max(spent):.0f}"
        lines += [f"{r['candidate']:16}{r['runs'][0]['steps']:8}{seconds:>14}"
                  + "".join(f"{text:>26}" for text in texts)]  # fmt: skip
    chance = 100 / first["pairs"]
    seeds = len(first["runs"])
    return "\n".join([*lines, f"mean (lowest-highest) of {seeds} seed(s); chance: {chance:.1f} %"])
