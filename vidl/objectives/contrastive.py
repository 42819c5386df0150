"""Video-text contrastive loss (VTC)."""

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_dtype,
    check_flag,
    check_floating,
    check_shape,
    check_tensors,
    finite,
    numbers,
)


class ContrastiveLoss(nn.Module):
    """Symmetric cross-entropy (InfoNCE) over the similarities of clips and captions.

        s[i, j] = cos(video_i, text_j) / temperature
        loss    = CE(rows of s, target) + CE(columns of s, target), halved if form is "mean"

    The target of a row is its own column; with `clip_ids`, it is spread equally over all columns of
    the same clip. With features of several frames, the cosines are averaged over frames. Computed
    in float32 under autocast. Defaults are those of ALBEF and Singularity; Frozen in Time and MAC
    use `ContrastiveLoss(0.05, learned=False, form="sum")` (NormSoftmax). Sources: ALBEF, arXiv
    2107.07651, 3.2; Singularity, arXiv 2206.03428; Frozen in Time, arXiv 2104.00650, 3.3.

    Args:
        temperature: initial temperature, or the fixed temperature.
        learned: whether `temperature` is a parameter.
        bounds: a learned temperature is clamped in place to these bounds at each call in training,
            as in ALBEF, so that its gradient never vanishes.
        form: "mean" or "sum" of the two directions.
        gather: contrast with the features of all ranks of torch.distributed; every rank must have
            the same batch size. The mean of the ranks' losses, and DDP's gradients, equal those of
            one rank with all samples.

    Raises:
        ValueError: the temperature is outside its bounds, or unknown form.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        learned: bool = True,
        bounds: tuple[float, float] = (0.001, 0.5),
        form: Literal["mean", "sum"] = "mean",
        gather: bool = False,
    ) -> None:
        super().__init__()
        if len(limits := numbers("bounds", bounds)) != 2:
            raise ValueError(f"need bounds (low, high), got {bounds}")
        (low, high), temperature = limits, finite("temperature", temperature)
        if not 0 < low <= temperature <= high:
            raise ValueError(
                f"need 0 < low <= temperature <= high, got bounds {bounds} and temperature "
                f"{temperature}"
            )
        if form not in ("mean", "sum"):
            raise ValueError(f"need form 'mean' or 'sum', got {form!r}")
        check_flag("learned", learned)
        check_flag("gather", gather)
        self.bounds, self.form, self.gather = bounds, form, gather
        # One-dimensional: FSDP2 cannot shard scalars.
        value = torch.tensor([temperature])
        self.temperature: Tensor
        if learned:
            self.temperature = nn.Parameter(value)
        else:
            self.register_buffer("temperature", value, persistent=False)

    def forward(self, video: Tensor, text: Tensor, clip_ids: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            video: [B, C], or [B, T, C] with features of each frame; floating point, any norm.
            text: [B, C].
            clip_ids: [B] int64, the clip of each sample, or [B, K] with K numbers, of which equal
                samples share one at least; None: all differ.

        Returns:
            A scalar, float32 (float64 for float64 features).

        Raises:
            ValueError: the shapes do not fit.
        """
        check_features(video, text, clip_ids)
        if video.shape[0] != text.shape[0]:
            raise ValueError(
                "need a caption for each clip, got video and text of shapes "
                f"{tuple(video.shape)} and {tuple(text.shape)}"
            )
        self._clamp()
        video, text = direction(video), direction(text)
        all_video, all_text = self._gathered(video), self._gathered(text)
        target = self._target(clip_ids, text)
        with torch.autocast(text.device.type, enabled=False):
            by_video = F.cross_entropy(video @ all_text.T / self.temperature, target)
            by_text = F.cross_entropy(text @ all_video.T / self.temperature, target)
        loss = by_video + by_text
        return loss / 2 if self.form == "mean" else loss

    def similarity(self, video: Tensor, text: Tensor) -> Tensor:
        """The cosine similarity of this rank's clips and captions, over the temperature.

        Args:
            video: S clips, [S, C] or [S, T, C].
            text: [B, C].

        Returns:
            [S, B], float32 (float64 for float64 features).
        """
        check_features(video, text)
        with torch.autocast(text.device.type, enabled=False):
            return direction(video) @ direction(text).T / self.temperature

    @torch.no_grad()
    def _clamp(self) -> None:
        if isinstance(self.temperature, nn.Parameter) and self.training:
            self.temperature.clamp_(*self.bounds)

    def _gathered(self, x: Tensor) -> Tensor:
        return gather_with_gradient(x) if self.gather else x

    def _target(self, clip_ids: Tensor | None, text: Tensor) -> Tensor:
        """The target distribution over the samples of all ranks, [B, ranks * B]."""
        B, device = text.shape[0], text.device
        rank, ranks = rank_and_size() if self.gather else (0, 1)
        if clip_ids is None:
            everyone = torch.arange(ranks * B, device=device)
            own = everyone[rank * B : (rank + 1) * B]
        else:
            own, everyone = clip_ids, self._gathered(clip_ids)
        same = shared(own, everyone).to(text.dtype)
        return same / same.sum(1, keepdim=True)

    def extra_repr(self) -> str:
        learned = isinstance(self.temperature, nn.Parameter)
        return f"learned={learned}, bounds={self.bounds}, form={self.form!r}, gather={self.gather}"


def shared(own: Tensor, others: Tensor) -> Tensor:
    """Which samples are equal by their numbers, [B] and [N] or [B, K] and [N, K]: [B, N] bool."""
    return own[:, None] == others if own.ndim == 1 else (own[:, None] == others).any(2)


def check_clip_ids(clip_ids: Tensor, B: int) -> None:
    """Raise unless these are numbers of B samples, [B] or [B, K] int64."""
    check_dtype("clip_ids", clip_ids, torch.int64)
    check_shape("clip_ids", clip_ids, *((B,) if clip_ids.ndim < 2 else (B, "K")))


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks; the gradient is summed over all ranks.

    Returns `x` itself if torch.distributed is not initialised.

    Args:
        x: [B, ...], of the same shape on every rank.

    Returns:
        [ranks * B, ...].
    """
    check_tensors(x=x)
    if x.ndim == 0:
        raise ValueError("need x [B, ...], got a scalar")
    return x if rank_and_size()[1] == 1 else _Gather.apply(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        out = x.new_empty((rank_and_size()[1] * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Features are small: an all-reduce costs little more than a reduce-scatter, and every
        # backend of torch.distributed supports it.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.narrow(0, rank_and_size()[0] * ctx.rows, ctx.rows)


def rank_and_size() -> tuple[int, int]:
    """Rank and world size."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def direction(x: Tensor) -> Tensor:
    """Rows normalised to length 1, at least in float32; [B, T, C] is then averaged over frames.

    The dot product with a mean of unit rows is the mean of the cosines, so frames need not be
    compared one by one.
    """
    x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-8)
    return x if x.ndim == 2 else x.mean(1)


def check_features(video: Tensor, text: Tensor, clip_ids: Tensor | None = None) -> None:
    """Raise unless these are features of clips, of captions, and numbers of the clips."""
    check_tensors(optional=("clip_ids",), video=video, text=text, clip_ids=clip_ids)
    check_floating(video=video, text=text)
    if video.ndim not in (2, 3) or text.ndim != 2 or video.shape[-1] != text.shape[1]:
        raise ValueError(
            "need video [B, C] or [B, T, C] and text [B, C], got "
            f"{tuple(video.shape)} and {tuple(text.shape)}"
        )
    if clip_ids is not None:
        check_clip_ids(clip_ids, text.shape[0])
