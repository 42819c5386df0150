"""Trackers of experiments by name: TensorBoard, Weights & Biases and MLflow."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Tracker = Literal["tensorboard", "wandb", "mlflow"]
# A tracker that is open: it logs numbers at a step, and closes.
Open = tuple[Callable[[int, dict[str, float]], Any], Callable[[], Any]]


def require(names: Sequence[str]) -> None:
    """Raise if the package of a tracker is not installed.

    Raises:
        ModuleNotFoundError: names the package and the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            install = f"pip install {name}"
            raise ModuleNotFoundError(f"run.trackers needs {name}: {install}", name=name)


class Trackers:
    """The trackers of a run.

    They write below the folder of the run: tensorboard/, wandb/ (offline, unless WANDB_MODE says
    otherwise) and mlflow/ (unless MLFLOW_TRACKING_URI is set). A tracker that fails causes one
    warning and is closed; training goes on. A resumed run is a new run of W&B and MLflow.

    Args:
        names: of trackers.
        folder: folder of the run.
        values: the configuration of the run.
        warn: prints a warning.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        values: Mapping[str, Any],
        warn: Callable[[str], Any],
    ) -> None:
        self._warn = warn
        self._open: dict[str, Open] = {}
        for name in dict.fromkeys(names):
            with self._guarded(name):
                self._open[name] = OPENERS[name](folder, values)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers at a step."""
        for name, (log, _) in list(self._open.items()):
            with self._guarded(name):
                log(step, dict(values))

    def close(self) -> None:
        """Write what is left."""
        for name, (_, close) in list(self._open.items()):
            with self._guarded(name):
                close()
        self._open = {}

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._warn(f"warning: {name} cannot write, and training goes on without it: {reason}")


def _tensorboard(folder: Path, values: Mapping[str, Any]) -> Open:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("configuration", "".join(f"    {n}: {x}\n" for n, x in values.items()))

    def log(step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()  # raises what the thread of the writer could not write

    return log, writer.close


def _wandb(folder: Path, values: Mapping[str, Any]) -> Open:
    import wandb

    mode: Any = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(
        project="vidl",
        name=folder.name,
        dir=str(folder),
        config=dict(values),
        mode=mode,
        settings=wandb.Settings(silent=True),
    )
    return lambda step, numbers: run.log(numbers, step=step), run.finish


def _mlflow(folder: Path, values: Mapping[str, Any]) -> Open:
    from mlflow.tracking import MlflowClient

    # MLflow refuses its file store without this, since it prefers a database.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    store = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlflow").absolute().as_uri()
    client = MlflowClient(tracking_uri=store)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "vidl")
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    run = client.create_run(experiment, run_name=folder.name).info.run_id
    for field, value in values.items():
        client.log_param(run, field, value)

    def log(step: int, numbers: dict[str, float]) -> None:
        for field, number in numbers.items():
            client.log_metric(run, field.replace("@", " at "), number, step=step)

    return log, lambda: client.set_terminated(run)


OPENERS: dict[str, Callable[[Path, Mapping[str, Any]], Open]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
