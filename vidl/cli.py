"""The command line: one function for each subcommand, with its imports inside.

So `vidl --help` answers at once, and a subcommand loads only what it needs.
"""

import argparse
import ast
import json
import sys
from collections.abc import Sequence


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
    _add_summary(commands)
    args = parser.parse_args(argv)
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
        help="time the ops against their peers, after checking the answers of both",
        description="Time the ops of vidl against what one would write without it. Every answer "
        "and gradient is compared with a more precise one first; a wrong one gets no time.",
    )
    add = command.add_argument
    add("ops", nargs="*", metavar="OP", help="which ops; default: all")
    add("--shapes", metavar="PATTERN", help="only shapes whose name matches, as in 'G1*' or 0.9")
    add("--peers", metavar="PATTERN", help="only peers whose name matches; ours always run")
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
    add("--quick", action="store_true", help="one sample a batch and few repetitions: for a look")
    command.set_defaults(run=_bench)


def _bench(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.bench import harness

    try:
        plan = harness.plan(
            args.ops,
            shapes=args.shapes,
            peers=args.peers,
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
    for records in harness.run(plan):
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
        overrides = dict(map(_field, args.overrides))
        model = models.create(args.model, args.preset, **overrides).to(args.device)
        sizes = {"batch": args.batch, "words": args.words, "steps": args.steps}
        print(models.summarize(model, **sizes))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return 0


def _field(text: str) -> tuple[str, object]:
    """A field of a recipe and its value, a Python literal or else a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"need FIELD=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
