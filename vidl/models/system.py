"""The base of all models: losses by name, and what a run changes between steps."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vidl.kernels.arguments import check_dtype, check_shape, check_tensors
from vidl.kernels.patches import check_video
from vidl.masking import VisualMask
from vidl.masking.visual import check_mask
from vidl.models.cards import Card


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of `System.forward`."""

    video: Tensor
    ids: Tensor
    attention_mask: Tensor
    samples: Tensor
    step: int | Tensor = 0
    clip_ids: Tensor | None = None
    words: int | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """What the objectives of a step share; None where a model has no such thing.

    Attributes:
        inputs: the batch.
        mask: the visible patches; None: all.
        clips: tokens of the clips, from `encode_clips`.
        text: tokens of the captions, from `encode_text`.
        v, t: features of clips, [B, embed_dim] or [B, T, embed_dim], and of captions.
        more: what only the objectives of this model need.
    """

    inputs: Inputs
    mask: VisualMask | None = None
    clips: Any = None
    text: Any = None
    v: Any = None
    t: Any = None
    more: Any = None


# From a model and what a step has encoded to a loss; None: this batch has no such loss.
Objective = Callable[[Any, Seen], Tensor | None]


class System(nn.Module, ABC):
    """A model of `vidl.models`.

    A subclass creates its modules, implements `see`, and names its losses in `objectives`. Clips
    and captions are compared, fused or matched by the methods of `vidl.models.abilities`.

    Attributes:
        recipe: sizes, masks and weights of the losses: a loss has the weight of the recipe's field
            with its name, or 1.
        card: what the paper states.
        objectives: the losses by name, in the order in which they are computed.
        pretraining_only: prefixes of the parameters that only the pre-training losses use; a model
            without them accepts a checkpoint with them.
        not_joining: prefixes of the parameters that `Joins.join` does not use; answering freezes
            them.
        normed_head: whether the classifier of answers has a LayerNorm.
    """

    card: ClassVar[Card]
    objectives: ClassVar[Mapping[str, Objective]] = {}
    pretraining_only: ClassVar[tuple[str, ...]] = ()
    not_joining: ClassVar[tuple[str, ...]] = ()
    normed_head: ClassVar[bool] = False
    recipe: Any

    @abstractmethod
    def see(self, inputs: Inputs) -> Seen:
        """Encode a batch."""

    def forward(
        self,
        video: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        samples: Tensor,
        step: int | Tensor = 0,
        *,
        clip_ids: Tensor | None = None,
        words: int | None = None,
        losses: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            video: [B, 3, T, H, W], uint8 or normalised; any strides.
            ids: captions, [B, L] int64.
            attention_mask: [B, L], nonzero where there is a word.
            samples: index of each sample in the data set, [B] int64.
            step: training step; masks and negatives depend on `step` and `samples`.
            clip_ids: [B] int64, the clip of each sample; None: all differ.
            words: an upper bound of the words in `ids`; see `vidl.nn.Bert`.
            losses: names of the losses to compute; None: all that have a weight.

        Returns:
            "loss", the weighted sum, and each loss by its name: float32 scalars. With `losses`,
            these without their sum, and the features `v` and `t` of `Seen`.

        Raises:
            TypeError, ValueError, RuntimeError: from the ops and modules that the model calls.
        """
        self.check_batch(video, ids, attention_mask, samples, clip_ids)
        seen = self.see(Inputs(video, ids, attention_mask, samples, step, clip_ids, words))
        computed = {}
        for name, objective in self.objectives.items():
            wanted = self.weight(name) and (losses is None or name in losses)
            loss = objective(self, seen) if wanted else None
            if loss is not None:
                computed[name] = loss
        if losses is not None:
            return {"v": seen.v, "t": seen.t, **computed}
        total: Any = sum(self.weight(name) * loss for name, loss in computed.items())
        return {"loss": total, **computed}

    def weight(self, objective: str) -> float:
        """The weight of a loss; a loss with weight 0 is not computed."""
        return getattr(self.recipe, objective, 1.0)

    def starts(self) -> dict[str, Any]:
        """The modules that published weights can be loaded into, by `start.vision` and so on."""
        own: Any = self
        return {"vision": own.vision, "text": own.text}

    def set_keep_rate(self, keep_rate: float) -> None:
        """Set the keep rate of all layers that prune."""
        own: Any = self
        own.vision.set_keep_rate(keep_rate)

    def resized(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of another run of this model, for this number of frames and this grid."""
        return dict(weights)

    @property
    def writer(self) -> Any:
        """The module whose weights a decoder of words starts with."""
        own: Any = self
        return own.text

    def begin(self) -> None:
        """Called once in a new run, after the weights it starts with are loaded."""

    def after_step(self) -> None:
        """Called after each step of the optimizer."""

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """A context in which all visible tokens and all frames are kept."""
        yield

    def over_views(self, scores: Tensor) -> Tensor:
        """The scores of pairs, [S, ...], from those of a model for each pair, or pair and view."""
        return scores

    def check_batch(
        self,
        video: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        samples: Tensor,
        clip_ids: Tensor | None = None,
    ) -> None:
        """Check the arguments of `forward`; it computes masks for all frames of the recipe."""
        tensors = dict(video=video, ids=ids, attention_mask=attention_mask, samples=samples)
        check_tensors(optional=("clip_ids",), **tensors, clip_ids=clip_ids)
        self.check_clips(video)
        still = self.recipe.stills == "one" and video.shape[2] == 1
        frames = 1 if still else self.recipe.training_frames
        check_shape("video", video, "B", 3, frames, "H", "W")
        check_dtype("ids", ids, torch.int64)
        check_shape("ids", ids, video.shape[0], "L")
        check_shape("attention_mask", attention_mask, *ids.shape)
        check_dtype("samples", samples, torch.int64)
        check_shape("samples", samples, video.shape[0])
        if clip_ids is not None:
            check_dtype("clip_ids", clip_ids, torch.int64)
            check_shape("clip_ids", clip_ids, video.shape[0])

    def check_clips(self, video: Tensor, mask: VisualMask | None = None) -> None:
        """Check the arguments of `encode_clips`."""
        check_video(video)
        size, frames = (
            self.recipe.image_size,
            max(self.recipe.training_frames, self.recipe.evaluation_frames),
        )
        check_shape("video", video, "B", 3, "T", size, size)
        still = self.recipe.stills == "one" and video.shape[2] == 1
        if video.shape[2] > frames or (video.shape[2] % self.recipe.tubelet_size and not still):
            raise ValueError(
                f"need video of at most {frames} frames, in whole tubelets of "
                f"{self.recipe.tubelet_size}, got {video.shape[2]}"
            )
        if mask is not None:
            check_mask(mask)
            check_tensors(video=video, mask=mask.ids_keep)
            grid = (self.recipe.tubelets(video.shape[2]), *self.recipe.grid[1:])
            if tuple(mask.grid) != grid:
                raise ValueError(f"need mask of {grid} patches as video has, got {mask.grid}")


def check_model(model: System) -> None:
    """Raise unless `model` is a model of `vidl.models`."""
    if not isinstance(model, System):
        raise TypeError(f"need model as one of vidl.models, got {type(model).__name__}")
