"""The commands `vidl tune|savings|estimate` and `vidl bench compare|report|summary`.

`vidl bench` itself is in vidl/cli.py. Imports are inside the functions, so that `vidl --help`
stays fast.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidl.bench.tuning import commands as tuning

# `vidl bench WORD` with one of these words is a command of its own.
READERS = ("compare", "report", "summary")


def add(commands: argparse._SubParsersAction) -> None:
    """Add the parsers of the commands."""
    _add_compare(commands)
    _add_report(commands)
    _add_summary(commands)
    _add_savings(commands)
    _add_estimate(commands)
    tuning.add(commands)


def _add_compare(commands: argparse._SubParsersAction) -> None:
    about = "compare two sets of results: what became faster or slower beyond noise"
    command = commands.add_parser(
        "bench compare",
        help=about,
        description="Compare two sets of results. A change counts if the ranges from the 20 to the "
        "80 % quantile do not overlap. Exit status 1 if a result of vidl became slower or wrong.",
    )
    add = command.add_argument
    add("old", help="a file of JSON lines, a folder of them, or a commit (its bench/results)")
    add("new", help="the same, of the newer results")
    add("--json", action="store_true", help="print JSON lines, also for what is unchanged")
    command.set_defaults(run=_compare)


def _compare(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.bench.report import compare, records

    try:
        changes = compare.compare(records.load(args.old), records.load(args.new))
    except ValueError as error:
        parser.error(str(error))
    if not changes:
        parser.error(f"{args.old} and {args.new} have no measurement in common")
    if args.json:
        for change in changes:
            print(json.dumps(compare.as_json(change)))
    else:
        print(compare.table(changes))
    return 1 if compare.bad(changes) else 0


def _add_report(commands: argparse._SubParsersAction) -> None:
    about = "write the page, the plots and the README table from the committed results"
    command = commands.add_parser(
        "bench report",
        help=about,
        description="Write an HTML page with plots (PNG, SVG), a README.md next to the results, "
        "and the section of the clone's README.md between <!-- results --> and <!-- /results -->.",
    )
    add = command.add_argument
    add("results", nargs="?", help="JSON lines or a folder of them (default bench/results)")
    add("--out", type=Path, metavar="DIR", help="folder of the page (default: RESULTS/report)")
    add("--readme", type=Path, help="README to update (default: that of the clone)")
    command.set_defaults(run=_report)


def _report(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.bench.report import bounds, digest, markdown, page, records

    results = Path(args.results or records.ROOT / records.RESULTS)
    folder = results if results.is_dir() else results.parent
    out = args.out or folder / "report"
    readme = args.readme or (None if args.results else records.ROOT / "README.md")
    try:
        devices = digest.devices(records.load(results))
        if not devices:
            raise ValueError(f"{results} has no results except those of --quick")
        if readme is not None:
            markdown.rewrite(readme, devices)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        from vidl.bench.report import plots
    except ModuleNotFoundError as error:
        pictures = []
        print(f"no plots without {error.name}; try: pip install 'vidl-kernels[bench]'")
    else:
        pictures = plots.draw(devices, out)
    (folder / "README.md").write_text(markdown.details(devices))
    index = page.write(devices, out, pictures, records.ROOT / bounds.PAGE)
    files = [index, folder / "README.md"] + [readme] * bool(readme)
    print("\n".join(f"wrote {file}" for file in files))
    return 0


def _add_summary(commands: argparse._SubParsersAction) -> None:
    about = "list results that are wrong, slower than a baseline or far from the hardware limit"
    command = commands.add_parser(
        "bench summary",
        help=about,
        description=about.capitalize()
        + ". Exit status 1 if a result of vidl is wrong or failed, or there are no results.",
    )
    add = command.add_argument
    add("results", nargs="?", help="JSON lines or a folder of them (default bench/results)")
    add("--device", choices=("cpu", "cuda"), help="only results of CPUs or of GPUs")
    add("--since", default="", metavar="TIME", help="only results since 2026-11-23T10:00 or so")
    command.set_defaults(run=_summary)


def _summary(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.bench.report import digest, verdict
    from vidl.bench.report import records as history

    try:
        records = history.load(args.results or history.ROOT / history.RESULTS)
    except ValueError as error:
        parser.error(str(error))
    records = [
        r for r in records
        if r.get("timestamp", "") >= args.since and args.device in (None, r.get("device_type"))
    ]  # fmt: skip
    devices = digest.devices(records)
    print(verdict.verdict(devices, records))
    newest = history.newest(records).values()
    wrong = any(r["status"] in ("wrong", "failed") and r["kind"] == "ours" for r in newest)
    return 1 if wrong or not devices else 0


def _add_savings(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "savings",
        help="time whole training steps: {dense, sparse} x {PyTorch, vidl}",
        description="Time whole pre-training steps, dense and sparse, in PyTorch and in vidl, "
        "after comparing losses and gradients. The baseline is the same model in plain PyTorch.",
    )
    add = command.add_argument
    add("model", help="a model of `vidl systems`")
    add("overrides", nargs="*", metavar="FIELD=VALUE", help="recipe fields, as in mask_ratio=0.5")
    add("--preset", help="a preset of the model (default base; --quality: the configuration's)")
    add("--batch", type=int, help="clips per step (default 4 on a CPU, 64 on a GPU)")
    add("--steps", type=int, default=20, help="steps of each cell (default 20)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add(
        "--compile",
        action="store_true",
        help="also time PyTorch and vidl with torch.compile; it compiles for minutes",
    )
    add("--epochs", type=float, default=10, help="epochs of the projected schedule (default 10)")
    add("--clips", type=int, default=5_440_000, help="clips per epoch (default 5,440,000)")
    add("--budget", type=float, metavar="SECONDS", help="start no further round after this time")
    add("--scaling", action="store_true", help="time and memory of the vision encoder against "
        "mask ratio, frames, resolution and batch size")  # fmt: skip
    add("--quality", type=float, metavar="SECONDS", help="accuracy at equal training time: train "
        "dense and sparse for so long each on moving shapes; fields may be section.field=value "
        "as in `vidl pretrain`")  # fmt: skip
    add("--seeds", type=int, default=3, help="seeds of --quality (default 3)")
    add("--config", type=Path, help="of --quality (default examples/moving_shapes_MODEL.yaml)")
    add("--dry-run", action="store_true", help="list the measurements without running them")
    add("--json", action="store_true", help="print JSON lines instead of tables")
    about = "append JSON lines to DIR/<device>/<op>.jsonl; default DIR: bench/results"
    add("--write", nargs="?", const="", metavar="DIR", help=about)
    tuning.add_option(command)
    command.set_defaults(run=_savings)


def _savings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl import overrides
    from vidl.bench.measure import record
    from vidl.bench.training import savings, scaling, summary

    def write(records: list[dict[str, Any]]) -> None:
        if args.write is not None:
            record.write(records, args.write or None)

    if args.quality is not None:
        return _quality(parser, args, write)
    try:
        plan = savings.plan(
            args.model,
            args.preset or "base",
            overrides.parse(args.overrides),
            batch=args.batch,
            steps=args.steps,
            device=args.device,
            compiled=args.compile,
            epochs=args.epochs,
            clips=args.clips,
            budget=args.budget,
        )
    except ValueError as error:
        parser.error(str(error))
    if args.dry_run:
        lines = savings.dry_run(plan)
        if args.scaling:
            lines = (f"{p.axis} {p.value:g}: {p.tokens} tokens" for p in scaling.points(plan))
        print("\n".join(lines))
        return 0
    _before(plan, args.tune)
    if args.scaling:
        return _print(args, scaling.run(plan, write), scaling.table)
    return _print(args, savings.run(plan, write), summary.table)


def _add_estimate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "estimate",
        help="estimate step time, memory and GPU-hours of a recipe on a GPU that you name",
        description="Estimate the time of pre-training steps, {dense, sparse} x {torch, vidl}, on "
        "a GPU, from the FLOPs and bytes of a step on the CPU and the rates of the GPU. Prints "
        "ranges and assumptions; no step runs on the GPU.",
    )
    add = command.add_argument
    add("model", help="a model of `vidl systems`")
    add("overrides", nargs="*", metavar="FIELD=VALUE", help="recipe fields, as in mask_ratio=0.5")
    gpus = ("h200", "h100", "a100", "v100", "a6000", "this")
    about = "model of GPU; this: the GPU of this machine, or its CPU; its rates are measured first"
    add("--gpu", required=True, choices=gpus, help=about)
    add("--gpus", type=int, default=1, help="GPUs of one machine (default 1)")
    add("--preset", default="base", help="a preset of the model (default base)")
    add("--batch", type=int, default=64, help="clips per step and GPU (default 64)")
    add("--epochs", type=float, default=10, help="epochs of the schedule (default 10)")
    add("--clips", type=int, default=5_440_000, help="clips per epoch (default 5,440,000)")
    command.set_defaults(run=_estimate)


def _estimate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl import overrides
    from vidl.bench.training import cards, estimate, savings

    if args.gpus > 1 and args.gpu == "this":
        parser.error(f"need --gpus 1 with --gpu this: no link is measured; got {args.gpus}")
    if args.gpus < 1:
        parser.error(f"need gpus >= 1, got {args.gpus}")
    try:
        plan = savings.plan(
            args.model,
            args.preset,
            overrides.parse(args.overrides),
            batch=args.batch,
            device="cpu",
            epochs=args.epochs,
            clips=args.clips,
            need_savings=False,
        )
    except ValueError as error:
        parser.error(str(error))
    card = cards.this() if args.gpu == "this" else cards.CARDS[args.gpu]
    rows = list(estimate.rows(plan, card))
    estimates = [estimate.estimate(row, card, plan, args.gpus) for row in rows]
    print(estimate.table(plan, card, args.gpus, estimates))
    return 0


def _before(plan: Any, wanted: bool | None) -> None:
    from vidl.bench.tuning import sources

    def calls() -> Any:
        sizes = {"batch": plan.batch, "device": plan.device}
        return sources.of_recipe(plan.name, plan.preset, plan.overrides, **sizes)

    tuning.before_run(calls, plan.device, wanted)


def _quality(parser: argparse.ArgumentParser, args: argparse.Namespace, write: Any) -> int:
    from vidl.bench.training import quality

    options = {"seeds": args.seeds, "preset": args.preset, "file": args.config}
    try:
        plan = quality.plan(args.model, args.quality, args.overrides, **options)
        rows = quality.rows(plan.config)
    except ValueError as error:
        parser.error(str(error))
    if args.dry_run:
        for row, changed in rows.items():
            print(f"{row}: {plan.shape}, {plan.seeds} seeds; {changed or 'as configured'}")
        return 0
    return _print(args, quality.run(plan, write), quality.table)


def _print(
    args: argparse.Namespace,
    records: list[dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
) -> int:
    """Print records; the exit status is 1 if one of them is wrong or failed."""
    print("\n".join(map(json.dumps, records)) if args.json else table(records))
    return 0 if all(record["status"] == "ok" for record in records) else 1
