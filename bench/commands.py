"""The commands that measure steps and read results; `vidl bench` itself is in vidl/cli.py.

Imports are inside the functions, so that `vidl --help` stays quick.
"""

import argparse
import json

# The second word of `vidl bench ...` that makes it a command of its own.
READERS = ("compare",)


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the commands."""
    _add_compare(commands)


def _add_compare(commands: argparse._SubParsersAction) -> None:
    about = "what became faster or slower from one set of results to another, beyond noise"
    command = commands.add_parser(
        "bench compare",
        help=about,
        description=about.capitalize() + ". Exit status 1 if anything of vidl became slower, that "
        "is if the 20 to 80 % quantiles of its times do not overlap, or wrong.",
    )
    add = command.add_argument
    add("old", help="JSON lines, a folder of them, or a commit, of which bench/results is read")
    add("new", help="as old")
    add("--json", action="store_true", help="print JSON lines, of what is the same too")
    command.set_defaults(run=_compare)


def _compare(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from vidl.bench import compare, history

    try:
        changes = compare.compare(history.load(args.old), history.load(args.new))
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
