"""The command `vidl tune`, and tuning before the first step of a run."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidl.bench.tuning.sources import Calls
    from vidl.training import Config

# Seconds before a run: what has not begun by then is left to the rule.
BUDGET, TIMEOUT = 100.0, 20.0


def add(commands: argparse._SubParsersAction) -> None:
    """Add the parser of the command."""
    command = commands.add_parser(
        "tune",
        help="measure the backends on this device, so that 'auto' takes the fastest correct one",
        description="Measure the backends of the ops on this device, each checked against the "
        "reference in a process of its own, and store the fastest correct one for every shape. "
        "backend='auto' then takes it, in all processes of this user.",
    )
    add = command.add_argument
    about = (
        "a model of `vidl systems`, or a file for `vidl pretrain`; default: shapes of `vidl bench`"
    )
    add("target", nargs="?", metavar="MODEL|CONFIG", help=about)
    add("overrides", nargs="*", metavar="FIELD=VALUE", help="recipe fields, or section.field=value")
    add("--ops", metavar="LIST", help="only these ops")
    add("--shapes", metavar="PATTERN", help="without a model: only shapes whose name matches")
    add("--preset", default="base", help="of a model: tiny, small, base or another (default: base)")
    add("--batch", type=int, help="of a model: clips of a step (default: that of vidl savings)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--dtype", help="float32, bfloat16 or float16; default: bfloat16 on CUDA, else float32")
    about = "start no further measurement after this time"
    add("--budget", type=float, metavar="SECONDS", help=about)
    add("--again", action="store_true", help="repeat earlier measurements")
    add("--quick", action="store_true", help="without a model: one sample of each shape")
    add("--dry-run", action="store_true", help="list the calls and what 'auto' takes now")
    add("--json", action="store_true", help="print JSON lines in place of a table")
    command.set_defaults(run=_tune)


def _tune(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    import torch

    from vidl.bench.tuning import tune
    from vidl.kernels import choices

    if choices.forced():
        parser.error(f"unset VIDL_BACKEND={choices.forced()}: it overrides what is measured")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("need a GPU for --device cuda, torch sees none; choose --device cpu")
    try:
        calls = _calls(args, device)
    except ValueError as error:
        parser.error(str(error))
    if args.dry_run:
        for call in calls.values():
            print(tune.dry_run(call, args.json))
        return 0
    outcomes = tune.tune_calls(calls.values(), again=args.again, budget=args.budget)
    if args.json:
        print("\n".join(json.dumps(outcome.as_json()) for outcome in outcomes))
    else:
        print(tune.table(outcomes))
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


def _calls(args: argparse.Namespace, device: str) -> "Calls":
    """The calls that the arguments ask for.

    Raises:
        ValueError: an unknown name, or no call is left.
    """
    from vidl import models, overrides
    from vidl.bench.measure import cases
    from vidl.bench.tuning import sources
    from vidl.training import Config

    names = [name.strip() for name in args.ops.split(",")] if args.ops else []
    if args.dtype is not None and args.dtype not in cases.DTYPES:
        raise ValueError(f"need --dtype among {', '.join(cases.DTYPES)}, got {args.dtype}")
    dtype = None if args.dtype is None else cases.DTYPES[args.dtype]
    if args.target is None:
        dtypes = None if args.dtype is None else [args.dtype]
        options: Any = {"dtypes": dtypes, "shapes": args.shapes, "quick": args.quick}
        return sources.of_benchmarks(names, device=device, **options)
    if args.target in models.MODELS:
        fields = overrides.parse(args.overrides)
        options = {"batch": args.batch, "device": device, "dtype": dtype}
        calls = sources.of_recipe(args.target, args.preset, fields, **options)
    elif Path(args.target).is_file():
        config = Config.read(args.target, args.overrides)
        calls = sources.of_config(config, device=device, dtype=dtype)
    else:
        known = ", ".join(models.MODELS)
        raise ValueError(f"need a model among {known}, or a configuration file, got {args.target}")
    chosen = {key: call for key, call in calls.items() if not names or key.op in names}
    if not chosen:
        raise ValueError(f"need ops that {args.target} calls, got {args.ops}")
    return chosen


def add_option(command: argparse.ArgumentParser) -> None:
    """Add --tune and --no-tune to a command that owns a run."""
    command.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        help="measure the kernels for this model before the first step, for at most two minutes "
        "(default: on a GPU)",
    )


def before_training(config: "Config", wanted: bool | None) -> None:
    """Tune the shapes of a run of `vidl pretrain`; a resumed run keeps its choices."""
    import torch

    from vidl.bench.tuning import sources
    from vidl.training import frozen

    device = config.run.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if frozen.resumes(Path(config.run.folder)):
        return
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    before_run(lambda: sources.of_config(config, device=device), device, wanted)


def before_run(calls: Callable[[], "Calls"], device: str, wanted: bool | None) -> None:
    """Tune what has no entries; only in the first rank of torchrun, for which the others wait.

    Args:
        calls: records them.
        wanted: of the option; None: on CUDA only.
    """
    import torch

    from vidl.kernels import choices

    if choices.forced() or (device == "cuda" and not torch.cuda.is_available()):
        return  # of a missing GPU the run says so
    if not (device == "cuda" if wanted is None else wanted) or os.environ.get("RANK", "0") != "0":
        return
    from vidl.bench.tuning import tune

    try:
        new = [call for call in calls().values() if not tune.entries(call)]
        if not new:
            return
        about = f"measuring {len(new)} calls of this model, for at most two minutes"
        print(f"vidl: {about} (--no-tune skips it)", file=sys.stderr)
        outcomes = tune.tune_calls(new, budget=BUDGET, timeout=TIMEOUT)
    except RuntimeError as error:  # out of memory: the run may fit, or says so itself
        print(f"vidl: not tuned: {str(error).splitlines()[0]}", file=sys.stderr)
        return
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    print(tune.table(outcomes), file=sys.stderr)
