"""Video-text matching loss (VTM) with hard negatives."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.kernels.arguments import check_floating, check_tensors
from vidl.masking.draws import uniform
from vidl.objectives.contrastive import check_clip_ids, shared

# Streams of `uniform` for negative captions and negative clips; callers do not use them.
CAPTIONS, CLIPS = 4 << 58, 5 << 58


@dataclass(frozen=True, eq=False)
class Negatives:
    """A negative caption for each of B clips, and a negative clip for each caption.

    Attributes:
        captions: [B] int64, the negative caption of each clip.
        clips: [B] int64, the negative clip of each caption.
        exist: [B] bool; false where all samples of the batch show the same clip, so that there is
            no negative.
    """

    captions: Tensor
    clips: Tensor
    exist: Tensor

    def pairs(self) -> tuple[Tensor, Tensor]:
        """All 3B pairs as (captions, clips): matches, negative clips, negative captions.

        Use as `match(video, text[captions], attention_mask[captions], partner=clips)`.
        """
        own = torch.arange(self.clips.shape[0], device=self.clips.device)
        return torch.cat([own, own, self.captions]), torch.cat([own, self.clips, own])


@torch.no_grad()
def hard_negatives(
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    similarity: Tensor,
    clip_ids: Tensor | None = None,
) -> Negatives:
    """Draw hard negatives: the more similar a pair, the more likely it is drawn.

        P(caption j for clip i) = softmax_j(similarity[i, j]), where i and j show different clips

    and the same for clips, along the columns. No host synchronisation. Source: ALBEF, arXiv
    2107.07651, 3.2.

    Args:
        seed, step, samples: as in `vidl.masking.uniform`; samples [B] int64.
        similarity: [B, B], clips x captions, over the temperature; `ContrastiveLoss.similarity`.
        clip_ids: [B] or [B, K] int64, the clip of each sample; see `ContrastiveLoss.forward`.

    Raises:
        ValueError: the shapes do not fit, or there is only one sample.
    """
    tensors = dict(samples=samples, similarity=similarity)
    check_tensors(optional=("clip_ids",), **tensors, clip_ids=clip_ids)
    check_floating(similarity=similarity)
    B = similarity.shape[0] if similarity.ndim else 0
    if similarity.shape != (B, B) or samples.shape != (B,):
        raise ValueError(
            "need similarity [B, B] and samples [B], got "
            f"{tuple(similarity.shape)} and {tuple(samples.shape)}"
        )
    if B < 2:
        raise ValueError("need at least 2 samples to find negatives, got 1")
    if clip_ids is None:
        clip_ids = torch.arange(B, device=similarity.device)
    check_clip_ids(clip_ids, B)
    matched = shared(clip_ids, clip_ids)

    def drawn(logits: Tensor, stream: int) -> Tensor:
        # Gumbel-max trick: the argmax of logit + Gumbel noise is a draw from the softmax. An offset
        # of half a step keeps the numbers above zero.
        numbers = uniform(seed, step, samples, B, stream=stream).double() + 2.0**-25
        noisy = logits.double() - torch.log(-torch.log(numbers))
        return noisy.masked_fill(matched, float("-inf")).argmax(1)

    return Negatives(drawn(similarity, CAPTIONS), drawn(similarity.T, CLIPS), ~matched.all(1))


def matching_loss(logits: Tensor, negatives: Negatives) -> Tensor:
    """Cross-entropy of "does not match" (0) and "matches" (1), over the 3B pairs of `negatives`.

    Args:
        logits: [3B, 2], in the order of `negatives.pairs()`.

    Returns:
        The mean over all pairs, without negatives that do not exist; a scalar, float32 (float64 for
        float64 logits).

    Raises:
        ValueError: the shapes do not fit.
    """
    if not isinstance(negatives, Negatives):
        raise TypeError(f"need negatives as Negatives, got {type(negatives).__name__}")
    exist = negatives.exist
    check_tensors(logits=logits, negatives=exist)
    check_floating(logits=logits)
    if logits.shape != (3 * exist.shape[0], 2):
        raise ValueError(f"need logits [{3 * exist.shape[0]}, 2], got {tuple(logits.shape)}")
    ignored = torch.where(exist, 0, -100)
    labels = torch.cat([torch.ones_like(ignored), ignored, ignored])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels)
