"""Unified vision-language contrastive loss (UniVLC), with a queue of earlier samples."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import (
    check_count,
    check_dtype,
    check_floating,
    check_shape,
    check_tensors,
)
from vidl.objectives.contrastive import (
    ContrastiveLoss,
    check_features,
    direction,
    gather_with_gradient,
    shared,
)


class Queue(nn.Module):
    """The features of the latest samples of all ranks, first in, first out.

    It has the same rows on every rank, in the order of steps, ranks and samples. Its state is in
    buffers, so that a run resumes with it. Source: MoCo, arXiv 1911.05722, 3.1.

    Args:
        size: number of samples.
        dim: channels of the features.
        numbers: K, the numbers by which samples are compared; see `ContrastiveLoss.forward`.
    """

    video: Tensor
    text: Tensor
    ids: Tensor
    pushed: Tensor

    def __init__(self, size: int, dim: int, numbers: int = 1) -> None:
        super().__init__()
        check_count("size", size, 1)
        check_count("dim", dim, 1)
        check_count("numbers", numbers, 1)
        self.size = size
        self.register_buffer("video", torch.zeros(size, dim))
        self.register_buffer("text", torch.zeros(size, dim))
        self.register_buffer("ids", torch.zeros(size, numbers, dtype=torch.int64))
        self.register_buffer("pushed", torch.zeros(1, dtype=torch.int64))

    @property
    def filled(self) -> Tensor:
        """The rows that have a sample, [size] bool."""
        return torch.arange(self.size, device=self.pushed.device) < self.pushed

    @torch.no_grad()
    def push(self, video: Tensor, text: Tensor, ids: Tensor) -> None:
        """Replace the oldest samples by those of a batch of all ranks.

        Args:
            video, text: features, [B, dim] each.
            ids: the numbers of the samples, [B, K] int64.

        Raises:
            ValueError: the shapes do not fit, or the batch of all ranks is larger than the queue.
        """
        check_tensors(video=video, text=text, ids=ids, queue=self.video)
        check_floating(video=video, text=text)
        check_shape("video", video, "B", self.video.shape[1])
        check_shape("text", text, *video.shape)
        check_dtype("ids", ids, torch.int64)
        check_shape("ids", ids, video.shape[0], self.ids.shape[1])
        video, text, ids = (gather_with_gradient(x) for x in (video, text, ids))
        if len(ids) > self.size:
            raise ValueError(
                f"need a queue of at least {len(ids)} samples, the batch of all ranks, got "
                f"{self.size}"
            )
        rows = (self.pushed + torch.arange(len(ids), device=ids.device)) % self.size
        self.video.index_copy_(0, rows, video.to(self.video.dtype))
        self.text.index_copy_(0, rows, text.to(self.text.dtype))
        self.ids.index_copy_(0, rows, ids)
        self.pushed += len(ids)

    def extra_repr(self) -> str:
        return f"size={self.size}"


class UnifiedContrastiveLoss(ContrastiveLoss):
    """Contrastive loss in which all samples of one text or label are positives, with a queue.

        s[i, j] = cos(video_i, text_j) / temperature
        by video = mean over i of - mean over j in P(i) of log softmax_j(s[i, j])
        loss     = (by video + by text) / 2

    P(i) are the samples that share a number with sample i, such as that of their text. Without a
    queue, j runs over the batch, and the loss is `ContrastiveLoss`. With one, j runs over the keys
    of the batch, which are features of a momentum encoder without a gradient, and over those of
    earlier batches. Sources: OmniVL, arXiv 2209.07526; the targets: UniCL, arXiv 2204.03610, 3.2;
    the queue: ALBEF, arXiv 2107.07651, 3.2.

    Args:
        queue: earlier samples; 0: none.
        dim: channels of the features; only with a queue.
        numbers: K, the numbers of a sample; only with a queue.
        temperature, bounds, gather: see `ContrastiveLoss`; the queue has the samples of all ranks
            whatever `gather` is.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        queue: int = 0,
        dim: int = 256,
        numbers: int = 1,
        bounds: tuple[float, float] = (0.001, 0.5),
        gather: bool = False,
    ) -> None:
        super().__init__(temperature, bounds=bounds, gather=gather)
        check_count("queue", queue)
        self.queue = Queue(queue, dim, numbers) if queue else None

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        clip_ids: Tensor | None = None,
        keys: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The loss; in training the keys are added to the queue.

        Args:
            video, text: features, [B, dim] each; floating point, any norm.
            clip_ids: [B] or [B, K] int64, see `ContrastiveLoss.forward`; needed with a queue.
            keys: the features of the same samples by the momentum encoder, as (video, text); needed
                with a queue.

        Raises:
            ValueError: the shapes do not fit, or something is missing.
        """
        if self.queue is None:
            return super().forward(video, text, clip_ids)
        check_features(video, text, clip_ids)
        if keys is None or clip_ids is None:
            raise ValueError("need keys and clip_ids with a queue, got None")
        if not isinstance(keys, tuple) or len(keys) != 2:
            raise TypeError(f"need keys as the two features (video, text), got {keys!r}")
        for name, x in (("keys of video", keys[0]), ("keys of text", keys[1])):
            check_tensors((), **{name: x, "text": text})
            check_floating(**{name: x})
            check_shape(name, x, *text.shape)
        check_shape("video", video, *text.shape)
        own = clip_ids if clip_ids.ndim == 2 else clip_ids[:, None]
        check_shape("clip_ids", own, text.shape[0], self.queue.ids.shape[1])
        self._clamp()
        video, text = direction(video), direction(text)
        of_video, of_text = (direction(x.detach()) for x in keys)
        exist = torch.cat([self._gathered(own.new_ones(len(own))) > 0, self.queue.filled])
        everyone = torch.cat([self._gathered(own), self.queue.ids])
        same = (shared(own, everyone) & exist).to(text.dtype)
        target = same / same.sum(1, keepdim=True)
        losses = []
        for queries, latest, earlier in (
            (video, of_text, self.queue.text), (text, of_video, self.queue.video),
        ):  # fmt: skip
            with torch.autocast(text.device.type, enabled=False):
                others = torch.cat([self._gathered(latest), earlier.to(latest.dtype)])
                logits = queries @ others.T / self.temperature
                # Not -inf, which the target 0 would turn into NaN.
                logits = logits.masked_fill(~exist, torch.finfo(logits.dtype).min / 2)
                losses.append(F.cross_entropy(logits, target))
        if self.training:
            self.queue.push(of_video, of_text, own)
        return (losses[0] + losses[1]) / 2
