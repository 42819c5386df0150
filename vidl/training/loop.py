"""The training loop: batches, steps, checkpoints. A step depends on its number only."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from vidl import models
from vidl.data.dataset import Batch
from vidl.data.text import load_tokenizer
from vidl.data.video import generator
from vidl.nn.checkpoints import load_or_explain
from vidl.training import (
    checkpoints,
    chunks,
    measures,
    names,
    optimizer,
    parallel,
    sources,
    trackers,
)
from vidl.training.config import STREAMS, Config
from vidl.training.frozen import frozen
from vidl.training.frozen import save as save_choices
from vidl.training.inputs import arguments
from vidl.training.lock import locked
from vidl.training.losses import Losses
from vidl.training.progress import Progress
from vidl.training.runs import folder_of
from vidl.training.signals import stop_signals

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
        "step", whether the run is "finished", the "signal" that ended it (0: none), and the last
        record of its log.

    Raises:
        ValueError: the folder has a run with another configuration, a damaged checkpoint, or is in
            use by another process; or from data and model.
        Diverged: the loss or a weight is not finite; the last checkpoint has finite weights.
        RuntimeError: from data and model.
    """
    sources.require_text(config, "caption")
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

        trackers.require(config.run.trackers)
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
        self.step, self.rate = 0, 0.0
        self.record: dict[str, Any] = {}
        self.losses = Losses()
        self.abandoned: list[Path] = []
        if self.checkpoint is not None:
            self._resume(self.checkpoint)
        self._save_config()

    def _claim_folder(self) -> None:
        """Create the folder, or check that it has a run with the same configuration."""
        file = self.folder / "config.yaml"
        resumes = self.checkpoint is not None and file.exists()
        changed = self.config.changed(Config.read(file)) if resumes else []
        if "data.batch_size" in changed and self.config.data.source not in STREAMS:
            # the global batch must be the same: the sampler compares it
            changed.remove("data.batch_size")
        if changed:
            raise ValueError(
                f"{self.folder} has a run with another {', '.join(changed)}: need the same to "
                f"resume it, or another run.folder (start.model={self.folder} begins with its "
                "weights)"
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
        if self.config.optimizer.chunk:
            chunks.check(model)
        if self.checkpoint is None:
            if start.model is not None:
                file = names.local(start.model, "start.model", names.WEIGHTS, marked=True)
                self._check_system(file)
                self.begin_with(model, checkpoints.weights_of(file))
            for part, source in (("vision", start.vision), ("text", start.text)):
                if source is not None:
                    file = names.local(source, f"start.{part}", names.WEIGHTS)
                    model.starts()[part].load_pretrained(checkpoints.weights_of(file))
            self._teach(model)
            model.begin()
        model = model.to(self.ranks.device).train()
        parallel.freeze_unused(model, self._example())
        optimizer.freeze(model, self.config.optimizer.factors)
        if run.checkpoint_activations:
            parallel.recompute(model)
        return model

    def _teach(self, model: Any) -> None:
        """Give a model that learns from a frozen one the weights of `start.teacher`."""
        teacher = self.config.start.teacher
        if teacher is not None:
            models.abilities.need(model, models.Taught, to="for start.teacher")
            self._check_system(teacher, "start.teacher")
            if self.config.data.source in STREAMS:
                raise ValueError(
                    "need data.source clips or moving_shapes with start.teacher, which reads all "
                    f"captions in advance, got {self.config.data.source}"
                )
            tokenizer = load_tokenizer(folder_of(teacher))
            captions = itertools.islice(sources.captions(self.config), sources.CAPTIONS)
            model.teach(checkpoints.weights_of(teacher), tokenizer, captions)
        elif models.can(model, models.Taught) and not model.taught:
            raise ValueError(
                f"need start.teacher, a run of {self.config.model.name} with model.pem=0, or "
                "model.pem=0"
            )

    def _check_system(self, path: str, field: str = "start.model") -> None:
        """Raise if the weights come from a run of another system."""
        try:
            folder = folder_of(path)
        except ValueError:  # a file of weights
            return
        theirs, own = Config.read(folder / "config.yaml").model.name, self.config.model.name
        if theirs != own:
            raise ValueError(
                f"need {field} as a run of {own}, the model.name, got one of {theirs}: {path}"
            )

    def new_model(self) -> Any:
        """The model with random weights."""
        return models.MODELS[self.config.model.name].model(self.recipe)

    def begin_with(self, model: Any, weights: dict[str, Any]) -> None:
        """Load weights; those for pre-training only that this model does not have are skipped.

        Raises:
            ValueError: weights are missing or have another shape; lists each of them.
        """
        own, optional = model.state_dict(), model.pretraining_only
        kept = [name for name in weights if name in own or not name.startswith(optional)]
        load_or_explain(model, model.resized({name: weights[name] for name in kept}))

    def _resume(self, checkpoint: Path) -> None:
        state = checkpoints.load(checkpoint, self.parallel, self.optimizer, self.ranks.device)
        self.step, self.record = state["step"], state["record"]
        self.losses = Losses(state["losses"])
        loaders = state["loaders"]
        same = len(loaders) == self.ranks.world_size
        self.loader.load_state_dict(loaders[self.ranks.rank if same else 0])

    def whole_model(self) -> Any:
        """The model with all weights on this rank; under FSDP2 a copy."""
        if not parallel.is_sharded(self.model):
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
        state = {
            "loaders": self.ranks.gathered(self.loader.state_dict()),
            "record": self.record,
            "losses": self.losses.state(self.ranks),
        }
        checkpoints.save(
            self.folder,
            self.step,
            self.parallel,
            self.optimizer,
            state,
            keep=self.config.run.keep,
            ranks=self.ranks,
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
            values = self.config.values()
            progress = Progress(self.folder, self.step, steps, trackers=run.trackers, values=values)
            ranks = self.ranks.world_size
            about = f"{self.config.model.name}, {ranks} rank{'s' * (ranks > 1)}"
            progress.say(f"{self.folder}: {about}, from step {self.step} to {steps}")
            for path in self.abandoned:
                progress.say(f"renamed a later checkpoint: {path}")
        try:
            with stop_signals(self.ranks.first) as received:
                self._steps(progress, received)
        finally:
            if progress is not None:
                progress.close()
        number = max(self.ranks.gathered(received()))
        self._finish(progress)
        finished = self.step >= steps
        return {"finished": finished, "signal": number, **self.record, "step": self.step}

    def _steps(self, progress: Progress | None, received: Callable[[], int]) -> None:
        run, steps = self.config.run, self.config.schedule.steps
        saved, stop = self.step if self.checkpoint else -1, False
        every = self.config.evaluation.every
        batches, watch = iter(self.loader), _Watch(self)
        while self.step < steps and not stop:
            losses, norm = self._make_step(batches)
            self.losses.add(losses)
            self.step += 1
            if progress is not None:
                progress.step(self.step)
            last = self.step == steps
            if last or self.step % run.log_every == 0:
                self._log(norm, watch, progress)
            if self.evaluate and (last or (every and self.step % every == 0)):
                self._evaluate(progress)
                watch = _Watch(self)
            stop = self.ranks.any(received() > 0)
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
            # dropout depends on the step only, so its generator need not be saved
            place = self.step * options.accumulate + part
            random = generator(self.config.run.seed, place, self.ranks.rank, "dropout")
            outputs = self._backward(next(batches), random, part == options.accumulate - 1)
            for name, loss in outputs.items():
                losses[name] = losses.get(name, 0) + loss.detach() / options.accumulate
        norm = parallel.clip(self.parallel, self.ranks, options.clip)
        self.rate = optimizer.learning_rate(self.step, options.lr, schedule)
        optimizer.set_rate(self.optimizer, self.rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step()
        return losses, norm

    def _backward(self, batch: Batch, random: Random, last: bool) -> dict[str, Tensor]:
        """Add the gradients of a batch; returns its losses."""
        options = self.config.optimizer
        if options.chunk:
            inputs = [self._inputs(part) for part in batch.split(options.chunk)]
            seeds = [random.getrandbits(63) for _ in inputs]
            return chunks.backward(
                self.model, self.parallel, inputs, seeds, self._autocast,
                scale=1 / options.accumulate, last=last,
            )  # fmt: skip
        torch.manual_seed(random.getrandbits(63))
        with parallel.synced(self.parallel, last):
            with self._autocast():
                outputs = self.parallel(**self._inputs(batch))
            (outputs["loss"] / options.accumulate).backward()
        return outputs

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
        return self.recipe.example(2, self.config.data.words, self.ranks.device)

    def _autocast(self) -> Any:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.ranks.device.type, self.dtype)

    def _keep_rate(self, over: int) -> None:
        if not over or not hasattr(self.recipe, "keep_rate"):
            return
        rate = optimizer.keep_rate(self.step, self.recipe.keep_rate, self.config.schedule)
        self.model.set_keep_rate(rate)

    def _log(self, norm: Tensor, watch: "_Watch", progress: Progress | None) -> None:
        means = self.losses.means(self.ranks)
        self._check_loss(means["loss"])
        self.record = {**means, "lr": self.rate, "grad_norm": float(norm), **watch.read(self)}
        self.record["losses"] = [name for name in means if name != "loss"]
        self.losses = Losses()
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
        for report in reports:
            progress.say(report)
        if self.step < self.config.schedule.steps:
            progress.say(f"stopped at step {self.step}; run the same command to resume")
        else:
            progress.say(f"saved {checkpoints.newest(self.folder)}")
            progress.say(
                f"this run is finished; to train longer, begin another with its weights: "
                f"start.model={self.folder} run.folder={self.folder}-2"
            )


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
