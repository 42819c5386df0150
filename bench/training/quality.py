"""What a model learns in the same time: dense and sparse, trained to one budget of seconds.

A run is one of `vidl.training` on moving shapes, whose captions tell motions apart. How many steps
fit into the budget is measured first, since the learning rate falls to the end of its schedule.
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
from vidl.bench.measure.harness import progress
from vidl.bench.measure.record import circumstances
from vidl.bench.report.records import Record
from vidl.training import Config, pretrain

EXAMPLES = BENCH.parent / "examples"
# Steps whose later half tells the speed; more are made where few take no tenth of the time. In so
# many turns of all rows, of which the fastest counts: a machine may be busy during one.
TRIED = (4, 20)
TURNS = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained, by how many seeds, and for how long each."""

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
    """Choose what is trained.

    Args:
        name: of the model.
        seconds: of training, by the clock, without evaluation.
        overrides: of the configuration, as section.field=value; a field alone is one of the model.
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
        raise ValueError(
            "need evaluation.files, or data.source=moving_shapes, to know what is learned"
        )
    return Plan(config, seconds, seeds)


def rows(config: Config) -> dict[str, dict[str, Any]]:
    """The fields of the recipe that make it dense, and none for what it is: sparse."""
    recipe: Any = config.recipe()
    dense = recipe.variants()["dense"]
    names = [field.name for field in dataclasses.fields(recipe)]
    changed = {n: getattr(dense, n) for n in names if getattr(dense, n) != getattr(recipe, n)}
    if not changed:
        raise ValueError("need a configuration that masks or prunes: nothing is saved without")
    return {"dense": changed, "sparse": {}}


def run(plan: Plan, write: Callable[[list[Record]], object] = lambda records: None) -> list[Record]:
    """Train all; the rows take turns, seed by seed.

    Args:
        write: gets the records after each seed; the newest counts.
    """
    made = {row: _with(plan.config, fields) for row, fields in rows(plan.config).items()}
    speeds = dict.fromkeys(made, math.inf)
    for turn in range(TURNS):
        for row, config in made.items():
            progress(f"[0/{plan.seeds}] {plan.shape}: how fast is {row}? {turn + 1} of {TURNS}")
            speeds[row] = min(speeds[row], _seconds_per_step(config, plan.seconds))
    steps = {row: max(1, round(plan.seconds / speed)) for row, speed in speeds.items()}
    found: dict[str, list[Record]] = {row: [] for row in made}
    records: list[Record] = []
    for seed in range(plan.seeds):
        for row, config in made.items():
            progress(f"[{seed + 1}/{plan.seeds}] {plan.shape}: {row}, {steps[row]} steps")
            found[row].append(_train(config, steps[row], seed))
        records = list(_records(plan, made, found))
        write(records)
    progress("")
    return records


def _with(config: Config, fields: dict[str, Any]) -> Config:
    recipe = config.model.recipe | fields
    return dataclasses.replace(config, model=dataclasses.replace(config.model, recipe=recipe))


def _seconds_per_step(config: Config, budget: float) -> float:
    found = 0.0
    for steps in TRIED:
        if found * steps < budget / 10:
            log = _run(config, steps, 0, log_every=steps // 2, evaluate=lambda training: {})[1]
            found = float(log[-1]["seconds_per_step"])
    return found


def _train(config: Config, steps: int, seed: int) -> Record:
    """What a run found, and how long it took."""
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
            run=dataclasses.replace(config.run, tensorboard=False, **options),
            schedule=dataclasses.replace(config.schedule, steps=steps, warmup=warmup),
            evaluation=dataclasses.replace(config.evaluation, every=0),
        )
        result = pretrain(config, evaluate)
        log = (Path(folder) / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    return result, [record for record in records if "seconds_per_step" in record]


def _records(
    plan: Plan, made: dict[str, Config], found: dict[str, list[Record]]
) -> Iterator[Record]:
    device = plan.config.run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for row, runs in found.items():
        values = {name: [each["r1"][name] for each in runs] for name in runs[0]["r1"]}
        yield {
            "op": "quality",
            "shape": plan.shape,
            "sizes": {n: str(v) for n, v in made[row].values().items() if not n.startswith("run.")},
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
    """Recalls of each row, for a terminal."""
    first = records[0]
    names = list(first["r1"])
    lines = [f"\n{first['shape']} · {first['device_type'].upper()}: {first['device']}"]
    lines += [f"{'row':16}{'steps':>8}{'seconds':>14}" + "".join(f"{n:>26}" for n in names)]
    for r in records:
        spent = [each["seconds"] for each in r["runs"]]
        cells = (r["r1"][n] for n in names)
        texts = (f"{c['mean']:.1f} ({c['lowest']:.1f}-{c['highest']:.1f}) %" for c in cells)
        seconds = f"{min(spent):.0f}-{max(spent):.0f}"
        lines += [f"{r['candidate']:16}{r['runs'][0]['steps']:8}{seconds:>14}"
                  + "".join(f"{text:>26}" for text in texts)]  # fmt: skip
    chance = 100 / first["pairs"]
    seeds = len(first["runs"])
    return "\n".join([*lines, f"mean and range of {seeds} seed(s); chance: {chance:.1f} %"])
