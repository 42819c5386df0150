"""A callback of transformers' Trainer that swaps the model while it is trained."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vidl.swapping.swap import swap
from vidl.swapping.trainers import Savings, Swapped


class TransformersCallback(TrainerCallback):
    """Swap vidl's kernels into the model of a `transformers.Trainer` for its training.

        trainer = Trainer(model, arguments, callbacks=[TransformersCallback()], ...)

    The model is swapped when the trainer is created, before accelerate wraps it, and restored at
    the end of `train()`; then the saved FLOPs and tokens are printed and added to the trainer's
    `state.log_history`. Checkpoints have the original names and classes.

    Args:
        change: see `vidl.swapping.trainers.Swapped`.

    Attributes:
        savings: see `vidl.swapping.trainers.Swapped`; None before the trainer exists.

    Raises:
        ValueError: when the trainer is created: `change` cannot swap the model.
    """

    def __init__(self, change: Callable[[nn.Module], Any] = swap) -> None:
        self.change = change
        self.savings: Savings | None = None
        self._swapped: Swapped | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        self._start(args, given["model"])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        # Not at the first training, unless the callback was added later or `model_init` is in use.
        if self._swapped is None or self._swapped.model is not given["model"]:
            self._start(args, given["model"])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        if self._swapped is None:
            return
        savings = self._swapped.savings
        self._swapped.stop()
        self._swapped = None
        totals = {f"vidl/{name}": value for name, value in savings.totals().items()}
        if totals:
            state.log_history.append({"step": state.global_step, **totals})
        if state.is_world_process_zero:
            print(f"vidl: {savings}")

    def _start(self, args: TrainingArguments, model: nn.Module) -> None:
        self._swapped = Swapped(model, self.change)
        self._swapped.start()
        self.savings = self._swapped.savings
        self.savings.ranks = args.world_size
        if args.process_index == 0:
            print(f"vidl: {self._swapped.report}")
