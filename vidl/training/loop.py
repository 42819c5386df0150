"""The training loop: batches, steps, checkpoints. A step depends on its number only."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from vidl import models
from vidl.data.dataset import Batch
from vidl.data.video import generator
from vidl.models.summary import example
from vidl.nn.checkpoints import load_or_explain
from vidl.training import checkpoints, measures, optimizer, parallel, sources
from vidl.training.config import Config
from vidl.training.frozen import frozen
from vidl.training.frozen import save as save_choices
from vidl.training.inputs import arguments
from vidl.training.lock import locked
from vidl.training.progress import Progress

# Weights of modules that only the pre-training losses use.
OPTIONAL = ("decoder.", "text.cls.")
# From a run to its metrics at the current step, such as the recall of retrieval.
Evaluate = Callable[["Training"], Mapping[str, Any]]


def pretrain(config: Config, evaluate: Evaluate | None = None) -> dict[str, Any]:
    """Train a model, or resume the run in the configuration's folder.

    SIGTERM and Ctrl-C save a checkpoint after the current step and end the run. A resumed run
    computes what it would have computed without the interruption; on a CPU with the same number of
    threads bit for bit. With another number of ranks it needs the same global batch
    (`data.batch_size` times ranks) and sees the same clips in the same steps. Dropout and matching
    negatives then differ, since each rank draws its own, and so does the loss of masked words, a
    mean over ranks. Shards need the same number of ranks.

    Args:
        config: configuration of the run.
        evaluate: called on all ranks every `evaluation.every` steps and at the end; its metrics are
            logged. Default: retrieval, if the configuration has an evaluation set.

    Returns:
        "step", whether the run is "finished", and the last record of its log.

    Raises:
        ValueError: the folder has a run with another configuration, a damaged checkpoint, or is in
            use by another process; or from data and model.
        Diverged: the loss or a weight is not finite; the last checkpoint has finite weights.
        RuntimeError: from data and model.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    folder = Path(config.run.folder)
    with parallel.ranks(config.run.device) as ranks, locked(folder, ranks), frozen(folder, ranks):
        return Training(config, ranks, evaluate).run()


class Diverged(RuntimeError):
    """The loss or a weight is NaN or infinite; the run stops and saves nothing."""


class Training:
    """The state of a run.

    Attributes:
        model: the model; FSDP2 shards it in place, see `whole_model`.
        tokenizer: tokenizer of the captions.
        loader: the training batches.
        step: number of completed steps.
    """

    def __init__(
        self, config: Config, ranks: parallel.Ranks, evaluate: Evaluate | None = None
    ) -> None:
        import safetensors.torch  # noqa: F401  fail now, not when the first checkpoint is saved

        self.config, self.ranks = config, ranks
        self.evaluate = evaluate or measures.chosen(config)
        self.folder = Path(config.run.folder)
        self.checkpoint = checkpoints.chosen(self.folder, config.run.resume)
        self._claim_folder()
        resumed = None if self.checkpoint is None else self.folder
        self.tokenizer = sources.open_tokenizer(config, resumed)
        if ranks.first and resumed is None:
            self.tokenizer.save(self.folder / "tokenizer.json")
        self.recipe = config.recipe(vocabulary=sources.vocabulary(self.tokenizer))
        self.loader = sources.open_loader(
            config, self.recipe, self.tokenizer, ranks.rank, ranks.world_size
        )
        self.model = self._model()
        self.parallel = parallel.wrap(self.model, config.run.parallel, ranks)
        self.optimizer = optimizer.make(self.parallel, config.optimizer)
        self.step = 0
        self.record: dict[str, Any] = {}
        self.abandoned: list[Path] = []
        if self.checkpoint is not None:
            self._resume(self.checkpoint)
        self._save_config()

    def _claim_folder(self) -> None:
        """Create the folder, or check that it has a run with the same configuration."""
        file = self.folder / "config.yaml"
        resumes = self.checkpoint is not None and file.exists()
        changed = self.config.changed(Config.read(file)) if resumes else []
        if "data.batch_size" in changed and self.config.data.source != "shards":
            # the global batch must be the same: the sampler compares it
            changed.remove("data.batch_size")
        if changed:
            raise ValueError(
                f"{self.folder} has a run with another {', '.join(changed)}: need the same to "
                "resume it, or another run.folder"
            )
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.ranks.wait()

    def _save_config(self) -> None:
        """Write config.yaml, and set aside the checkpoints after the one that is resumed."""
        self.ranks.wait()  # until all ranks have resumed
        if self.ranks.first:
            resume = self.config.run.resume
            if resume is not None:
                self.abandoned = checkpoints.abandon(self.folder, resume)
            once = dataclasses.replace(self.config.run, resume=None)
            dataclasses.replace(self.config, run=once).save(self.folder / "config.yaml")
            save_choices(self.folder, self.ranks)
        self.ranks.wait()

    def _model(self) -> Any:
        run, start = self.config.run, self.config.start
        torch.manual_seed(run.seed)
        model = self.new_model()
        if self.checkpoint is None:
            if start.model is not None:
                self.begin_with(model, checkpoints.weights_of(start.model))
            if start.vision is not None:
                model.vision.load_pretrained(checkpoints.weights_of(start.vision))
            if start.text is not None:
                model.text.load_pretrained(checkpoints.weights_of(start.text))
        model = model.to(self.ranks.device).train()
        parallel.freeze_unused(model, self._example())
        if run.checkpoint_activations:
            parallel.recompute(model)
        return model

    def new_model(self) -> Any:
        """The model with random weights."""
        return models.MODELS[self.config.model.name][0](self.recipe)

    def begin_with(self, model: nn.Module, weights: dict[str, Any]) -> None:
        """Load weights; those of modules in `OPTIONAL` that this model does not have are skipped.

        Raises:
            ValueError: weights are missing or have another shape; lists each of them.
        """
        own = model.state_dict()
        kept = [name for name in weights if name in own or not name.startswith(OPTIONAL)]
        load_or_explain(model, {name: weights[name] for name in kept})

    def _resume(self, checkpoint: Path) -> None:
        state = checkpoints.load(checkpoint, self.parallel, self.optimizer, self.ranks.device)
        self.step, self.record = state["step"], state["record"]
        loaders = state["loaders"]
        same = len(loaders) == self.ranks.world_size
        self.loader.load_state_dict(loaders[self.ranks.rank if same else 0])

    def whole_model(self) -> Any:
        """The model with all weights on this rank; under FSDP2 a copy."""
        if not isinstance(self.model, FSDPModule):
            return self.model
        weights = get_model_state_dict(
            self.parallel, options=StateDictOptions(full_state_dict=True)
        )
        model = self.new_model().to(self.ranks.device)
        model.load_state_dict(weights)
        return model.eval()

    def save(self) -> None:
        """Write a checkpoint; all ranks must call this.

        Raises:
            Diverged: a weight is not finite; the checkpoints before are kept.
        """
        self._check_weights()
        state = {"loaders": self.ranks.gathered(self.loader.state_dict()), "record": self.record}
        checkpoints.save(
            self.folder,
            self.step,
            self.parallel,
            self.optimizer,
            state,
            keep=self.config.run.keep,
            write=self.ranks.first,
        )
        self.ranks.wait()

    def _check_weights(self) -> None:
        """Raise `Diverged` on all ranks if any rank has a weight that is not finite."""
        own = [x.to_local() if hasattr(x, "to_local") else x for x in self.model.parameters()]
        finite = torch.stack([x.detach().isfinite().all() for x in own]).all()
        if self.ranks.any(not finite):
            raise Diverged(f"a weight is not finite after step {self.step}{self._remedy()}")

    def _check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {self.step}{self._remedy()}")

    def _remedy(self) -> str:
        kept = checkpoints.newest(self.folder)
        last = "there is no checkpoint" if kept is None else f"the last checkpoint is {kept}"
        return f"; {last}. A lower optimizer.lr or more schedule.warmup may help, in a new run"

    def run(self) -> dict[str, Any]:
        """Run the remaining steps."""
        run, steps = self.config.run, self.config.schedule.steps
        progress = None
        if self.ranks.first:
            progress = Progress(self.folder, self.step, steps, tensorboard=run.tensorboard)
            about = f"{self.config.model.name}, {self.ranks.world_size} rank(s)"
            progress.say(f"{self.folder}: {about}, from step {self.step} to {steps}")
            for path in self.abandoned:
                progress.say(f"renamed a later checkpoint: {path}")
        with _stop_signals() as stopped:
            self._steps(progress, stopped)
        self._finish(progress)
        return {"finished": self.step >= steps, **self.record, "step": self.step}

    def _steps(self, progress: Progress | None, stopped: Callable[[], bool]) -> None:
        run, steps = self.config.run, self.config.schedule.steps
        saved, stop = self.step if self.checkpoint else -1, False
        every = self.config.evaluation.every
        batches, watch = iter(self.loader), _Watch(self)
        while self.step < steps and not stop:
            losses, norm = self._make_step(batches)
            self.step += 1
            last = self.step == steps
            if last or self.step % run.log_every == 0:
                self._log(losses, norm, watch, progress)
            if self.evaluate and (last or (every and self.step % every == 0)):
                self._evaluate(progress)
                watch = _Watch(self)
            stop = self.ranks.any(stopped())
            if last or stop or self.step % run.save_every == 0:
                self._check_loss(float(self.ranks.mean(losses["loss"].float().clone())))
                self.save()
                saved = self.step
        assert saved == self.step

    def _make_step(self, batches: Iterator[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step; returns its losses and the gradient norm."""
        options, schedule = self.config.optimizer, self.config.schedule
        self._keep_rate(schedule.prune_over)
        losses: dict[str, Tensor] = {}
        for part in range(options.accumulate):
            inputs = self._inputs(next(batches))
            # dropout depends on the step only, so its generator need not be saved
            place = self.step * options.accumulate + part
            random = generator(self.config.run.seed, place, self.ranks.rank, "dropout")
            torch.manual_seed(random.getrandbits(63))
            with parallel.synced(self.parallel, part == options.accumulate - 1):
                with self._autocast():
                    outputs = self.parallel(**inputs)
                (outputs["loss"] / options.accumulate).backward()
            for name, loss in outputs.items():
                losses[name] = losses.get(name, 0) + loss.detach() / options.accumulate
        norm = parallel.clip(self.parallel, self.ranks, options.clip)
        rate = optimizer.learning_rate(self.step, options.lr, schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses, norm

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return arguments(
            batch,
            self.recipe,
            self.step,
            match=self.config.data.match,
            device=self.ranks.device,
        )

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of autocast; None: no autocast."""
        kind, precision = self.ranks.device.type, self.config.run.precision
        low = precision == "bfloat16" or (precision == "auto" and kind == "cuda")
        return torch.bfloat16 if low else None

    def _example(self) -> dict[str, Any]:
        """Random inputs of the model."""
        return example(self.recipe, 2, self.config.data.words, self.ranks.device)

    def _autocast(self) -> Any:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, self.dtype)

    def _keep_rate(self, over: int) -> None:
        if not over or not hasattr(self.recipe, "keep_rate"):
            return
        rate = optimizer.keep_rate(self.step, self.recipe.keep_rate, self.config.schedule)
        self.model.vision.set_keep_rate(rate)

    def _log(
        self, losses: dict[str, Tensor], norm: Tensor, watch: "_Watch", progress: Progress | None
    ) -> None:
        names = list(losses)
        values = self.ranks.mean(torch.stack([losses[name].float() for name in names])).tolist()
        means = dict(zip(names, values, strict=True))
        self._check_loss(means["loss"])
        rate = self.optimizer.param_groups[0]["lr"]
        self.record = {**means, "lr": rate, "grad_norm": float(norm), **watch.read(self)}
        self.record["losses"] = [name for name in names if name != "loss"]
        if progress is not None:
            progress.record(self.step, self.record)

    def _evaluate(self, progress: Progress | None) -> None:
        assert self.evaluate is not None
        self.model.eval()
        with torch.no_grad():
            metrics = self.evaluate(self)
        self.model.train()
        self.record = {**self.record, "evaluation": dict(metrics)}
        if progress is not None:
            progress.evaluated(self.step, metrics)

    def _finish(self, progress: Progress | None) -> None:
        reports = [report for report in self.ranks.gathered(self.loader.report()) if report]
        if progress is None:
            return
        progress.close()
        for report in reports:
            progress.say(report)
        if self.step < self.config.schedule.steps:
            progress.say(f"stopped at step {self.step}; run the same command to resume")
        else:
            progress.say(f"saved {checkpoints.newest(self.folder)}")


class _Watch:
    """Clips and visible patches per second, and the share of time spent waiting for data."""

    def __init__(self, training: Training) -> None:
        self._from(training)

    def _from(self, training: Training) -> None:
        self.begin, self.step = time.perf_counter(), training.step
        self.waited = training.loader.wait_seconds

    def read(self, training: Training) -> dict[str, float]:
        """Rates since the last call, extrapolated from this rank to all ranks."""
        seconds = time.perf_counter() - self.begin
        steps = training.step - self.step
        config = training.config
        clips = steps * config.optimizer.accumulate * config.data.batch_size
        speed = clips * training.ranks.world_size / seconds
        waited = (training.loader.wait_seconds - self.waited) / seconds
        self._from(training)
        return {
            "seconds_per_step": seconds / steps,
            "clips_per_second": speed,
            "tokens_per_second": speed * training.recipe.visible,
            "data_wait": min(waited, 1.0),
        }


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C was received; a second one ends the process at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
