"""The command line: one function for each subcommand, with its imports inside.

So `vidl --help` answers at once, and a subcommand loads only what it needs.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vidl.bench import commands as bench_commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `vidl`.

    Args:
        argv: the arguments after the command's name; default: those of this process.

    Returns:
        The exit status: 0, or 1 if the command ran and found something wrong. Arguments that make
        no sense end in `SystemExit` with status 2, as is argparse's way.
    """
    parser = argparse.ArgumentParser(
        prog="vidl", description="Masked and token-pruned video-language training, made fast."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_info(commands)
    _add_bench(commands)
    bench_commands.add(commands)
    _add_summary(commands)
    _add_data(commands)
    _add_pretrain(commands)
    _add_finetune(commands)
    _add_eval(commands)
    _add_export(commands)
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"] and words[1:2] and words[1] in bench_commands.READERS:
        words[:2] = [" ".join(words[:2])]
    args, rest = parser.parse_known_args(words)
    # argparse takes FIELD=VALUE only where no option stands before it.
    if hasattr(args, "overrides") and not [word for word in rest if word.startswith("-")]:
        args.overrides, rest = [*args.overrides, *rest], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(parser, args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `vidl info | head`
        sys.stderr.close()
        return 0


def _add_info(commands: argparse._SubParsersAction) -> None:
    about = "versions, build, devices, decoders, and which backend runs each op here, or why not"
    command = commands.add_parser("info", help=about, description=about.capitalize() + ".")
    command.add_argument("--json", action="store_true", help="print the same facts as JSON")
    command.set_defaults(run=_info)


def _info(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl import info

    facts = info.collect()
    print(json.dumps(facts, indent=2) if args.json else info.render(facts))
    return 0


def _add_bench(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "bench",
        help="time the ops against PyTorch baselines, after checking the results of both",
        description="Time the ops of vidl against what one would write without it. Every answer "
        "and gradient is compared with a more precise one first; a wrong one gets no time.",
    )
    add = command.add_argument
    add("ops", nargs="*", metavar="OP", help="which ops; default: all")
    add("--shapes", metavar="PATTERN", help="only shapes whose name matches, as in 'G1*' or 0.9")
    add("--baselines", metavar="PATTERN", help="only baselines whose name matches")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--dtype", metavar="LIST", help="float32, bfloat16, float16; default depends on the device")
    add("--threads", metavar="LIST", help="CPU threads, as in 1,2; default: PyTorch's choice")
    add("--modes", metavar="LIST", help="forward, full (forward and backward); default: both")
    add("--json", action="store_true", help="print JSON lines in place of tables")
    add(
        "--write",
        nargs="?",
        const="",
        metavar="DIR",
        help="append JSON lines to DIR/<device>/<op>.jsonl; default DIR: bench/results",
    )
    add("--dry-run", action="store_true", help="list what would be timed, and why the rest cannot")
    add(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="ops take turns; begin no case after so long",
    )
    add("--quick", action="store_true", help="one sample a batch and few repetitions: for a look")
    command.set_defaults(run=_bench)


def _bench(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.bench.measure import harness

    try:
        plan = harness.plan(
            args.ops,
            shapes=args.shapes,
            baselines=args.baselines,
            device=args.device,
            dtypes=_list(args.dtype),
            threads=_list(args.threads),
            modes=_list(args.modes),
            quick=args.quick,
        )
    except ValueError as error:
        parser.error(str(error))
    if args.dry_run:
        for line in harness.dry_run(plan, as_json=args.json):
            print(line)
        return 0
    wrong = 0
    for records in harness.run(plan, args.budget):
        if args.json:
            print("\n".join(map(json.dumps, records)), flush=True)
        else:
            print(harness.table(records), flush=True)
        if args.write is not None:
            harness.write(records, args.write or None)
        wrong += sum(
            record["status"] == "wrong" or (record["status"], record["kind"]) == ("failed", "ours")
            for record in records
        )
    return 1 if wrong else 0


def _add_summary(commands: argparse._SubParsersAction) -> None:
    about = "tokens, parameters, FLOPs and memory of a model: dense, masked and pruned"
    command = commands.add_parser("summary", help=about, description=about.capitalize() + ".")
    add = command.add_argument
    add("model", help="smaug or mac")
    add("overrides", nargs="*", metavar="FIELD=VALUE", help="of its recipe, as in mask_ratio=0.5")
    add("--preset", default="base", help="tiny, small or base, which is the default")
    add("--batch", type=int, default=2, help="clips of a step (default 2)")
    add("--words", type=int, default=32, help="of each caption (default 32)")
    add("--steps", type=int, default=0, help="how many steps are timed (default: none)")
    add("--device", default="cpu", help="default cpu")
    command.set_defaults(run=_summary)


def _summary(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl import models

    try:
        overrides = bench_commands.fields(args.overrides)
        model = models.create(args.model, args.preset, **overrides).to(args.device)
        sizes = {"batch": args.batch, "words": args.words, "steps": args.steps}
        print(models.summarize(model, **sizes))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return 0


def _add_data(commands: argparse._SubParsersAction) -> None:
    about = "convert annotations to one table, find broken clips, look at clips, time the decoders"
    data = commands.add_parser("data", help=about, description=about.capitalize() + ".")
    parts = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    part = parts.add_parser(
        "convert",
        help="annotations of a known format to the Arrow table that training reads",
        description="Write annotations as an Arrow table. Workers map it and share its pages, "
        "however many rows it has. The common JSON needs no conversion: it is done on first use.",
    )
    part.add_argument("file", type=Path, help="the annotations")
    part.add_argument("out", type=Path, nargs="?", help="default: the same name with .arrow")
    part.add_argument(
        "--format",
        default="common",
        help="common (JSON list of {video or image, caption}, also questions and multiple choice; "
        "default), webvid (CSV), cc3m (TSV), msrvtt (JSON, or the CSV of the 1k-A test), didemo, "
        "activitynet (paragraphs), msrvtt-qa, activitynet-qa (*_q.json)",
    )
    part.add_argument(
        "--media",
        type=Path,
        help="folder of the clips: names in the table get the suffixes that the files there have",
    )
    part.add_argument("--split", help="msrvtt: only train, validate or test")
    part.add_argument(
        "--ids", type=Path, help="msrvtt: only videos of this CSV, as MSRVTT_train.9k.csv"
    )
    part.set_defaults(run=_data_convert)

    part = parts.add_parser(
        "check",
        help="decode every clip and list the broken ones",
        description="Decode every frame of every clip. Lists clips that are missing, broken, "
        "damaged or shorter than they say. Exit status 1 if any is missing, broken or damaged.",
    )
    _add_source(part)
    part.add_argument("--workers", type=int, default=os.cpu_count(), help="clips at a time")
    part.set_defaults(run=_data_check)

    part = parts.add_parser(
        "preview",
        help="a picture of some clips and their captions",
        description="Write a picture of some clips, drawn at random: captions, frames, and what a "
        "random mask leaves of them.",
    )
    _add_source(part)
    add = part.add_argument
    add("--out", type=Path, default=Path("preview.png"), help="default: preview.png")
    add("--clips", type=int, default=8, help="how many (default 8)")
    add("--frames", type=int, default=4, help="of each clip (default 4)")
    add("--size", type=int, default=224, help="side of a frame (default 224)")
    add("--mask-ratio", type=float, help="share of the patches that a mask hides, as 0.65")
    add("--patch", type=int, default=16, help="side of a patch (default 16)")
    add("--seed", type=int, default=0, help="draws other clips and another mask")
    part.set_defaults(run=_data_preview)

    part = parts.add_parser(
        "speed",
        help="how many clips a second each decoder reads",
        description="Read training samples with each decoder that can run here, and from the cache "
        "of data.cache, in turns: how many clips a second one process of the loader reads.",
    )
    _add_source(part)
    add = part.add_argument
    add("--clips", type=int, default=64, help="how many are read (default 64)")
    add("--frames", type=int, default=4, help="of each clip (default 4)")
    add("--size", type=int, default=224, help="side of a frame (default 224)")
    add("--seed", type=int, default=0, help="draws other instants and crops")
    part.set_defaults(run=_data_speed)


def _add_source(part: argparse.ArgumentParser) -> None:
    part.add_argument("file", type=Path, help="annotations: common JSON, or an Arrow table")
    part.add_argument(
        "--media",
        type=Path,
        help="folder of the clips; default: "
        "the one beside the file that has its name, or the one that the file is in",
    )


def _data_commands(parser: argparse.ArgumentParser) -> ModuleType:
    try:
        from vidl.data import commands
    except ModuleNotFoundError as error:
        parser.exit(1, f"vidl data needs {error.name}; try: pip install 'vidl[data]'\n")
    return commands


def _data_convert(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    options = {"split": args.split, "ids": args.ids} if args.format == "msrvtt" else {}
    if not options and (args.split or args.ids):
        parser.error(f"--split and --ids are for --format msrvtt, not {args.format}")

    commands = _data_commands(parser)

    def convert() -> int:
        commands.convert(args.file, args.out, format=args.format, media=args.media, **options)
        return 0

    return commands.run(convert)


def _data_check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    commands = _data_commands(parser)
    return commands.run(lambda: commands.check(args.file, args.media, workers=args.workers))


def _data_preview(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.mask_ratio is not None and not 0 <= args.mask_ratio <= 1:
        parser.error(f"need a --mask-ratio from 0 to 1, got {args.mask_ratio}")
    commands = _data_commands(parser)
    names = ("clips", "frames", "size", "mask_ratio", "patch", "seed")
    options = {name: getattr(args, name) for name in names}
    return commands.run(lambda: commands.preview(args.file, args.media, args.out, **options))


def _data_speed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.clips < 1:
        parser.error(f"need --clips >= 1, got {args.clips}")
    commands = _data_commands(parser)
    options = {name: getattr(args, name) for name in ("clips", "frames", "size", "seed")}
    return commands.run(lambda: commands.speed(args.file, args.media, **options))


def _add_pretrain(commands: argparse._SubParsersAction) -> None:
    about = "train a model on clips and captions, or go on with a run"
    command = commands.add_parser(
        "pretrain",
        help=about,
        description="Train a model on clips and captions. The same command goes on with a run that "
        "was stopped. Over several processes: torchrun --nproc-per-node 8 -m vidl pretrain ...",
        add_help=False,
    )
    add = command.add_argument
    add("-h", "--help", action=_HelpOnFields, help="explain every field of the configuration")
    add("--config", type=Path, metavar="FILE", help="YAML of sections and their fields")
    add("overrides", nargs="*", metavar="SECTION.FIELD=VALUE", help="as in model.mask_ratio=0.5")
    command.set_defaults(run=_pretrain)


class _HelpOnFields(argparse.Action):
    """The help of a command, and that of the fields of a configuration, which loads PyTorch."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from vidl.training import config

        print(f"{parser.format_help()}\n{config.explain()}")
        parser.exit()


def _pretrain(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.data.dataset import TooManyBroken
    from vidl.training import Config, pretrain

    try:
        config = Config.read(args.config, args.overrides)
    except ValueError as error:
        parser.error(str(error))
    try:
        pretrain(config)
    except (TooManyBroken, ValueError, OSError) as error:
        print(f"vidl pretrain: {error}", file=sys.stderr)
        return 1
    return 0


def _add_finetune(commands: argparse._SubParsersAction) -> None:
    about = "train a pre-trained model on, for retrieval or to answer questions"
    command = commands.add_parser("finetune", help=about, description=about.capitalize() + ".")
    tasks = command.add_subparsers(title="tasks", metavar="TASK", required=True)
    for task, about in (
        ("retrieval", "by the losses that the model has"),
        ("qa", "with a classifier of the most frequent answers, on the fusion encoder"),
    ):
        part = tasks.add_parser(
            task,
            help=about,
            description=f"Train a pre-trained model on, {about}. The configuration is that of the "
            "run it begins with, but for model.mask_ratio=0, optimizer.lr=1e-5 and "
            "run.folder=finetuned (and model.word_ratio=0 of mac). The same command goes on with "
            "a run that was stopped.",
            add_help=False,
        )
        add = part.add_argument
        add("-h", "--help", action=_HelpOnFields, help="explain every field of the configuration")
        add("--weights", type=Path, required=True, metavar="RUN", help="a run, or its checkpoint")
        if task == "qa":
            add("--answers", type=int, default=1500, help="how many can be given (default 1500)")
        add("--config", type=Path, metavar="FILE", help="YAML of sections and their fields")
        add("overrides", nargs="*", metavar="SECTION.FIELD=VALUE", help="as in data.files=[a.json]")
        part.set_defaults(run=_finetune, task=task)


def _finetune(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.data.dataset import TooManyBroken
    from vidl.training import configuration, finetune

    try:
        config = configuration(args.weights, args.config, args.overrides)
    except ValueError as error:
        parser.error(str(error))
    try:
        finetune(args.task, config, **({"answers": args.answers} if args.task == "qa" else {}))
    except (TooManyBroken, ValueError, OSError) as error:
        print(f"vidl finetune: {error}", file=sys.stderr)
        return 1
    return 0


def _add_eval(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "eval",
        help="how good a trained model is: retrieval, multiple choice, open questions",
        description="Evaluate a trained model: retrieval in both directions (retrieval), multiple "
        "choice (mc) or open questions (qa). A clip that cannot be read is never replaced: it "
        "counts as missed, and is named. Over several processes: torchrun --nproc-per-node 8 -m "
        "vidl eval ...",
    )
    add = command.add_argument
    add("task", choices=("retrieval", "mc", "qa"), help="what is asked")
    add("--weights", type=Path, required=True, metavar="RUN", help="a run, or its checkpoint")
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help="annotations: common JSON, or an Arrow table; default: what the run's configuration "
        "has under evaluation",
    )
    add("--media", type=Path, help="folder of the clips; default: as `vidl data check` has it")
    add("--rerank", type=int, default=0, metavar="K", help="judge the best K again (default 0)")
    add("--batch", type=int, default=32, help="clips at a time (default 32)")
    add("--workers", type=int, default=0, help="processes that read clips (default: this one)")
    add("--masked", action="store_true", help="mask clips as in training; default: show all")
    add("--unpruned", action="store_true", help="keep all tokens and frames")
    add("--device", default="auto", help="cpu, cuda, or auto (default): cuda if there is one")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products")
    add("--json", type=Path, metavar="FILE", help="write the result there too")
    command.set_defaults(run=_eval)


def _eval(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    import torch

    from vidl.evaluation import Options
    from vidl.training import parallel, runs

    if args.rerank and args.task != "retrieval":
        parser.error(f"--rerank is for retrieval, not {args.task}")
    try:
        options = Options(
            batch_size=args.batch,
            workers=args.workers,
            masked=args.masked,
            pruned=not args.unpruned,
            dtype=None if args.dtype == "float32" else getattr(torch, args.dtype),
        )
        with parallel.ranks(args.device) as ranks:
            data = None if args.data is None else (args.data, args.media)
            found = runs.evaluate(args.weights, args.task, data, ranks, options, args.rerank)
            if ranks.first:
                print(found)
            if ranks.first and args.json is not None:
                args.json.write_text(found.to_json() + "\n")
    except (ValueError, OSError) as error:
        print(f"vidl eval: {error}", file=sys.stderr)
        return 1
    return 0


def _add_export(commands: argparse._SubParsersAction) -> None:
    about = "write the encoders of a run for timm and transformers, as safetensors"
    command = commands.add_parser("export", help=about, description=about.capitalize() + ".")
    command.add_argument("--weights", type=Path, required=True, metavar="RUN", help="a run")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="is made")
    command.set_defaults(run=_export)


def _export(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.models.export import export
    from vidl.training import open_run

    try:
        model = open_run(args.weights).model
        for file in export(getattr(model, "model", model), args.out):
            print(file)
    except (ValueError, OSError) as error:
        print(f"vidl export: {error}", file=sys.stderr)
        return 1
    return 0


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
