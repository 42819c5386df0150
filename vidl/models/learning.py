"""The objectives of pre-training, as functions of a model and of what a step has encoded."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidl.masking import mask_words, uniform
from vidl.models.system import Inputs, Seen
from vidl.nn import WordsDecoder
from vidl.objectives import hard_negatives, masked_word_loss, matching_loss

# Stream of `uniform` for the samples whose clip is swapped; those of vidl.masking and
# vidl.objectives are 1 to 5.
SWAPS = 6 << 58


def contrast(model: Any, seen: Seen) -> Tensor:
    """VTC: clips and captions of a batch are compared by their features."""
    return model.contrast(seen.v, seen.t, seen.inputs.clip_ids)


def match_hard(model: Any, seen: Seen) -> Tensor:
    """VTM over 3 B pairs: a caption with its clip, with a hard negative clip, and the reverse."""
    inputs = seen.inputs
    similarity = model.similarity(seen.v, seen.t)
    negatives = hard_negatives(
        model.recipe.seed, inputs.step, inputs.samples, similarity, inputs.clip_ids
    )
    captions, partner = negatives.pairs()
    mask, words = inputs.attention_mask[captions], inputs.words
    most = None if words is None else 2 * words + inputs.ids.numel()
    pairs = model.match(seen.clips, seen.text[captions], mask, partner, most)
    return matching_loss(pairs, negatives)


def swap_half(recipe: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The clip of each caption, [B] int64, and whether it is another one, [B] bool.

    Half of the samples, rounded up, get a random other clip; all others are equally likely. A
    sample whose batch has no other clip keeps its own.
    """
    samples = inputs.samples
    B = samples.shape[0]
    alike = torch.zeros(B, B, device=samples.device)
    negatives = hard_negatives(recipe.seed, inputs.step, samples, alike, inputs.clip_ids)
    drawn = uniform(recipe.seed, inputs.step, samples, 1, stream=SWAPS)[:, 0]
    place = drawn.argsort(stable=True).argsort()
    swapped = (place >= B // 2) & negatives.exist
    own = torch.arange(B, device=samples.device)
    return torch.where(swapped, negatives.clips, own), swapped


def match_swapped(model: Any, seen: Seen) -> Tensor:
    """VTM: does the caption describe the clip? Half of the clips are swapped.

    `seen.more` has `pooled`, the vectors of the pairs, and `swapped`, [B] bool.
    """
    logits = model.over_views(model.matches(seen.more.pooled))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, (~seen.more.swapped).long())


def fill_words(model: Any, seen: Seen) -> Tensor:
    """MLM: words of the caption are masked and predicted from the rest and the clip."""
    inputs, r = seen.inputs, model.recipe
    hidden = mask_words(
        r.seed, inputs.step, inputs.samples, inputs.ids, inputs.attention_mask, r.word_ratio,
        vocabulary=r.vocabulary,
    )  # fmt: skip
    text = model.encode_text(hidden.ids, inputs.attention_mask, words=inputs.words)
    joint = model.join(seen.clips, text, inputs.attention_mask, words=inputs.words)
    logits = model.text.predict_words(joint.text, hidden.positions)
    return masked_word_loss(logits, hidden.labels)


def next_word_loss(
    decoder: WordsDecoder, rows: Tensor, ids: Tensor, attention_mask: Tensor, words: int | None
) -> Tensor:
    """Cross-entropy of each word of a text after the first, given the words before it and a clip.

    Args:
        rows: of the clips, [B, N, visual_width].
        ids, attention_mask, words: see `vidl.nn.WordsDecoder`.

    Returns:
        The mean over the words, zero if there are none; a scalar, float32 or better.
    """
    # A word is predicted wherever another one follows.
    before, after, follows = ids[:, :-1], ids[:, 1:], attention_mask[:, 1:] != 0
    most = None if words is None else min(words, before.numel())
    logits = decoder(before, follows, rows, words=most)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), after.flatten(), reduction="none")
    losses = losses.where(follows.flatten(), 0)
    return losses.sum() / follows.sum().clamp(min=1)


def write_words(model: Any, seen: Seen) -> Tensor:
    """LM: the model's decoder writes the caption, word by word, from the rows of the clip."""
    inputs = seen.inputs
    rows = model.described(seen.clips)
    return next_word_loss(model.decoder, rows, inputs.ids, inputs.attention_mask, inputs.words)


def reconstruct_pixels(model: Any, seen: Seen) -> Tensor | None:
    """MVM: the pixels of masked patches are predicted; None without a mask."""
    if seen.mask is None:
        return None
    pixels = model.reconstruct(seen.more, seen.mask)
    return model.pixels(pixels, seen.inputs.video, seen.mask.ids_mask)
