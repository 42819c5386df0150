"""A sentence about two clips, true or false: a classifier on both."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidl.kernels.arguments import check_count, check_dtype, check_shape, check_tensors
from vidl.kernels.patches import check_video
from vidl.masking import VisualMask
from vidl.models.finetuned import FineTuned, classifier, prepare_to_join


class Pairing(FineTuned):
    """A pre-trained model that tells whether a sentence holds for two clips, as in NLVR2.

        logits = Linear(GELU(LayerNorm(Linear([pooled with clip 1, pooled with clip 2]))))

    The sentence is fused with each clip by itself. A learned vector is added to the tokens of the
    second clip, which tells it from the first; it begins at zero, so that both have the same token
    type at first. Sources: ViLT, arXiv 2102.03334, 4.3; VLC, arXiv 2205.09256. LayerNorm and GELU,
    which VLC has in its head for questions, are our choice.

    Args:
        model: pre-trained, with the ability `Joins`; the parts that fusion does not use
            (projections, heads, decoders) are frozen.

    Raises:
        ValueError: the model cannot fuse.
    """

    def __init__(self, model: Any) -> None:
        prepare_to_join(model, to="to compare two clips")
        super().__init__(model)
        width = model.joined_width
        self.second = nn.Parameter(torch.zeros(model.described_width))
        self.head = classifier(2 * width, 2 * width, 2, normed=True)

    def forward(
        self,
        video: Tensor,
        ids: Tensor,
        attention_mask: Tensor,
        samples: Tensor,
        step: int | Tensor = 0,
        *,
        labels: Tensor | None = None,
        clip_ids: Tensor | None = None,
        words: int | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch of sentences about two clips.

        Args:
            video: the frames of the first and then of the second clip, [B, 3, 2 T, H, W].
            ids, attention_mask, samples, step, words: see `System.forward`.
            labels: whether each sentence holds, [B] bool. None: all do, for a trial run.
            clip_ids: not used.

        Returns:
            "loss" and "pair", the same float32 scalar.

        Raises:
            TypeError, ValueError: see `System.forward`; `labels` does not fit, or video has an odd
                number of frames.
        """
        first = self._apart(video)[::2]
        self.model.check_batch(first, ids, attention_mask, samples, clip_ids)
        if labels is None:
            labels = torch.ones_like(ids[:, 0], dtype=torch.bool)
        check_tensors(ids=ids, labels=labels)
        check_dtype("labels", labels, torch.bool)
        check_shape("labels", labels, ids.shape[0])
        both = samples.repeat_interleave(2)
        mask = self.recipe.visual_mask(both, step, first.shape[2])
        clips = self.encode_clips(video, mask)
        text = self.encode_text(ids, attention_mask, words=words)
        logits = self.compare(clips, text, attention_mask, words=words)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, labels.long())
        return {"loss": loss, "pair": loss}

    def encode_clips(self, video: Tensor, mask: VisualMask | None = None) -> Tensor:
        """The tokens of both clips, [B, 2, ...].

        Args:
            video: the frames of the first and then of the second clip, [B, 3, 2 T, H, W].
            mask: the visible patches of the 2 B clips, pair after pair; None: all.

        Raises:
            ValueError: video has an odd number of frames, or see `Encodes.encode_clips`.
        """
        tokens = self.model.encode_clips(self._apart(video), mask).unflatten(0, (-1, 2))
        second = torch.stack([torch.zeros_like(self.second), self.second])
        return tokens + second.view(2, *[1] * (tokens.ndim - 3), -1).to(tokens.dtype)

    def encode_text(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, words: int | None = None
    ) -> Tensor:
        """See `Encodes.encode_text`; the text is a sentence about two clips."""
        return self.model.encode_text(ids, attention_mask, words=words)

    def compare(
        self,
        clips: Tensor,
        text: Tensor,
        attention_mask: Tensor,
        partner: Tensor | None = None,
        words: int | None = None,
    ) -> Tensor:
        """The logits of "does not hold" and "holds", [S, 2].

        Args:
            clips: tokens of B pairs of clips, [B, 2, ...] from `encode_clips`.
            text, attention_mask: tokens of sentences, [S, L, C] from `encode_text`, and [S, L].
            partner: the pair of each sentence, [S] int64; None: sentence b has pair b (S = B).
            words: an upper bound of the words in the sentences; see `vidl.nn.Bert`.
        """
        tensors = dict(clips=clips, text=text, attention_mask=attention_mask, partner=partner)
        check_tensors(("partner",), **tensors)
        if clips.ndim < 4 or clips.shape[1] != 2:
            raise ValueError(f"need clips [B, 2, ..., C], got {tuple(clips.shape)}")
        check_shape("text", text, "S", "L", "C")
        check_shape("attention_mask", attention_mask, *text.shape[:2])
        if words is not None:
            check_count("words", words)
        S = text.shape[0]
        if partner is None:
            if clips.shape[0] != S:
                raise ValueError(
                    f"need partner for {S} sentences in text and {clips.shape[0]} pairs of clips"
                )
            partner = torch.arange(S, device=clips.device)
        check_dtype("partner", partner, torch.int64)
        check_shape("partner", partner, S)
        # One call for both clips: all rows are packed together.
        pooled = self.model.join(
            clips.flatten(0, 1), text.repeat(2, 1, 1), attention_mask.repeat(2, 1),
            torch.cat([2 * partner, 2 * partner + 1]), None if words is None else 2 * words,
        ).pooled  # fmt: skip
        return self.model.over_views(self.head(torch.cat(pooled.chunk(2), -1)))

    def _apart(self, video: Tensor) -> Tensor:
        """Both clips of each pair as clips of their own, [2 B, 3, T, H, W], pair after pair."""
        check_video(video)
        if video.shape[2] % 2:
            raise ValueError(
                f"need video with the frames of two clips, [B, 3, 2 T, H, W], got "
                f"{tuple(video.shape)}"
            )
        clips = video.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
        if clips.shape[2] == 1 and self.recipe.stills == "repeat":  # a pair of images
            clips = clips.expand(-1, -1, self.recipe.training_frames, -1, -1)
        return clips
