"""The command line: one function for each subcommand, with its imports inside.

So `vidl --help` answers at once, and a subcommand loads only what it needs.
"""

import argparse
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import vidl
from vidl.bench import commands as bench_commands
from vidl.bench.tuning import commands as tuning

# How often an OpenMP thread that waits looks for work before it sleeps. By default it spins for
# milliseconds, and takes the core from the thread that it waits for, if the cores are shared.
SPINS = "1000"

# Modules of the extras in pyproject.toml: the package that has the module, and the extra.
EXTRAS = {
    "PIL": ("pillow", "data"), "av": ("av", "data"), "datasets": ("datasets", "datasets"),
    "matplotlib": ("matplotlib", "bench"),
    "huggingface_hub": ("huggingface_hub", "hub"), "pyarrow": ("pyarrow", "data"),
    "ray": ("ray", "ray"), "safetensors": ("safetensors", "train"),
    "shtab": ("shtab", "completion"), "timm": ("timm", "timm"),
    "tensorboard": ("tensorboard", "trackers"), "mlflow": ("mlflow-skinny", "trackers"),
    "tokenizers": ("tokenizers", "data"), "torchvision": ("torchvision", "augment"),
    "wandb": ("wandb", "trackers"),
    "transformers": ("transformers", "hf"), "webdataset": ("webdataset", "shards"),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command `vidl`; the manual lists its commands and options."""
    parser = argparse.ArgumentParser(
        prog="vidl", description="Fast training of masked and token-pruned video models."
    )
    parser.add_argument("--version", action="version", version=f"vidl {vidl.__version__}",
                        help="show the version of vidl and exit")  # fmt: skip
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_info(commands)
    _add_init(commands)
    _add_bench(commands)
    bench_commands.add(commands)
    _add_systems(commands)
    _add_recipe(commands)
    _add_summary(commands)
    _add_data(commands)
    _add_pretrain(commands)
    _add_finetune(commands)
    _add_eval(commands)
    _add_export(commands)
    _add_completion(commands)
    _set_parsers(parser)
    return parser


def _set_parsers(parser: argparse.ArgumentParser) -> None:
    """Let each command report errors with its own usage."""
    parser.set_defaults(parser=parser)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _set_parsers(child)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `vidl`.

    Args:
        argv: the arguments after the command's name; default: those of this process.

    Returns:
        The exit status: 0 if all is well; 1 if the command reports a problem or needs a package
        that is not installed. Invalid arguments raise `SystemExit` with status 2, as argparse does.
    """
    _limit_spinning()
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"] and words[1:2] and words[1] in bench_commands.READERS:
        words[:2] = [" ".join(words[:2])]
    try:
        args = _parse(parser, words)
        return args.run(args.parser, args)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        package, extra = EXTRAS[module]
        install = f"pip install 'vidl-kernels[{extra}]'"
        print(f'vidl {words[0]} needs {package} (extra "{extra}"): {install}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `vidl info | head`
        sys.stderr.close()
        return 0


def _limit_spinning() -> None:
    """Let OpenMP threads that wait sleep early; libgomp reads this when torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    args, rest = parser.parse_known_args(words)
    # argparse leaves a FIELD=VALUE that follows an option in `rest`.
    if hasattr(args, "overrides") and not [word for word in rest if word.startswith("-")]:
        args.overrides, rest = [*args.overrides, *rest], []
    if rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


Command = Callable[[argparse.ArgumentParser, argparse.Namespace], int]


def _report_errors(command: Command) -> Command:
    """Print an error in the files, the clips or the configuration as one line; exit status 1."""

    @functools.wraps(command)
    def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
        try:
            return command(parser, args)
        except Exception as error:
            from vidl.data.dataset import TooManyBroken
            from vidl.data.video import BrokenClip, NoDecoder
            from vidl.training import Diverged
            from vidl.training.parallel import NoDevice

            known = (TooManyBroken, BrokenClip, NoDecoder, Diverged, NoDevice, ValueError, OSError)
            if not isinstance(error, known):
                raise
            name = command.__name__.strip("_").split("_")[0]
            print(f"vidl {name}: {error}", file=sys.stderr)
            return 1

    return run


def _add_info(commands: argparse._SubParsersAction) -> None:
    about = "show versions, the build, devices, video decoders and the backends of each op"
    command = commands.add_parser("info", help=about, description=about.capitalize() + ".")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_info)


def _info(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl import info

    facts = info.collect()
    print(json.dumps(facts, indent=2) if args.json else info.render(facts))
    return 0


def _add_init(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "init",
        help="write a commented configuration for your own clips",
        description="Write NAME.yaml, a configuration of `vidl pretrain` for your own clips: every "
        "field with its meaning. A file that exists is never overwritten.",
    )
    add = command.add_argument
    add("name", metavar="NAME", help="name of the run; its clips default to NAME.json")
    add("overrides", nargs="*", metavar="SECTION.FIELD=VALUE", help="e.g. model.preset=small")
    command.set_defaults(run=_init)


def _init(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.training import template

    try:
        file = template.write(args.name, args.overrides)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {file}; name your annotations in data.files, then: vidl pretrain --config {file}")
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


def _add_systems(commands: argparse._SubParsersAction) -> None:
    about = "list the systems: features, architecture, objectives, data and tasks of each"
    command = commands.add_parser("systems", help=about, description=f"L{about[1:]}.")
    add = command.add_argument
    add("--write", nargs="+", type=Path, metavar="FILE", help="Markdown files to update between "
        "<!-- systems --> and <!-- /systems -->")  # fmt: skip
    command.set_defaults(run=_systems)


def _systems(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.models import MODELS, cards

    if not args.write:
        print(cards.text(MODELS))
    for file in args.write or ():
        try:
            cards.update(file, cards.markdown(MODELS))
        except (OSError, ValueError) as error:
            parser.error(f"{file}: {error}")
    return 0


def _add_recipe(commands: argparse._SubParsersAction) -> None:
    about = "print a recipe: what its paper states, all fields, tokens and FLOPs"
    command = commands.add_parser("recipe", help=about, description=f"P{about[1:]}.")
    add = command.add_argument
    add("model", help="a model of `vidl systems`")
    add("overrides", nargs="*", metavar="FIELD=VALUE", help="recipe fields, e.g. mask_ratio=0.5")
    add("--preset", default="base", help="tiny, small, base or another (default: base)")
    command.set_defaults(run=_recipe)


def _recipe(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl import models, overrides
    from vidl.models import cards
    from vidl.training.config import explain_recipe

    try:
        model = models.create(args.model, args.preset, **overrides.parse(args.overrides))
    except ValueError as error:
        parser.error(str(error))
    print(cards.describe(args.model, models.MODELS[args.model]))
    print(f"\nfields, preset {args.preset}:")
    print("\n".join(explain_recipe(model.recipe)))
    print(f"\n{models.summarize(model)}")
    return 0


def _add_summary(commands: argparse._SubParsersAction) -> None:
    about = "print tokens, parameters, FLOPs and memory of a model: dense, masked and pruned"
    command = commands.add_parser("summary", help=about, description=f"P{about[1:]}.")
    add = command.add_argument
    add("model", help="a model of `vidl systems`")
    add("overrides", nargs="*", metavar="FIELD=VALUE", help="recipe fields, e.g. mask_ratio=0.5")
    add("--preset", default="base", help="tiny, small, base or another (default: base)")
    add("--batch", type=int, default=2, help="batch size (default: 2)")
    add("--words", type=int, default=32, help="tokens of each caption (default: 32)")
    add("--steps", type=int, default=0, help="steps to time (default: 0)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    command.set_defaults(run=_summary)


def _summary(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    import torch

    from vidl import models, overrides

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("need a GPU for --device cuda, torch sees none; choose --device cpu")
    try:
        fields = overrides.parse(args.overrides)
        model = models.create(args.model, args.preset, **fields).to(args.device)
        sizes = {"batch": args.batch, "words": args.words, "steps": args.steps}
        print(models.summarize(model, **sizes))
    except ValueError as error:
        parser.error(str(error))
    return 0


def _add_data(commands: argparse._SubParsersAction) -> None:
    about = "convert annotations, check and preview clips, write shards, time video decoders"
    data = commands.add_parser("data", help=about, description=about.capitalize() + ".")
    parts = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    part = parts.add_parser(
        "convert",
        help="convert annotations of a known format to an Arrow table",
        description="Convert annotations to an Arrow table. Workers memory-map the table and share "
        "its pages, so memory does not grow with the number of rows. What `vidl data check` "
        "reads needs no conversion: vidl converts it on first use.",
    )
    part.add_argument("file", type=Path, help="annotation file, folder, or glob of files")
    part.add_argument("out", type=Path, nargs="?", help="default: the same name with .arrow")
    part.add_argument(
        "--format",
        help="common (JSON list of {video or image, caption}, also questions and multiple choice; "
        "default), csv (see --columns; default for .csv, .tsv), webvid (CSV), cc3m (TSV), msrvtt "
        "(JSON, or the CSV of the 1k-A test), didemo, activitynet (paragraphs), msrvtt-qa, "
        "activitynet-qa (*_q.json), nlvr2 (JSON lines), vqa (*OpenEnded_*_questions.json)",
    )
    about = "folder of the clips; file names in the table get the suffixes of its files"
    part.add_argument("--media", type=Path, help=about)
    part.add_argument("--split", help="msrvtt: keep only train, validate or test")
    part.add_argument("--ids", type=Path, help="msrvtt: keep only videos listed in this CSV")
    part.add_argument(
        "--columns",
        metavar="FIELD=COLUMN,...",
        help="csv: columns of a CSV or TSV file with a header, e.g. video=path,caption=text; "
        "fields: video or image, caption, question, answer, id, start, end, second, label "
        "(default: the columns "
        "with these names, with file_name or path, and text)",
    )
    part.set_defaults(run=_data_convert)

    part = parts.add_parser(
        "check",
        help="decode every clip and list the broken ones",
        description="Decode every frame of every clip. Lists clips that are missing, broken, "
        "damaged, or shorter than their header says. Exit status 1 if any is missing, broken or "
        "damaged.",
    )
    _add_source(part)
    part.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="threads (default: one per core)"
    )
    part.set_defaults(run=_data_check)

    part = parts.add_parser(
        "preview",
        help="draw some clips with their captions",
        description="Write a picture of randomly chosen clips: captions, frames and, with "
        "--mask-ratio, the same frames under a random mask.",
    )
    _add_source(part)
    add = part.add_argument
    add("--out", type=Path, default=Path("preview.png"), help="picture (default: preview.png)")
    add("--clips", type=int, default=8, help="number of clips (default: 8)")
    add("--frames", type=int, default=4, help="frames of each clip (default: 4)")
    add("--size", type=int, default=224, help="height and width of a frame (default: 224)")
    add("--mask-ratio", type=float, help="share of masked patches, e.g. 0.65 (default: no mask)")
    add("--patch", type=int, default=16, help="height and width of a patch (default: 16)")
    add("--seed", type=int, default=0, help="seed of the choice of clips and of the mask")
    part.set_defaults(run=_data_preview)

    part = parts.add_parser(
        "speed",
        help="time video decoders: clips per second",
        description="Read training samples in one process with each available decoder and from the "
        "cache of data.cache, in turns, and print clips per second.",
    )
    _add_source(part)
    add = part.add_argument
    add("--clips", type=int, default=64, help="clips to read (default: 64)")
    add("--frames", type=int, default=4, help="frames of each clip (default: 4)")
    add("--size", type=int, default=224, help="height and width of a frame (default: 224)")
    add("--seed", type=int, default=0, help="seed of the sampled frames and crops")
    part.set_defaults(run=_data_speed)

    part = parts.add_parser(
        "shard",
        help="write webdataset shards of smaller clips, for large data",
        description="Decode every clip once and write it, smaller and without sound, to tar files "
        "with its captions, in random order. `data.source=shards` reads them. Continues where an "
        "earlier call was interrupted. Exit status 1 if any clip is broken.",
    )
    _add_source(part)
    add = part.add_argument
    add("out", type=Path, help="folder of the shards")
    size = part.add_mutually_exclusive_group()
    size.add_argument("--short", type=int, default=256, metavar="PIXELS", help="shorter side; "
                      "smaller clips keep their size (default: 256)")  # fmt: skip
    size.add_argument("--copy", action="store_true", help="copy files as they are, and cut out "
                      "annotated parts")  # fmt: skip
    add("--per-shard", type=int, default=1000, help="samples of a shard (default: 1000)")
    add("--seed", type=int, default=0, help="seed of the order")
    add(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    add("--ray", metavar="ADDRESS", help="write on the nodes of this Ray cluster, such as auto or "
        "local, in place of --workers; all nodes need the same folders")  # fmt: skip
    part.set_defaults(run=_data_shard)


def _add_source(part: argparse.ArgumentParser) -> None:
    about = (
        "annotations: common JSON, JSON lines, an Arrow table, CSV or TSV with columns such as "
        "path,caption or file_name,text, a folder with metadata.csv or metadata.jsonl or with "
        "a.txt beside a.mp4, or a quoted glob of these"
    )
    part.add_argument("file", type=Path, help=about)
    about = (
        "folder of the clips; default: clips/ beside clips.json if it exists, else the same folder"
    )
    part.add_argument("--media", type=Path, help=about)
    _add_outside(part)


def _add_outside(part: argparse.ArgumentParser) -> None:
    about = "the annotations may name files outside the folder of the clips"
    part.add_argument("--outside", action="store_true", help=about)


@_report_errors
def _data_convert(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    msrvtt = args.format == "msrvtt"
    options: dict[str, Any] = {"split": args.split, "ids": args.ids} if msrvtt else {}
    if not options and (args.split or args.ids):
        parser.error(f"--split and --ids are for --format msrvtt, not {args.format or 'common'}")
    if args.columns is not None:
        if args.format not in (None, "csv"):
            parser.error(f"--columns is for --format csv, not {args.format}")
        pairs = [pair.partition("=") for pair in args.columns.split(",")]
        if not all(field and column for field, _, column in pairs):
            parser.error(f"need --columns as FIELD=COLUMN,FIELD=COLUMN,..., got {args.columns!r}")
        options = {"columns": {field: column for field, _, column in pairs}}
        args.format = "csv"
    from vidl.data import commands

    commands.convert(args.file, args.out, format=args.format, media=args.media, **options)
    return 0


@_report_errors
def _data_check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.data import commands

    options = {"workers": args.workers, "outside": args.outside}
    return 1 if commands.check(args.file, args.media, **options) else 0


@_report_errors
def _data_shard(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.data import commands

    names = ("per_shard", "seed", "workers", "ray", "outside")
    options = {name: getattr(args, name) for name in names}
    short = None if args.copy else args.short
    return 1 if commands.shard(args.file, args.media, args.out, short=short, **options) else 0


@_report_errors
def _data_preview(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.mask_ratio is not None and not 0 <= args.mask_ratio <= 1:
        parser.error(f"need a --mask-ratio from 0 to 1, got {args.mask_ratio}")
    from vidl.data import commands

    names = ("clips", "frames", "size", "mask_ratio", "patch", "seed", "outside")
    options = {name: getattr(args, name) for name in names}
    return 1 if commands.preview(args.file, args.media, args.out, **options) else 0


@_report_errors
def _data_speed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if args.clips < 1:
        parser.error(f"need --clips >= 1, got {args.clips}")
    from vidl.data import commands

    options = {name: getattr(args, name) for name in ("clips", "frames", "size", "seed", "outside")}
    return 1 if commands.speed(args.file, args.media, **options) else 0


def _add_pretrain(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "pretrain",
        help="pre-train a model on clips and captions, or resume a run",
        description="Pre-train a model on clips and captions. Run the same command again to resume "
        "a run that was stopped. On several GPUs: torchrun --nproc-per-node 8 -m vidl pretrain ...",
        add_help=False,
    )
    _add_configuration(command)
    command.set_defaults(run=_pretrain)


def _add_configuration(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("-h", "--help", action=_HelpOnFields, help="show this help and every configuration field")
    add("--config", type=Path, metavar="FILE", help="YAML file of sections and their fields")
    add("overrides", nargs="*", metavar="SECTION.FIELD=VALUE", help="e.g. data.files=[a.json]")
    tuning.add_option(command)


class _HelpOnFields(argparse.Action):
    """Print the help of a command and of every configuration field; imports PyTorch."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from vidl.training import config

        print(f"{parser.format_help()}\n{config.explain()}")
        parser.exit()


@_report_errors
def _pretrain(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.training import Config, pretrain

    try:
        config = Config.read(args.config, args.overrides)
    except ValueError as error:
        parser.error(str(error))
    tuning.before_training(config, args.tune)
    return _status(pretrain(config))


def _status(result: dict[str, Any]) -> int:
    """130 after Ctrl-C, as shells expect; a run that SIGTERM stopped ended as it should."""
    return 130 if result["signal"] == signal.SIGINT else 0


def _add_finetune(commands: argparse._SubParsersAction) -> None:
    about = "fine-tune a pre-trained model for retrieval, question answering, captions or pairs"
    command = commands.add_parser("finetune", help=about, description=about.capitalize() + ".")
    tasks = command.add_subparsers(title="tasks", metavar="TASK", required=True)
    for task, about in (
        ("retrieval", "for retrieval, with the losses of the model"),
        ("qa", "for question answering: a classifier of the most frequent answers on the fusion "
            "encoder, or a decoder that ranks them"),
        ("caption", "for captions: a decoder that writes them word by word"),
        ("pair", "for sentences about two clips, as in NLVR2: does the sentence hold?"),
    ):  # fmt: skip
        part = tasks.add_parser(
            task,
            help=f"fine-tune {about}",
            description=f"Fine-tune a pre-trained model {about}. The configuration defaults to "
            "that of the pre-training run with model.mask_ratio=0, optimizer.lr=1e-5 and "
            "run.folder=finetuned (and model.word_ratio=0 for mac), but without its data: name "
            "data.files, unless they are moving_shapes. Run the same command again to resume a run "
            "that was stopped.",
            add_help=False,
        )
        _add_configuration(part)
        add = part.add_argument
        add("--weights", type=Path, required=True, metavar="RUN", help="a run or a checkpoint")
        if task == "qa":
            add("--answers", type=int, default=1500, help="size of the answer set (default: 1500)")
            about = "classifier of answers, or ranking by a decoder (default: classifier)"
            add("--form", choices=("classifier", "ranking"), default="classifier", help=about)
            about = "answers that a ranking scores by all of their words (default: 128)"
            add("--top", type=int, default=128, help=about)
        if task in ("qa", "caption"):
            whose = "decoder" if task == "caption" else "decoder of a ranking"
            add("--layers", type=int, default=3, help=f"layers of the {whose} (default: 3)")
        part.set_defaults(run=_finetune, task=task)


@_report_errors
def _finetune(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.training import configuration, finetune

    try:
        config = configuration(args.weights, args.config, args.overrides, task=args.task)
    except ValueError as error:
        parser.error(str(error))
    tuning.before_training(config, args.tune)
    names = {"qa": ("answers", "form", "layers", "top"), "caption": ("layers",)}.get(args.task, ())
    options = {name: getattr(args, name) for name in names}
    return _status(finetune(args.task, config, **options))


def _add_eval(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "eval",
        help="evaluate a trained model: retrieval, multiple choice, questions, captions, pairs",
        description="Evaluate a trained model: retrieval in both directions (retrieval), multiple "
        "choice (mc), open questions (qa), captions by BLEU-4, ROUGE-L and CIDEr-D (caption; "
        "--json also has the captions) or sentences about two clips (pair). A clip that cannot be "
        "read counts as a miss and is listed; it is never replaced. On several GPUs: torchrun "
        "--nproc-per-node 8 -m vidl eval ...",
    )
    add = command.add_argument
    add("task", choices=("retrieval", "mc", "qa", "caption", "pair"), help="the task")
    add("--weights", type=Path, required=True, metavar="RUN", help="a run or a checkpoint")
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help="annotations as for `vidl data check`; default: synthetic clips, options or questions "
        "if the run is on moving_shapes",
    )
    add("--media", type=Path, help="folder of the clips; default: as for `vidl data check`")
    _add_outside(command)
    add("--rerank", type=int, default=0, metavar="K", help="re-rank the top K (default: 0)")
    about = "caption: beams of beam search; 1: greedy (default: 5)"
    add("--beams", type=int, metavar="K", help=about)
    about = "caption: scores are log p / words^X (default: 1)"
    add("--length-penalty", type=float, metavar="X", help=about)
    about = "caption: tokens of a caption at most, with [SEP] (default: as in training)"
    add("--words", type=int, help=about)
    add("--batch", type=int, default=32, help="batch size (default: 32)")
    add("--workers", type=int, default=0, help="processes that read clips (default: 0)")
    add("--masked", action="store_true", help="mask clips as in training (default: no mask)")
    add("--unpruned", action="store_true", help="keep all tokens and frames")
    about = "auto: cuda if available (default: auto)"
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help=about)
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="precision of matmuls (default: float32)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write the result to this file")
    command.set_defaults(run=_eval)


@_report_errors
def _eval(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    import torch

    from vidl.evaluation import Options
    from vidl.files import replaced
    from vidl.training import parallel, runs

    if args.rerank and args.task != "retrieval":
        parser.error(f"--rerank is for retrieval, not {args.task}")
    if args.masked and args.task == "pair":
        parser.error("--masked is not for pair: pairs of clips are not masked in evaluation")
    names = ("beams", "length_penalty", "words")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given and args.task != "caption":
        option = f"--{next(iter(given))}".replace("_", "-")
        parser.error(f"{option} is for caption, not {args.task}")
    options = Options(
        batch_size=args.batch,
        workers=args.workers,
        masked=args.masked,
        pruned=not args.unpruned,
        dtype=None if args.dtype == "float32" else getattr(torch, args.dtype),
    )
    with parallel.ranks(args.device) as ranks:
        data = None if args.data is None else (args.data, args.media)
        result = runs.evaluate(
            args.weights, args.task, data, ranks, options, args.rerank,
            caption=runs.CaptionOptions(**given), outside=args.outside,
        )  # fmt: skip
        if ranks.first:
            print(result)
        if ranks.first and args.json is not None:
            with replaced(args.json) as unfinished:
                unfinished.write_text(result.to_json() + "\n")
    return 0


def _add_export(commands: argparse._SubParsersAction) -> None:
    about = "export the encoders of a run for timm and transformers, as safetensors"
    command = commands.add_parser("export", help=about, description=about.capitalize() + ".")
    command.add_argument("--weights", type=Path, required=True, metavar="RUN", help="a run")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    command.set_defaults(run=_export)


@_report_errors
def _export(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.models.export import export
    from vidl.training import open_run

    trained = open_run(args.weights)
    model = getattr(trained.model, "model", trained.model)
    for file in export(model, args.out, trained.tokenizer):
        print(file)
    return 0


def _add_completion(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "completion",
        help="print the completion of a shell",
        description="Print a script that completes the commands and options of vidl, for example: "
        "vidl completion bash > ~/.local/share/bash-completion/completions/vidl",
    )
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")
    command.set_defaults(run=_completion)


def _completion(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(build_parser(), args.shell))
    return 0


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
